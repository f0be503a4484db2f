"""A recurrent network = cells × policy × layers, with torch.nn.LSTM's habits.

rnn = SkipLSTM(input_size, hidden_size, num_layers=1, batch_first=False)
output, (h, c), updates = rnn(x, state=None, lengths=None)  # output, h, updates for GRUs
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from skiprnn.model import engines, onnx, pretrained, torch_lstm
from skiprnn.model.cells import CELLS, Cell, State
from skiprnn.model.engines.call import Call, Result, valid
from skiprnn.model.policies import POLICIES, Gate, Policies, Policy, StepPolicy, accumulated_in, make_policy
from skiprnn.model.state import converted, each, packed, unpacked
from skiprnn.model.stream import Stream

NO_JIT = "torch.jit cannot hold this network: use torch.export.export(rnn, (x,)), or rnn.to_onnx(file)"


class Options(TypedDict, total=False):
    """Keyword arguments of Recurrent."""

    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    learn_initial_state: bool
    p_skip: float | None
    engine: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class Stack(NamedTuple):
    """Layers that are updated together under one policy, and so by one gate."""

    cells: Sequence[Cell]  # from the input up
    policy: Policy
    reverse: bool  # reads each sequence from its last valid step to its first


class Recurrent(nn.Module):
    """A stack of layers of one cell under one update policy; bidirectional, a stack per layer and direction.

    D is 2 if bidirectional, else 1.

    Args:
        cell: a name in skiprnn.model.cells.CELLS.
        policy: a name in skiprnn.model.policies.POLICIES.
        input_size: I.
        hidden_size: H, one for all layers or one per layer.
        num_layers: L.
        bias: whether the cells have any; what a policy learns has its own.
        batch_first: x, output and updates are (B, T, ·); otherwise (T, B, ·), as in torch. `state` does not change.
        dropout: in training, the probability of zeroing an output of each layer but the last, as the next one reads it.
        bidirectional: every layer reads in both directions, as torch's does, each with a policy and a gate of its own;
            their outputs side by side are what the next layer reads.
        proj_size: none but 0, torch's default.
        learn_initial_state: trainable initial states drawn from N(0, 1) (Skip RNN's code), or zeros (SA-RNN's code).
        p_skip: probability of skipping, for policies that draw.
        engine: who runs the time loop, see skiprnn.model.engines; "auto" takes the fastest that serves.
        device, dtype: of the parameters; float32 unless given.

    Raises:
        ValueError: an unknown name, a size below 1, a probability out of [0, 1], p_skip where it does not belong.
    """

    def __init__(
        self,
        cell: str,
        policy: str,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        learn_initial_state: bool = True,
        p_skip: float | None = None,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
        given = list(hidden_size) if isinstance(hidden_size, Sequence) else [hidden_size]
        if not all(isinstance(size, int) for size in (input_size, num_layers, *given)):
            raise ValueError(
                f"sizes must be integers; got input_size={input_size!r}, hidden_size={hidden_size!r}, "
                f"num_layers={num_layers!r}"
            )
        sizes = given * num_layers if isinstance(hidden_size, int) else given
        if min([input_size, num_layers, *sizes]) < 1 or len(sizes) != num_layers:
            raise ValueError(
                f"sizes must be at least 1, with a hidden size for each layer; got input_size={input_size}, "
                f"hidden_size={hidden_size}, num_layers={num_layers}"
            )
        if proj_size:
            raise ValueError(f"proj_size={proj_size}: the papers' cells have no projection; put an nn.Linear behind")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is the probability of zeroing an output, in [0, 1]; got {dropout!r}")
        if dropout and num_layers == 1:
            warnings.warn("dropout acts between layers: with num_layers=1 it does nothing", stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.engine = engine
        engines.check(engine)
        directions = 2 if bidirectional else 1
        read = [input_size, *(directions * size for size in sizes[:-1])]
        options = {} if bias else {"bias": False}
        self.layers = nn.ModuleList(  # in the order of torch's weights: both directions of a layer, then the next layer
            CELLS[cell](below, size, learn_initial_state, **options)
            for below, size in zip(read, sizes, strict=True)
            for _ in range(directions)
        )
        self.policy: Any = make_policy(policy, self.cells, p_skip)
        if bidirectional:
            self.policy = Policies(make_policy(policy, [cell], p_skip) for cell in self.cells)
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
        """The layers, from the input up; bidirectional, a layer's forwards and backwards one after the other."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[list[Stack]]:
        """The stacks, in the order in which they run; those of one list read the same."""
        if not self.bidirectional:
            return [[Stack(self.cells, self.policy, False)]]
        pairs = zip(self.cells, self.policy, strict=True)
        every = [Stack([cell], policy, bool(number % 2)) for number, (cell, policy) in enumerate(pairs)]
        return [every[layer : layer + 2] for layer in range(0, len(every), 2)]

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
                and device. Under autocast any precision up to float32, and the recurrence runs in the parameters'.
            state: where to continue, as in torch a pair (h, c) for LSTMs, h for GRUs, (L×D, B, H) each, (L×D, H) for
                one sequence; for layers of unequal sizes tuples of (B, H). A returned h carries the policy's gate state
                (see GatedState), with another h the gate starts anew; (h, c, *gate_state) gives it by hand. None: the
                initial state.
            lengths: (B,) integers, the steps of each sequence that count; later ones update nothing and repeat the
                last valid output. None: all T.

        Returns:
            output: the top layer's h, (T, B, D×H), laid out or packed as x; under autocast in its precision.
            state: after the last valid step, in the form of the argument.
            updates: 1 where the state was updated, else 0: (T, B) for step policies, (T, B, L×D×H) for neuron policies
                (all layers' neurons side by side), laid out or packed as x; differentiable (straight-through) where
                the policy learns. Bidirectional step policies have (T, B, L×D), a gate each. At
                least float32, for its sums.

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
        if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
            low, dtype = torch.get_autocast_dtype(x.device.type), self.cells[0].weight_ih.dtype
            with torch.autocast(x.device.type, enabled=False):  # a recurrence adds up what it rounds
                output, after, updates = self(converted(x, dtype), converted(state, dtype), lengths)
            return converted(output, low), after, updates
        x, lengths = self._read(x, lengths)
        parts = iter(self.unpack(state, x.shape[0]))  # len(x) would fix what torch.export leaves open
        results: list[Result] = []
        for block in self.blocks:
            if results:
                x = functional.dropout(self._output(results), self.dropout, self.training)
            results += [self._run(stack, self._call(stack, x, lengths, *next(parts), state is None)) for stack in block]
        return self.finish(results)

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

    def prepare(
        self, x: Tensor, state=None, lengths: Tensor | Sequence[int] | None = None, draw: Tensor | None = None
    ) -> Call:
        """What an engine's run takes, from forward's arguments; the policy's decisions are drawn here, unless given."""
        if self.bidirectional:
            raise ValueError("a bidirectional network is several stacks, each prepared when its input is there")
        x, lengths = self._read(x, lengths)
        ((stack,),), (part,) = self.blocks, self.unpack(state, len(x))
        return self._call(stack, x, lengths, *part, alike=state is None, draw=draw)

    def finish(self, results: Sequence[Result]) -> tuple[Tensor, Any, Tensor]:
        """forward's results, from what engines returned for each stack."""
        output, updates = self._output(results), results[0].updates
        if self.bidirectional:
            every = [result.updates for result in results]
            updates = torch.stack(every, 2) if updates.dim() == 2 else torch.cat(every, 2)
        updates = updates.to(accumulated_in(updates.dtype))
        if not self.batch_first:
            output, updates = output.transpose(0, 1), updates.transpose(0, 1)
        return output, self.pack([(result.states, result.gate) for result in results]), updates

    def _output(self, results: Sequence[Result]) -> Tensor:
        """(B, T, D*H) of the last layer that ran."""
        return torch.cat([result.output for result in results[-2:]], 2) if self.bidirectional else results[0].output

    def _call(
        self,
        stack: Stack,
        x: Tensor,
        lengths: Tensor | None,
        states,
        gate: Gate,
        alike: bool,
        draw: Tensor | None = None,
    ) -> Call:
        """What an engine is given for one stack; x as it lies, also where the stack reads it in reverse."""
        cells, policy, reverse = stack
        sizes = [cell.hidden_size for cell in cells]
        draw = policy.draw(x, sum(sizes)) if draw is None else draw
        masks: list[Tensor] = []
        if self.dropout and self.training:
            masks = [functional.dropout(x.new_ones(*x.shape[:2], size), self.dropout) for size in sizes[:-1]]
        x = _reversed(x, lengths) if reverse else x
        return Call(cells, policy, x, states, gate, draw, lengths, alike, masks)

    def _run(self, stack: Stack, call: Call) -> Result:
        """One stack's result, laid out in the order of the steps also where it reads them in reverse."""
        engine = engines.choose(self.engine, call.cells, call.policy, call.x, bool(call.masks))
        result = engines.ENGINES[engine].run(call)
        if not stack.reverse:
            return result
        updates = result.updates if result.updates.dim() == 3 else result.updates.unsqueeze(2)
        updates = _reversed(updates, call.lengths)
        if call.lengths is not None:
            updates = updates.masked_fill(~valid(call.lengths, updates.shape[1]).unsqueeze(2), 0)
        return result._replace(output=_reversed(result.output, call.lengths), updates=updates.view_as(result.updates))

    def stream(self, state: Any = None, batch_size: int | None = None) -> Stream:
        """Run endless sequences sample by sample; tells which coming samples need not be read.

        Args:
            state: where to continue, as forward's of batch 1 or batch_size, or what Stream.to_bytes gave.
            batch_size: B streams, each in its own time; None: one, whose samples and outputs have no batch dimension.

        Raises:
            ValueError: a state that does not fit; bytes that are damaged, or of another network; two directions.
        """
        if self.bidirectional:
            raise ValueError("a stream goes forwards: what reads a sequence in both directions needs it whole")
        return Stream(self, state, batch_size)

    @torch.no_grad()
    def round_weights(self) -> Self:
        """Round the matrices of the cells, and of SA-RNN's coordinators, to bfloat16, for inference; their dtype stays.

        One sequence at a time is bound by reading them: the native engine then reads half as much, and sums in float32
        as before. What is rounded stays so. Returns the network.
        """
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16())
        return self

    def to_onnx(self, path: str | Path) -> None:
        """Write the network to an ONNX file, see skiprnn.model.onnx.export."""
        onnx.export(self, path)

    def __prepare_scriptable__(self):
        raise RuntimeError(NO_JIT)  # torch.jit.script asks

    def engine_for(self, x: Tensor) -> str:
        """The engine that runs an input like x, (B, T, I): what "auto" stands for."""
        stack = self.blocks[0][0]
        tied = bool(self.dropout and self.training and len(stack.cells) > 1)
        return engines.choose(self.engine, stack.cells, stack.policy, x, tied)

    def _read(self, x: Any, lengths: Any) -> tuple[Tensor, Tensor | None]:
        """x as (B, T, I) and the lengths, checked."""
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor or a PackedSequence; got {type(x).__name__}")
        if torch.jit.is_tracing():
            raise RuntimeError(NO_JIT)
        if lengths is not None and not isinstance(lengths, Tensor):
            try:
                lengths = torch.tensor(lengths)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"lengths must be integers, one per sequence; got {lengths!r}") from None
        x = x if self.batch_first or x.dim() < 2 else x.transpose(0, 1)
        if x.dim() != 3 or x.shape[-1] != self.input_size or not x.shape[1]:
            layout = "(batch, steps, input)" if self.batch_first else "(steps, batch, input)"
            shape = tuple(x.shape if self.batch_first or x.dim() < 2 else x.transpose(0, 1).shape)
            raise ValueError(f"x must be {layout} with at least one step and {self.input_size} inputs; got {shape}")
        if x.dtype != self.cells[0].weight_ih.dtype:
            raise ValueError(f"x is {x.dtype}, the parameters are {self.cells[0].weight_ih.dtype}: convert one of them")
        if lengths is not None and (lengths.shape != x.shape[:1] or lengths.dtype.is_floating_point):
            raise ValueError(f"lengths must be {x.shape[0]} integers, one per sequence; got {tuple(lengths.shape)}")
        policies = self.policy if self.bidirectional else [self.policy]
        for part in (*self.cells, *policies):  # torch.nn.utils.prune, and weight_norm as it was
            if part._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(part).values()):
                raise ValueError(
                    f"a hook computes weights of {type(part).__name__}, and engines call no hooks: make them permanent "
                    "(torch.nn.utils.prune.remove) or use torch.nn.utils.parametrize"
                )
            if any(hasattr(value, "device_mesh") for value in part._parameters.values()):  # a DTensor
                raise ValueError(
                    f"the weights of {type(part).__name__} are sharded: give fully_shard the whole network, whose "
                    "forward gathers them, and no part of it"
                )
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64)
            x = x.masked_fill(~valid(lengths, x.shape[1]).unsqueeze(2), 0)  # even nan counts for nothing there
        return x, lengths

    def unpack(self, state: Any, batch_size: int) -> list[tuple[list[State], Gate]]:
        """Each stack's per-layer states and gate, from what the caller passed as forward's `state`.

        Raises:
            ValueError: as forward.
        """
        stacks = [stack for block in self.blocks for stack in block]
        gates = [
            stack.policy.initial_gate(batch_size) if isinstance(stack.policy, StepPolicy) else () for stack in stacks
        ]
        gate = tuple(part for one in gates for part in one)
        if state is None:
            states = [cell.initial_state(batch_size) for cell in self.cells]
        else:
            states, gate = unpacked(state, self.cells, gate, batch_size, isinstance(self.hidden_size, int))
        entries, parts = iter(states), iter(gate)
        return [
            ([next(entries) for _ in stack.cells], tuple(next(parts) for _ in own))
            for stack, own in zip(stacks, gates, strict=True)
        ]

    def pack(self, parts: Sequence[tuple[Sequence[State], Gate]]) -> Any:
        """The public form of each stack's per-layer states and gate."""
        gate = tuple(one for _, gate in parts for one in gate)
        return packed([state for states, _ in parts for state in states], gate, isinstance(self.hidden_size, int))

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, batch_first={self.batch_first}"
        rest = {"bias": True, "dropout": 0.0, "bidirectional": False}
        given = [f"{name}={getattr(self, name)}" for name, usual in rest.items() if getattr(self, name) != usual]
        return ", ".join([text, *given])


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, ·) with each sequence's valid steps from the last to the first; what follows them repeats the last."""
    if lengths is None:
        return x.flip(1)
    order = lengths.unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)
    return x.take_along_dim(order.clamp(min=0).unsqueeze(2), 1)


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

        Its policy is new; a learned one starts where everything updates, so fine-tuning starts at the LSTM's function.

        Args:
            lstm: the trained module.
            options: as for the constructor; batch_first, device and dtype are the module's unless given.

        Raises:
            ValueError: the cell is a GRU, or the module has what this network has not: the message names it.
        """
        return torch_lstm.from_torch(cls, lstm, dict(options))


class _OfLSTM(_Named):
    """What type checkers are told of LSTMs, whose state is (h, c); of unequal layers its entries are tuples."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            x: Tensor,
            state: Sequence[Tensor] | None = None,
            lengths: Tensor | Sequence[int] | None = None,
        ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...

        @overload
        def __call__(
            self, x: PackedSequence, state: Sequence[Tensor] | None = None
        ) -> tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence]: ...

        def __call__(self, x, state=None, lengths=None): ...


class _OfGRU(_Named):
    """What type checkers are told of GRUs, whose state is h; of unequal layers a tuple."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            x: Tensor,
            state: Tensor | Sequence[Tensor] | None = None,
            lengths: Tensor | Sequence[int] | None = None,
        ) -> tuple[Tensor, Tensor, Tensor]: ...

        @overload
        def __call__(
            self, x: PackedSequence, state: Tensor | Sequence[Tensor] | None = None
        ) -> tuple[PackedSequence, Tensor, PackedSequence]: ...

        def __call__(self, x, state=None, lengths=None): ...


class LSTM(_OfLSTM):
    """LSTM that updates at every step: the papers' baseline.

    output (T, B, D×H), (h, c) (L×D, B, H) each, updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "lstm", "always"

    def to_torch(self) -> nn.LSTM:
        """The torch.nn.LSTM of the same weights.

        Raises:
            ValueError: torch's has no such thing: initial states other than zeros, layers of unequal sizes.
        """
        return torch_lstm.to_torch(self)


class GRU(_OfGRU):
    """GRU that updates at every step: the papers' baseline, another function than torch.nn.GRU (see GRUCell).

    output (T, B, D×H), h (L×D, B, H), updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "gru", "always"


class RandomSkipLSTM(_OfLSTM):
    """LSTM that skips each step with probability p_skip (0.5): Skip RNN's baseline.

    output (T, B, D×H), (h, c) (L×D, B, H) each, updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "lstm", "random_steps"


class RandomSkipGRU(_OfGRU):
    """GRU that skips each step with probability p_skip (0.5): Skip RNN's baseline.

    output (T, B, D×H), h (L×D, B, H), updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "gru", "random_steps"


class SkipLSTM(_OfLSTM):
    """Skip LSTM ([SKIP]): learns which steps to skip.

    output (T, B, D×H), (h, c) (L×D, B, H) each, updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "lstm", "skip"


class SkipGRU(_OfGRU):
    """Skip GRU ([SKIP]): learns which steps to skip.

    output (T, B, D×H), h (L×D, B, H), updates (T, B) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "gru", "skip"


class SALSTM(_OfLSTM):
    """SA-RNN ([SA]) with an LSTM cell: learns which neurons to update at each step.

    output (T, B, D×H), (h, c) (L×D, B, H) each, updates (T, B, L×D×H) = rnn(x (T, B, I)); the rest: `Recurrent`.
    """

    cell_and_policy = "lstm", "selective"


class SAGRU(_OfGRU):
    """SA-RNN ([SA]) with a GRU cell, as published: learns which neurons to update at each step.

    output (T, B, D×H), h (L×D, B, H), updates (T, B, L×D×H) = rnn(x (T, B, I)). Arguments and methods: `Recurrent`.
    """

    cell_and_policy = "gru", "selective"


CLASSES: dict[tuple[str, str], type[Recurrent]] = {
    kind.cell_and_policy: kind for kind in (LSTM, GRU, RandomSkipLSTM, RandomSkipGRU, SkipLSTM, SkipGRU, SALSTM, SAGRU)
}
