"""A recurrent network = cells × policy × layers, with torch.nn.LSTM's habits.

rnn = SkipLSTM(input_size, hidden_size, num_layers=1, batch_first=True)
output, state, updates = rnn(x, state=None, lengths=None)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from skiprnn.model import engines, pretrained
from skiprnn.model.cells import CELLS, Cell, State
from skiprnn.model.engines.call import Call
from skiprnn.model.policies import POLICIES, Gate, Policy, StepPolicy, make_policy
from skiprnn.model.stream import Stream


class RecurrentState(NamedTuple):
    """What a recurrent network remembers between two calls. Feed it back to continue a sequence.

    Layers of unequal hidden sizes have tuples of (B, H) tensors in place of (L, B, H).
    """

    h: Tensor | tuple[Tensor, ...]  # (L, B, H)
    c: Tensor | tuple[Tensor, ...] | None = None  # (L, B, H), LSTM
    update_prob: Tensor | None = None  # (B, 1), Skip: q, the increment of the gate per skipped step
    cum_update_prob: Tensor | None = None  # (B, 1), Skip: s, accumulated since the last update
    others: dict[str, Any] | None = None  # what other cells and policies carry, likewise, by its name


class Options(TypedDict, total=False):
    """Keyword arguments of Recurrent."""

    batch_first: bool
    learn_initial_state: bool
    p_skip: float | None
    engine: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class Recurrent(nn.Module):
    """A stack of layers of one cell under one update policy.

    Args:
        cell: a name in skiprnn.model.cells.CELLS.
        policy: a name in skiprnn.model.policies.POLICIES.
        input_size: I.
        hidden_size: H, one for all layers or one per layer.
        num_layers: L.
        batch_first: x and output are (B, T, ·); otherwise (T, B, ·). `updates` and `state` do not change with it.
        learn_initial_state: trainable initial states drawn from N(0, 1) (Skip RNN's code), or zeros (SA-RNN's code).
        p_skip: probability of skipping, for policies that draw.
        engine: who runs the time loop, see skiprnn.model.engines; "auto" takes the fastest that serves.

    Raises:
        ValueError: an unknown name, a size below 1, p_skip out of [0, 1] or where it does not belong.
    """

    def __init__(
        self,
        cell: str,
        policy: str,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        *,
        batch_first: bool = True,
        learn_initial_state: bool = True,
        p_skip: float | None = None,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
        sizes = [hidden_size] * num_layers if isinstance(hidden_size, int) else list(hidden_size)
        if min([input_size, num_layers, *sizes]) < 1 or len(sizes) != num_layers:
            raise ValueError(
                f"sizes must be at least 1, with a hidden size for each layer; got input_size={input_size}, "
                f"hidden_size={hidden_size}, num_layers={num_layers}"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first = batch_first
        self.engine = engine
        engines.check(engine)
        self.layers = nn.ModuleList(
            CELLS[cell](below, size, learn_initial_state)
            for below, size in zip([input_size, *sizes[:-1]], sizes, strict=True)
        )
        self.policy: Policy = make_policy(policy, self.cells, p_skip)
        self.to(device=device, dtype=dtype)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Unpack[Options]) -> Self:
        """The recurrent network of a published checkpoint, without the readout.

        Args:
            path: a .safetensors file written by skiprnn.publish.
            options: batch_first, engine, device and dtype, as for the constructor.

        Raises:
            ValueError: there is no such file, it is no published checkpoint, or one of another class.
        """
        record, tensors = pretrained.read(Path(path))
        model = record["config"]["model"]
        weights = {name.removeprefix("rnn."): tensor for name, tensor in tensors.items() if name.startswith("rnn.")}
        names = ("cell", "policy", "hidden_size", "num_layers", "learn_initial_state", "p_skip")
        try:
            kind = CLASSES.get((model["cell"], model["policy"]), Recurrent)
            given = {name: model[name] for name in names} | {"input_size": weights["layers.0.weight_ih"].shape[1]}
            if issubclass(kind, cls):
                rnn = kind.__new__(kind)  # a subclass's constructor only chooses cell and policy
                Recurrent.__init__(rnn, **given, **options)
                rnn.load_state_dict(weights)
        except RuntimeError as error:
            differences = "; ".join(str(error).split("\n\t")[1:])
            raise ValueError(f"checkpoint {path} is of another architecture: {differences}") from None
        except ValueError as error:
            raise ValueError(f"checkpoint {path} cannot be loaded: {error}") from None
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"checkpoint {path} is damaged: {type(error).__name__} {error}") from None
        if not issubclass(kind, cls):
            raise ValueError(f"checkpoint {path} holds a {kind.__name__}: load it with {kind.__name__}.from_pretrained")
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ValueError(f"checkpoint {path} holds weights that are nan or infinite: nothing to use")
        return rnn

    @property
    def cells(self) -> list[Cell]:
        """The layers, from the input up."""
        return list(self.layers)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the constructor does."""
        for cell in self.cells:
            cell.reset_parameters()
        self.policy.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | Sequence[Tensor] | Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentState, Tensor]:
        """Run whole sequences.

        Args:
            x: (B, T, I), or (T, B, I) without batch_first; the parameters' dtype and device.
            state: where to continue: a RecurrentState, or as in torch a pair (h, c) for LSTMs, h for GRUs, (L, B, H)
                each. None: the initial state.
            lengths: (B,) integers, the steps of each sequence that count; later ones update nothing and repeat the
                last valid output. None: all T.

        Returns:
            output: the top layer's h, (B, T, H).
            state: after the last valid step.
            updates: 1 where the state was updated, else 0: (B, T) for step policies, (B, T, H) for neuron policies (all
                layers' neurons side by side); differentiable (straight-through) where the policy learns.

        Raises:
            ValueError: a shape or dtype that does not fit, or weights that a hook computes; the message names it.
        """
        call = self.prepare(x, state, lengths)
        return self.finish(*engines.ENGINES[self.engine_for(call.x)].run(call))

    def prepare(self, x: Tensor, state=None, lengths: Tensor | None = None) -> Call:
        """What an engine's run takes, from forward's arguments; the policy's decisions are drawn here."""
        x = self._checked(x if self.batch_first or x.dim() < 2 else x.transpose(0, 1), lengths)
        if lengths is not None:  # whatever a padded step holds, even nan, it counts for nothing
            valid = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)
            x = x.masked_fill(~valid.unsqueeze(2), 0)
        states, gate = self.unpack(state, x.shape[0])
        draw = self.policy.draw(x, sum(cell.hidden_size for cell in self.cells))
        return Call(self.cells, self.policy, x, states, gate, draw, lengths, alike=state is None)

    def finish(
        self, output: Tensor, states: Sequence[State], gate: Gate, updates: Tensor
    ) -> tuple[Tensor, RecurrentState, Tensor]:
        """forward's results, from what an engine's run returned."""
        return output if self.batch_first else output.transpose(0, 1), self.pack(states, gate), updates

    def stream(self, state: RecurrentState | None = None) -> Stream:
        """Run one sequence sample by sample, from `state` (batch 1) on; tells which coming samples need not be read."""
        return Stream(self, state)

    def engine_for(self, x: Tensor) -> str:
        """The engine that runs an input like x: what "auto" stands for."""
        return engines.choose(self.engine, self.cells, self.policy, x)

    def _checked(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if x.dim() != 3 or x.shape[-1] != self.input_size or not x.shape[1]:
            layout = "(batch, steps, input)" if self.batch_first else "(steps, batch, input)"
            shape = tuple(x.shape if self.batch_first or x.dim() < 2 else x.transpose(0, 1).shape)
            raise ValueError(f"x must be {layout} with at least one step and {self.input_size} inputs; got {shape}")
        if x.dtype != self.cells[0].weight_ih.dtype:
            raise ValueError(f"x is {x.dtype}, the parameters are {self.cells[0].weight_ih.dtype}: convert one of them")
        if lengths is not None and (lengths.shape != x.shape[:1] or lengths.dtype.is_floating_point):
            raise ValueError(f"lengths must be {x.shape[0]} integers, one per sequence; got {tuple(lengths.shape)}")
        for part in (*self.cells, self.policy):  # torch.nn.utils.prune, and weight_norm as it was
            if part._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(part).values()):
                raise ValueError(
                    f"a hook computes weights of {type(part).__name__}, and engines call no hooks: make them permanent "
                    "(torch.nn.utils.prune.remove) or use torch.nn.utils.parametrize"
                )
        return x

    def unpack(self, state, batch_size: int) -> tuple[list[State], Gate]:
        """Per-layer states and the policy's gate, from what the caller passed as forward's `state`.

        Raises:
            ValueError: as forward.
        """
        gate = self.policy.initial_gate(batch_size) if isinstance(self.policy, StepPolicy) else ()
        if state is None:
            return [cell.initial_state(batch_size) for cell in self.cells], gate
        names, gate_names = self.state_names
        if isinstance(state, RecurrentState):
            found = {name: part for name, part in state._asdict().items() if name != "others" and part is not None}
            found |= state.others or {}
        else:
            parts = [state] if isinstance(state, Tensor) else [part for part in state if part is not None]
            found = dict(zip((*names, *gate_names, *range(len(parts))), parts, strict=False))
        if found.keys() - set(gate_names) != set(names) or len(found) not in (len(names), len(names + gate_names)):
            wanted = f"{', '.join(names)}{' and the gate' if gate else ''}"
            raise ValueError(f"state must hold {wanted}; got {len(found)} parts")
        expected = [(batch_size, cell.hidden_size) for cell in self.cells]
        for name in names:
            if [tuple(layer.shape) for layer in found[name]] != expected:
                shapes = [tuple(layer.shape) for layer in found[name]]
                raise ValueError(f"state {name} must be {expected} over the layers; got {shapes}")
        given = tuple(found[name] for name in gate_names if name in found)
        if given and [tuple(part.shape) for part in given] != [(batch_size, 1)] * len(gate):
            shapes = [tuple(part.shape) for part in given]
            raise ValueError(f"the state's gate must be {(batch_size, 1)} each; got {shapes}")
        dtype = self.cells[0].weight_ih.dtype
        for name, part in found.items():
            for tensor in part:
                if tensor.dtype != dtype:
                    what = name if name in names else "gate"
                    raise ValueError(f"state {what} is {tensor.dtype}, the parameters are {dtype}: convert one of them")
        return list(zip(*(found[name] for name in names), strict=True)), given or gate

    def pack(self, states: Sequence[State], gate: Gate) -> RecurrentState:
        """The public form of per-layer states and gate."""
        names, gate_names = self.state_names
        equal = isinstance(self.hidden_size, int)
        entries: list[Any] = [torch.stack(layers) if equal else layers for layers in zip(*states, strict=True)]
        carried = dict(zip((*names, *gate_names), (*entries, *gate), strict=True))
        known = {name: carried.pop(name) for name in RecurrentState._fields if name in carried}
        return RecurrentState(**known, others=carried or None)

    @property
    def state_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of the cells' state entries, and of the policy's gate."""
        return self.cells[0].state_names, self.policy.gate_names if isinstance(self.policy, StepPolicy) else ()

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"


class _Named(Recurrent):
    """A cell under a policy, with a name of its own; the arguments are Recurrent's."""

    cell_and_policy: ClassVar[tuple[str, str]]

    def __init__(
        self, input_size: int, hidden_size: int | Sequence[int], num_layers: int = 1, **options: Unpack[Options]
    ):
        cell, policy = self.cell_and_policy
        if POLICIES[policy].draws:
            options = {"p_skip": 0.5, **options}
        super().__init__(cell, policy, input_size, hidden_size, num_layers, **options)


class LSTM(_Named):
    """LSTM that updates at every step: the papers' baseline."""

    cell_and_policy = "lstm", "always"


class GRU(_Named):
    """GRU that updates at every step: the papers' baseline, another function than torch.nn.GRU (see GRUCell)."""

    cell_and_policy = "gru", "always"


class RandomSkipLSTM(_Named):
    """LSTM that skips each step with probability p_skip (0.5): Skip RNN's baseline."""

    cell_and_policy = "lstm", "random_steps"


class RandomSkipGRU(_Named):
    """GRU that skips each step with probability p_skip (0.5): Skip RNN's baseline."""

    cell_and_policy = "gru", "random_steps"


class SkipLSTM(_Named):
    """Skip LSTM ([SKIP]): learns which steps to skip."""

    cell_and_policy = "lstm", "skip"


class SkipGRU(_Named):
    """Skip GRU ([SKIP]): learns which steps to skip."""

    cell_and_policy = "gru", "skip"


class SALSTM(_Named):
    """SA-RNN ([SA]) with an LSTM cell: learns which neurons to update at each step."""

    cell_and_policy = "lstm", "selective"


class SAGRU(_Named):
    """SA-RNN ([SA]) with a GRU cell, as published: learns which neurons to update at each step."""

    cell_and_policy = "gru", "selective"


CLASSES: dict[tuple[str, str], type[Recurrent]] = {
    kind.cell_and_policy: kind for kind in (LSTM, GRU, RandomSkipLSTM, RandomSkipGRU, SkipLSTM, SkipGRU, SALSTM, SAGRU)
}
