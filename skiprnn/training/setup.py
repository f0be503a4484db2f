"""A run's network on its data, on its device: from the settings, or from a checkpoint."""

import inspect
import multiprocessing
import os
import re
import socket
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml

from skiprnn.data.base import GeneratedData, SequenceData
from skiprnn.model.cells import CELLS
from skiprnn.training import provenance
from skiprnn.training.config import ConfigError, RunConfig, fits, packaged
from skiprnn.training.folder import load_weights, read_checkpoint
from skiprnn.training.module import SequenceModule


def device_of(run: RunConfig) -> torch.device:
    """The device that `device` stands for.

    Raises:
        ConfigError: cuda without a GPU; or SLURM gave one, and torch does not see it: no weeks on a CPU then.
    """
    given = os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS")
    if given and run.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            f"{socket.gethostname()}: the job has a GPU and torch {torch.__version__} sees none; "
            "hydra.launcher.gpus_per_node=0 trains on CPUs"
        )
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    if run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    worker = re.search(r"\d+$", multiprocessing.current_process().name)  # a sweep's processes take turns over the GPUs
    return torch.device("cuda", int(worker[0]) % torch.cuda.device_count() if worker else 0)


def prepare_process(run: RunConfig) -> None:
    """Threads, and numbers too small to be normal as 0: over hundreds of steps gradients fade into them, and they are
    slow beyond measure on a CPU."""
    provenance.code_version()  # asked before the run, not after it
    torch.set_flush_denormal(True)
    if threads := run.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", 0)):
        torch.set_num_threads(threads)


def data_class(run: RunConfig) -> type[SequenceData]:
    """The class of a run's data set: one that conf/data/*.yaml names, the package's or that beside the command.

    What a checkpoint or a record says is no reason to import anything.

    Raises:
        ConfigError: none of them names it, or it is not there.
    """
    target = run.data.get("_target_")
    files = [file for folder in (packaged("conf"), Path("conf")) for file in folder.glob("data/*.yaml")]
    if target not in ((yaml.safe_load(file.read_text()) or {}).get("_target_") for file in files):
        raise ConfigError(f"data={run.data['name']}: no conf/data/*.yaml has the _target_ {target}")
    try:
        return resolve_name(str(target))
    except Exception as error:  # whatever a user's own file does when it is imported
        raise ConfigError(f"data={run.data['name']}: {str(error).splitlines()[0]}") from None


def make_data(run: RunConfig) -> SequenceData:
    """The data set of a run, not yet loaded.

    Raises:
        ConfigError: an argument that the data class does not have, or that cannot work.
    """
    arguments = {key: value for key, value in run.data.items() if key not in ("_target_", "name")}
    for name, instead in (("batch_size", "training.batch_size"), ("seed", "seed"), ("root", "data_root")):
        if name in arguments:
            raise ConfigError(f"data.{name}={arguments[name]}: the setting is {instead}")
    kind = data_class(run)
    known = inspect.signature(kind).parameters
    try:
        for name, value in arguments.items():
            if name in known and not fits(value, known[name].annotation):
                wanted = getattr(known[name].annotation, "__name__", known[name].annotation)
                raise ConfigError(f"data.{name}={value}: must be {wanted}")
        return kind(**arguments, batch_size=run.training.batch_size, seed=run.seed, root=run.data_root)
    except ConfigError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"data={run.data['name']}: {error}") from None


def require_memory(run: RunConfig, data: SequenceData, device: torch.device) -> None:
    """Raises ConfigError where there is less memory than the weights need, with gradients and Adam's two moments, or
    than the sets that a generated data set draws beforehand; all float32."""
    model, gates = run.model, len(CELLS[run.model.cell].gates)
    words = data.vocabulary_size or 0
    inputs = (model.embedding_size if words else data.input_size) + (2 * model.num_layers - 1) * model.hidden_size
    weights = 4 * 4 * (gates * model.hidden_size * inputs + words * model.embedding_size)
    drawn = sum(data.examples[split] for split in ("validation", "test")) if isinstance(data, GeneratedData) else 0
    sets = 4 * drawn * data.steps * data.input_size
    on_gpu = device.type == "cuda"
    there = torch.cuda.mem_get_info(device)[1] if on_gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for needed, settings in (
        (weights, f"model.hidden_size={model.hidden_size}, model.num_layers={model.num_layers}: the weights need"),
        (sets, f"data={run.data['name']}: its validation and test batches need"),
    ):
        if needed > there:
            raise ConfigError(f"{settings} {needed / 2**30:,.0f} GiB of memory; there are {there / 2**30:,.0f}")


def make_module(run: RunConfig) -> SequenceModule:
    """The run with its data, on its device.

    Raises:
        ConfigError: a batch larger than the data, or an engine that does not serve the model.
        DataError: data that is missing.
    """
    device = device_of(run)
    prepare_process(run)
    data = make_data(run)
    data.prepare()
    require_memory(run, data, device)
    data.load(device)
    module = SequenceModule(run, data)
    try:
        data.training_batches(0)
        _ = module.engine
    except ValueError as error:
        raise ConfigError(f"{run.row} on {run.data['name']}: {error}") from None
    return module


def load(path: Path, **place: Any) -> SequenceModule:
    """The trained network of a checkpoint, in evaluation mode, with its data in memory.

    Args:
        path: a .ckpt or a published .safetensors.
        place: data_root, device, engine, threads; as in a run's config.

    Raises:
        ConfigError, DataError: no such checkpoint, one of another architecture, or data that is missing.
    """
    checkpoint = read_checkpoint(path)
    run = RunConfig.of(checkpoint["run"], **place)
    root = Path(run.data_root).resolve()
    for name, value in run.data.items():
        if isinstance(value, str) and not (
            value.isprintable() and "://" not in value and (root / value).resolve().is_relative_to(root)
        ):
            raise ConfigError(
                f"checkpoint {path}: data.{name}={value!r} is no place in the data folder {run.data_root}; "
                "give data_root=FOLDER that holds it"
            )
    embedding, words = checkpoint["state_dict"].get("network.embedding.weight"), run.data.get("vocabulary_size")
    held = None if embedding is None else len(embedding)
    if held != words:
        raise ConfigError(f"checkpoint {path} is damaged: it holds {held} words and says {words}")
    module = make_module(run)
    load_weights(module, checkpoint, path)
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        raise ConfigError(f"checkpoint {path} holds weights that are nan or infinite: there is nothing to measure")
    return module.eval()
