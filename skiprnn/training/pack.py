"""Several runs trained as one job: their time loops share a launch, everything else is each run's own.

A pack's runs differ in seed and agree in all else. Each has its batches, random numbers, clipping, optimiser state,
metrics, checkpoints and record, as if it had been alone; so a pack continues runs that were begun alone, and vice
versa.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor

from skiprnn.model import engines
from skiprnn.training.folder import AtomicCheckpointIO, RunKeeper, read_checkpoint
from skiprnn.training.module import DivergedError, SequenceModule


class RunDivergedError(DivergedError):
    """One run of a pack diverged."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class Randomness:
    """A run's own random numbers, on the CPU and on its device; nothing to do for a run that uses none."""

    def __init__(self, used: bool):
        self.used, self.states = used, self._now()

    @staticmethod
    def _now() -> tuple[Tensor, Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    @staticmethod
    def _set(states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, torch's generators are the run's; it goes on from where it was left."""
        if not self.used:
            yield
            return
        outside = self._now()
        self._set(self.states)
        try:
            yield
        finally:
            self.states = self._now()
            self._set(outside)


class PackedModule(lightning.LightningModule):
    """R runs in lockstep.

    Args:
        modules: one per run.
    """

    def __init__(self, modules: Sequence[SequenceModule]):
        super().__init__()
        for index, module in enumerate(modules):
            self.add_module(f"run{index}", module)  # a direct child: Lightning gives it the trainer
        self.modules_of_runs = list(modules)
        self.randomness = [
            Randomness(module.model.p_skip is not None or module.model.dropout > 0) for module in modules
        ]

    def runs(self) -> Iterable[tuple[SequenceModule, Randomness]]:
        return zip(self.modules_of_runs, self.randomness, strict=True)

    def losses(self, batches: Sequence[tuple[Tensor, Tensor, Tensor | None]], stage: str) -> Tensor:
        """The sum of all runs' losses: each run's gradients are those of its own."""
        calls = []
        for (module, randomness), (inputs, _, lengths) in zip(self.runs(), batches, strict=True):
            with randomness():
                calls.append(module.network.rnn.prepare(module.network.embed(inputs), lengths=lengths))
        engine = self.modules_of_runs[0].network.rnn.engine_for(calls[0][2])
        losses = []
        results = engines.run_packed(engine, calls)
        for (module, randomness), result, (_, targets, _) in zip(self.runs(), results, batches, strict=True):
            _, state, updates = module.network.rnn.finish(*result)
            with randomness():
                prediction = module.network.read(state)
            losses.append(module.count(prediction, updates, targets, stage))
        return torch.stack(losses).sum()

    def training_step(self, batches: Any, batch_index: int) -> Tensor:
        return self.losses(batches, "train")

    def validation_step(self, batches: Any, batch_index: int) -> None:
        self.losses(batches, "validation")

    def on_train_epoch_start(self) -> None:
        for (module, randomness), group in zip(self.runs(), self.trainer.optimizers[0].param_groups, strict=True):
            with randomness():
                module.begin("train")
            group["lr"] = module.learning_rate
            module.network.rnn.policy.set_epoch(self.current_epoch)

    def on_validation_epoch_start(self) -> None:
        for module, randomness in self.runs():
            with randomness():
                module.begin("validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": module.parameters(), "lr": module.protocol.learning_rate} for module, _ in self.runs()]
        return torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-8)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        for module, _ in self.runs():
            torch.nn.utils.clip_grad_norm_(module.parameters(), module.protocol.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["runs"] = [module.identity for module, _ in self.runs()]

    def train_dataloader(self) -> Iterable:
        return _SideBySide([module.train_dataloader() for module, _ in self.runs()])

    def val_dataloader(self) -> Iterable:
        return _SideBySide([module.val_dataloader() for module, _ in self.runs()])


class _SideBySide:
    """One batch of each loader at a time, in a list. The length is asked for anew: it may depend on the epoch."""

    def __init__(self, loaders: Sequence[Any]):
        self.loaders = loaders

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[list]:
        return map(list, zip(*self.loaders, strict=True))


class PackKeeper(lightning.Callback):
    """Each run's keeper and pictures, at work on its share of the pack."""

    def __init__(
        self,
        keepers: Sequence[RunKeeper],
        pictures: Sequence[Any],
        loggers: Sequence[Sequence[Any]],
    ):
        self.keepers, self.pictures, self.loggers = keepers, pictures, loggers

    def state_dict(self) -> dict[str, Any]:
        return {"runs": [keeper.state_dict() for keeper in self.keepers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for keeper, state in zip(self.keepers, state_dict["runs"], strict=True):
            keeper.load_state_dict(state)

    def on_train_epoch_start(self, trainer, module) -> None:
        for keeper in self.keepers:
            keeper.on_train_epoch_start(trainer, module)

    def on_validation_start(self, trainer, module) -> None:
        for keeper, one in zip(self.keepers, self._checked(module, "train"), strict=True):
            keeper.on_validation_start(trainer, one)

    def on_train_epoch_end(self, trainer, module) -> None:
        groups = trainer.optimizers[0].param_groups
        modules = self._checked(module, "validation")
        shares = zip(self.keepers, self.pictures, self.loggers, modules, groups, strict=True)
        for keeper, pictures, loggers, one, group in shares:
            share = SimpleNamespace(
                current_epoch=trainer.current_epoch,
                optimizers=[SimpleNamespace(param_groups=[group])],
                loggers=loggers,
                save_checkpoint=trainer.save_checkpoint,
            )
            pictures.on_train_epoch_end(share, one)
            keeper.on_train_epoch_end(share, one)

    @staticmethod
    def _checked(module: PackedModule, stage: str) -> list[SequenceModule]:
        """All runs' modules, none of which diverged: nothing is written for some of them only."""
        for index, one in enumerate(module.modules_of_runs):
            try:
                one.results(stage)
            except DivergedError as error:
                raise RunDivergedError(str(error), index) from error
        return module.modules_of_runs


class PackCheckpointIO(AtomicCheckpointIO):
    """Splits a pack's checkpoint into what the run of a folder would have written alone, and joins theirs.

    Args:
        folders: of the runs, in the pack's order.
    """

    def __init__(self, folders: Sequence[Any]):
        super().__init__()
        self.folders = folders

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        index = [folder.path for folder in self.folders].index(Path(path).parent)
        own = {key: value for key, value in checkpoint.items() if key != "runs"}
        own["run"] = checkpoint["runs"][index]
        prefix = f"run{index}."
        own["state_dict"] = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        if "optimizer_states" in checkpoint:
            (state,) = checkpoint["optimizer_states"]
            group = state["param_groups"][index]
            own["optimizer_states"] = [
                {
                    "state": {at: state["state"][number] for at, number in enumerate(group["params"])},
                    "param_groups": [group | {"params": list(range(len(group["params"])))}],
                }
            ]
            own["callbacks"] = {RunKeeper.__qualname__: checkpoint["callbacks"][PackKeeper.__qualname__]["runs"][index]}
        super().save_checkpoint(own, path, storage_options)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        parts = [read_checkpoint(folder.last, map_location or "cpu") for folder in self.folders]
        joined = dict(parts[0])
        joined["state_dict"] = {
            f"run{index}.{name}": value
            for index, part in enumerate(parts)
            for name, value in part["state_dict"].items()
        }
        state: dict[int, Any] = {}
        groups = []
        for part in parts:
            (own,) = part["optimizer_states"]
            (group,) = own["param_groups"]
            first = len(state)
            state |= {first + number: value for number, value in own["state"].items()}
            groups.append(group | {"params": [first + number for number in group["params"]]})
        joined["optimizer_states"] = [{"state": state, "param_groups": groups}]
        kept = [part["callbacks"][RunKeeper.__qualname__] for part in parts]
        joined["callbacks"] = {PackKeeper.__qualname__: {"runs": kept}}
        return joined
