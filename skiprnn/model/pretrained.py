"""Published weights: a safetensors file that carries the record of the run it comes from.

The tensors are the network's, `rnn.*`, `readout.*` and, for text, `embedding.*`. skiprnn.publish writes such files.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

SUFFIX = ".safetensors"
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
        record["config"]["model"], tensors["rnn.layers.0.weight_ih"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"checkpoint {path} was not written by skiprnn.publish") from None
    return record, tensors
