"""Published weights: a safetensors file that carries the record of the run it comes from.

The tensors are the network's, `rnn.*`, `readout.*` and, for text, `embedding.*`. skiprnn.publish writes such files.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

SUFFIX = ".safetensors"
FILE, LAST = f"model{SUFFIX}", f"last{SUFFIX}"  # of the epoch with the best validation score, and of the last one
KEY = "skiprnn"  # of the metadata entry that holds the record as JSON


def serialise(record: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """The content of a file, from a run's record and its network's tensors."""
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {KEY: json.dumps(record)})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors, on the CPU. Nothing in the file is executed.

    Raises:
        ValueError: there is no such file, it is corrupt, or no published checkpoint; safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open  # here, for the model needs torch alone
    except ModuleNotFoundError:
        raise ValueError("checkpoints need safetensors: pip install 'skiprnn[experiments]'") from None
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is corrupt or no safetensors file ({error})") from None
    try:
        record = json.loads(metadata[KEY])
        model = record["config"]["model"]
        tensors["rnn.layers.0.weight_ih"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"checkpoint {path} was not written by skiprnn.publish") from None
    check_sizes(path, model, tensors)
    return record, tensors


def check_sizes(path: Path, model: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raises ValueError unless a file's tensors have the sizes that its record says: whoever builds a network of these
    sizes takes no more memory than the file has bytes.

    Args:
        path: the file.
        model: what its record says of the model.
        tensors: what it holds, by name.
        prefix: of the network's tensors.
    """
    try:
        said = model["num_layers"], model["hidden_size"]
        weights = [tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}rnn.layers.")]
        layers = {name.split(".")[-2] for name in tensors if name.endswith(".weight_hh")}
        held = {(len(layers), tensors[f"{prefix}rnn.layers.{layer}.weight_hh"].shape[1]) for layer in layers}
        embedding = tensors.get(f"{prefix}embedding.weight")
        fits = embedding is None or embedding.shape[1] == model["embedding_size"]
        sound = held == {said} and fits and all(weight.dim() and weight.is_contiguous() for weight in weights)
    except (KeyError, TypeError, IndexError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"checkpoint {path} is damaged: its tensors have other sizes than its record says")
