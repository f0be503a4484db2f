"""A recurrent network = cells × policy × layers, with torch.nn.LSTM's habits.

rnn = SkipLSTM(input_size, hidden_size, num_layers=1, batch_first=False)
output, (h, c), updates = rnn(x, state=None, lengths=None)  # output, h, updates for GRUs
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from skiprnn.model import engines, pretrained
from skiprnn.model.cells import CELLS, Cell, LSTMCell, State
from skiprnn.model.engines.call import Call
from skiprnn.model.policies import POLICIES, Gate, Policy, StepPolicy, make_policy
from skiprnn.model.state import attach, each
from skiprnn.model.stream import Stream


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
        batch_first: x, output and updates are (B, T, ·); otherwise (T, B, ·), as in torch. `state` does not change.
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
        batch_first: bool = False,
        learn_initial_state: bool = True,
        p_skip: float | None = None,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
        given = [hidden_size] if isinstance(hidden_size, int | float) else list(hidden_size)
        if not all(isinstance(size, int) for size in (input_size, num_layers, *given)):
            raise ValueError(
                f"sizes must be integers; got input_size={input_size}, hidden_size={hidden_size}, "
                f"num_layers={num_layers}"
            )
        sizes = given * num_layers if isinstance(hidden_size, int) else given
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
        x: Tensor | PackedSequence,
        state: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Run whole sequences.

        Args:
            x: (T, B, I), or (B, T, I) with batch_first; one sequence (T, I); a PackedSequence; the parameters' dtype
                and device.
            state: where to continue, as in torch a pair (h, c) for LSTMs, h for GRUs, (L, B, H) each, (L, H) for one
                sequence; for layers of unequal sizes tuples of (B, H). A returned h carries the policy's gate state
                (see GatedState), with another h the gate starts anew; (h, c, *gate_state) gives it by hand. None: the
                initial state.
            lengths: (B,) integers, the steps of each sequence that count; later ones update nothing and repeat the
                last valid output. None: all T.

        Returns:
            output: the top layer's h, (T, B, H), laid out or packed as x.
            state: after the last valid step, in the form of the argument.
            updates: 1 where the state was updated, else 0: (T, B) for step policies, (T, B, H) for neuron policies (all
                layers' neurons side by side), laid out or packed as x; differentiable (straight-through) where the
                policy learns.

        Raises:
            ValueError: a shape or dtype that does not fit, or weights that a hook computes; the message names it.
        """
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("a PackedSequence has its own lengths: leave out lengths")
            return self._packed(x, state)
        if isinstance(x, Tensor) and x.dim() == 2:
            if lengths is not None:
                raise ValueError("one sequence (steps, input) takes no lengths: cut it")
            batch = 0 if self.batch_first else 1
            output, after, updates = self(x.unsqueeze(batch), each(state, Tensor.unsqueeze))
            return output.squeeze(batch), each(after, Tensor.squeeze), updates.squeeze(batch)
        call = self.prepare(x, state, lengths)
        return self.finish(*engines.ENGINES[self.engine_for(call.x)].run(call))

    def _packed(self, x: PackedSequence, state) -> tuple[PackedSequence, Any, PackedSequence]:
        """forward of a PackedSequence; as in torch, `state` has the order of the sequences before they were sorted."""
        padded, lengths = pad_packed_sequence(x, self.batch_first)
        output, after, updates = self(padded, state, lengths)
        order = torch.arange(len(lengths)) if x.sorted_indices is None else x.sorted_indices.cpu()

        def pack(padded: Tensor) -> PackedSequence:
            rows = padded.index_select(0 if self.batch_first else 1, order.to(padded.device))
            data = pack_padded_sequence(rows, lengths[order], self.batch_first).data
            return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)

        return pack(output), after, pack(updates)

    def flatten_parameters(self) -> None:
        """Does nothing: the weights need no copy in one piece, which torch.nn.LSTM's for cuDNN do."""

    def prepare(self, x: Tensor, state=None, lengths: Tensor | Sequence[int] | None = None) -> Call:
        """What an engine's run takes, from forward's arguments; the policy's decisions are drawn here."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor or a PackedSequence; got {type(x).__name__}")
        if lengths is not None and not isinstance(lengths, Tensor):
            try:
                lengths = torch.tensor(lengths)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"lengths must be integers, one per sequence; got {lengths!r}") from None
        x = self._checked(x if self.batch_first or x.dim() < 2 else x.transpose(0, 1), lengths)
        if lengths is not None:  # whatever a padded step holds, even nan, it counts for nothing
            valid = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)
            x = x.masked_fill(~valid.unsqueeze(2), 0)
        states, gate = self.unpack(state, x.shape[0])
        draw = self.policy.draw(x, sum(cell.hidden_size for cell in self.cells))
        return Call(self.cells, self.policy, x, states, gate, draw, lengths, alike=state is None)

    def finish(
        self, output: Tensor, states: Sequence[State], gate: Gate, updates: Tensor
    ) -> tuple[Tensor, Any, Tensor]:
        """forward's results, from what an engine's run returned."""
        if not self.batch_first:
            output, updates = output.transpose(0, 1), updates.transpose(0, 1)
        return output, self.pack(states, gate), updates

    def stream(self, state: Any = None) -> Stream:
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
        layers = len(names) == 1 and not isinstance(self.hidden_size, int) and isinstance(state[0], Tensor)
        parts = [state] if isinstance(state, Tensor) or layers else list(state)
        if len(parts) not in (len(names), len(names) + len(gate)):
            wanted = f"{', '.join(names)}{' and the gate' if gate else ''}"
            raise ValueError(f"state must hold {wanted}; got {len(parts)} parts")
        entries, given = parts[: len(names)], tuple(parts[len(names) :])
        if not given:  # it rides along on h, or on the top layer's h where they differ in size
            top = entries[0] if isinstance(entries[0], Tensor) else entries[0][-1]
            given = getattr(top, "gate_state", ()) if gate else ()
        expected = [(batch_size, cell.hidden_size) for cell in self.cells]
        for name, entry in zip(names, entries, strict=True):
            shapes = [tuple(layer.shape) for layer in entry]
            if shapes != expected:
                raise ValueError(f"state {name} must be {expected} over the layers; got {shapes}")
        if given and [tuple(part.shape) for part in given] != [(batch_size, 1)] * len(gate):
            shapes = [tuple(part.shape) for part in given]
            raise ValueError(f"the state's gate must be {len(gate)} of {(batch_size, 1)}; got {shapes}")
        dtype = self.cells[0].weight_ih.dtype
        for name, part in zip((*names, *gate_names), (*entries, *given), strict=False):
            for tensor in part:
                if tensor.dtype != dtype:
                    what = name if name in names else "gate"
                    raise ValueError(f"state {what} is {tensor.dtype}, the parameters are {dtype}: convert one of them")
        return list(zip(*entries, strict=True)), given or gate

    def pack(self, states: Sequence[State], gate: Gate) -> Any:
        """The public form of per-layer states and gate."""
        layers = [list(entry) for entry in zip(*states, strict=True)]
        if isinstance(self.hidden_size, int):
            entries: list[Any] = [torch.stack(entry) for entry in layers]
            entries[0] = attach(entries[0], gate)
        else:
            layers[0][-1] = attach(layers[0][-1], gate)
            entries = [tuple(entry) for entry in layers]
        return entries[0] if len(entries) == 1 else tuple(entries)

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

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, **options: Unpack[Options]) -> Self:
        """A network that begins with the weights of a torch.nn.LSTM, so with zeros as its initial state.

        Its policy is new. A Skip LSTM's gate starts close to 1, so fine-tuning starts from the LSTM's function.

        Args:
            lstm: the trained module.
            options: as for the constructor; batch_first, device and dtype are the module's unless given.

        Raises:
            ValueError: the cell is a GRU, or the module has what this network has not: the message names it.
        """
        if cls.cell_and_policy[0] != "lstm":
            raise ValueError(
                f"{cls.__name__} cannot take weights from torch: the papers' GRU resets the state before the product, "
                "torch.nn.GRU after it, so no weights make them equal"
            )
        if not isinstance(lstm, nn.LSTM):
            raise ValueError(f"from_torch takes a torch.nn.LSTM; got {type(lstm).__name__}")
        for name in ("bidirectional", "proj_size", "dropout"):
            if getattr(lstm, name):
                raise ValueError(f"{cls.__name__} has no {name}; the torch.nn.LSTM has {name}={getattr(lstm, name)}")
        weight = next(lstm.parameters())
        defaults = Options(batch_first=lstm.batch_first, device=weight.device, dtype=weight.dtype)
        options = Options(**{"learn_initial_state": False, **defaults, **options})
        rnn = cls(lstm.input_size, lstm.hidden_size, lstm.num_layers, **options)
        order = _gate_rows(TORCH_GATES, LSTMCell.gates, lstm.hidden_size).to(weight.device)
        with torch.no_grad():
            for layer, cell in enumerate(rnn.cells):
                cell.weight_ih.copy_(getattr(lstm, f"weight_ih_l{layer}")[order])
                cell.weight_hh.copy_(getattr(lstm, f"weight_hh_l{layer}")[order])
                cell.bias.copy_(cell.bias - cell.total_bias)  # what is added for good is taken off
                if lstm.bias:
                    both = getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")
                    cell.bias.add_(both[order].to(cell.bias))
                for initial in cell.initial_state(1):
                    initial.zero_()
        return rnn


TORCH_GATES = ("i", "f", "j", "o")  # of torch.nn.LSTM's rows; it calls j g


def _gate_rows(given: Sequence[str], wanted: Sequence[str], hidden_size: int) -> Tensor:
    """(G*H,): the rows that put weights with the gates in the order `given` into the order `wanted`."""
    return torch.cat([torch.arange(hidden_size) + given.index(gate) * hidden_size for gate in wanted])


class LSTM(_Named):
    """LSTM that updates at every step: the papers' baseline."""

    cell_and_policy = "lstm", "always"

    def to_torch(self) -> nn.LSTM:
        """The torch.nn.LSTM of the same weights.

        Raises:
            ValueError: torch's has no such thing: initial states other than zeros, layers of unequal sizes.
        """
        if any(initial.any() for cell in self.cells for initial in cell.initial_state(1)):
            raise ValueError("torch.nn.LSTM begins with zeros: only an LSTM with learn_initial_state=False becomes one")
        if not isinstance(self.hidden_size, int):
            raise ValueError(f"torch.nn.LSTM has one hidden size; the layers have {list(self.hidden_size)}")
        weight = self.cells[0].weight_ih
        size, layers = self.hidden_size, self.num_layers
        options = {"batch_first": self.batch_first, "device": weight.device, "dtype": weight.dtype}
        lstm = nn.LSTM(self.input_size, size, layers, **options)
        order = _gate_rows(LSTMCell.gates, TORCH_GATES, size).to(weight.device)
        with torch.no_grad():
            for layer, cell in enumerate(self.cells):
                getattr(lstm, f"weight_ih_l{layer}").copy_(cell.weight_ih[order])
                getattr(lstm, f"weight_hh_l{layer}").copy_(cell.weight_hh[order])
                getattr(lstm, f"bias_ih_l{layer}").copy_(cell.total_bias[order])
                getattr(lstm, f"bias_hh_l{layer}").zero_()
        return lstm


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
