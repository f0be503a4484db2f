"""A network as an ONNX file: one Scan over the steps, whatever their number, and what a skipped step leaves out is
behind an If. With one sequence, ONNX Runtime so computes what is updated; of several, a step is skipped if all skip it.
What updates always is ONNX's own LSTM or GRU; in a Scan the equations are written out, for ONNX Runtime takes longer
for its LSTM one step at a time.

Needs the package onnx. Shapes: B batch, T steps, I input, H hidden of a layer.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from skiprnn.model.cells import Cell, GRUCell, LSTMCell, reordered
from skiprnn.model.engines.call import unknown
from skiprnn.model.policies import Always, Policy, Selective, Skip

OPSET, IR_VERSION = 17, 8  # ONNX 1.12, of 2022
OPERATORS: dict[type[Cell], tuple[str, Sequence[str]]] = {  # of the same equations, and its gates in their order
    LSTMCell: ("LSTM", ("i", "o", "f", "j")),
    GRUCell: ("GRU", ("z", "r", "candidate")),
}


def export(rnn, path: str | Path) -> None:
    """Write a network, as it is, to an ONNX file.

    Inputs: x (T, B, I), or (B, T, I) of a batch_first network; and optional (ONNX Runtime says that it folds none of
    them into the graph), to continue from: h.0, c.0, h.1 and so on, (B, H) or (1, H) of each layer, and the gate's
    update_prob and cum_update_prob, (B, 1) or (1, 1). Outputs: output and updates as the network's; what to continue
    from after the last step, as next.h.0 and so on. All steps count. Of a bidirectional network both directions of a
    layer follow each other in these numbers, and its gates are numbered likewise: update_prob.0, ...

    Args:
        rnn: an LSTM or GRU that updates always, by Skip RNN or by SA-RNN, in float32.
        path: the file; what it held is replaced when all is done.

    Raises:
        ValueError: onnx is not installed, or the network is of another kind.
    """
    try:
        import onnx  # here, for the model needs torch alone
    except ModuleNotFoundError:
        raise ValueError("ONNX files need the package onnx: pip install 'skiprnn[onnx]'") from None
    stacks = [stack for block in rnn.blocks for stack in block]
    dtype = rnn.cells[0].weight_ih.dtype
    reason = next(filter(None, (unknown(stack.cells, stack.policy) for stack in stacks)), None)
    if reason is None and stacks[0].policy.draws:
        reason = "its policy draws at random"
    if reason is None and dtype != torch.float32:  # ONNX Runtime's LSTM has no other
        reason = f"its parameters are {dtype}: convert it to float32"
    if reason is not None:
        raise ValueError(f"this {type(rnn).__name__} cannot become an ONNX file: {reason}")
    model = _Writer(onnx, rnn).model()
    onnx.checker.check_model(model, full_check=True)
    unfinished = Path(f"{path}.unfinished")
    try:
        unfinished.write_bytes(model.SerializeToString())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Nodes:
    """The nodes of a graph in the making; each is a call that gives the name of its output."""

    def __init__(self, onnx, numbers):
        self.onnx, self.numbers, self.nodes = onnx, numbers, []

    def __call__(self, operator: str, *inputs: str, outputs: Any = (), **attributes: Any) -> Any:
        names = list(outputs) or [f"{operator}.{next(self.numbers)}"]
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), names, **attributes))
        return names[0]


class _Stack(NamedTuple):
    """Layers under one policy, and what their states and their gate are called."""

    layers: list[tuple[int, Cell, list[str]]]  # number, cell, names of the state's entries
    policy: Policy
    gate: list[str]
    reverse: bool

    @property
    def states(self) -> list[str]:
        return [name for _, _, names in self.layers for name in names]


class _Writer:
    def __init__(self, onnx, rnn):
        self.onnx, self.rnn, self.constants, self.numbers = onnx, rnn, {}, itertools.count()
        self.kind = onnx.TensorProto.FLOAT
        self.blocks: list[list[_Stack]] = []
        layers, stacks = itertools.count(), itertools.count()
        for block in rnn.blocks:
            self.blocks.append([])
            for cells, policy, reverse in block:
                named = [
                    (n, cell, [f"{name}.{n}" for name in cell.state_names]) for cell in cells for n in [next(layers)]
                ]
                end = f".{next(stacks)}" if rnn.bidirectional else ""
                gate = [f"{name}{end}" for name in getattr(policy, "gate_names", ())]
                self.blocks[-1].append(_Stack(named, policy, gate, reverse))
        self.half, self.unit, self.zero = (self.constant(f"{n}", n) for n in (0.5, 1.0, 0.0))

    def constant(self, name: str, value: Tensor | float) -> str:
        """A number, or a tensor, that all graphs see."""
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu().contiguous()
        self.constants[name] = self.onnx.helper.make_tensor(name, self.kind, tensor.shape, tensor.flatten().tolist())
        return name

    def value(self, name: str, *shape: str | int | None) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, self.kind, shape)

    def model(self) -> Any:
        """The whole file."""
        rnn, helper, main = self.rnn, self.onnx.helper, _Nodes(self.onnx, self.numbers)
        x = main("Transpose", "x", perm=[1, 0, 2]) if rnn.batch_first else "x"
        for name, number in (("first", 0), ("one", 1)):
            self.constants[name] = helper.make_tensor(name, self.onnx.TensorProto.INT64, [1], [number])
        shape = main("Concat", main("Shape", x, start=1, end=2), "one", axis=0)
        axes = ("B", "T") if rnn.batch_first else ("T", "B")
        inputs, after, updates = [self.value("x", *axes, rnn.input_size)], [], []
        parts = iter(rnn.unpack(None, 1))
        for block in self.blocks:
            outputs = []
            for stack in block:
                states, gate = next(parts)
                firsts = [*(entry for state in states for entry in state), *gate]
                names = [*stack.states, *stack.gate]
                for name, first in zip(names, firsts, strict=True):
                    self.constant(name, first)
                    inputs.append(self.value(name, "B or 1", first.shape[1]))
                    after.append(self.value(f"next.{name}", "B", first.shape[1]))
                begin = [main("Expand", name, shape) for name in names]
                ends = [f"next.{name}" for name in names]
                if isinstance(stack.policy, Always):
                    output = self.chain(main, stack, x, begin, ends)
                    every = main("Concat", main("Shape", output, start=0, end=2), "one", axis=0)
                    decided = main("Expand", self.unit, every)
                else:
                    output, decided = (f"{what}.{next(self.numbers)}" for what in ("output", "updates"))
                    reverse = int(stack.reverse)
                    scan: dict[str, Any] = {"scan_input_directions": [reverse], "scan_output_directions": [reverse] * 2}
                    scan |= {"body": self.body(stack), "num_scan_inputs": 1}
                    main("Scan", *begin, x, outputs=[*ends, output, decided], **scan)
                outputs.append(output)
                updates.append(decided)
            x = main("Concat", *outputs, axis=2)
        order = {"perm": [1, 0, 2] if rnn.batch_first else [0, 1, 2]}
        main("Transpose", x, outputs=["output"], **order)
        decisions = main("Transpose", main("Concat", *updates, axis=2), **order)
        one_gate = not rnn.bidirectional and rnn.policy.family == "step"
        if one_gate:  # (B, T, 1)
            main("Squeeze", decisions, main("Add", "one", "one"), outputs=["updates"])
        else:
            main("Identity", decisions, outputs=["updates"])
        results = [self.value("output", *axes, None), self.value("updates", *axes, *[None] * (not one_gate)), *after]
        graph = helper.make_graph(main.nodes, type(rnn).__name__, inputs, results, [*self.constants.values()])
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, producer_name="skiprnn", opset_imports=opsets, ir_version=IR_VERSION)

    def chain(self, main: _Nodes, stack: _Stack, x: str, begin: Sequence[str], ends: Sequence[str]) -> str:
        """Layers that update always, by ONNX's own operators: the top layer's output (T, B, H). Writes `ends`."""
        done = 0
        for number, cell, names in stack.layers:
            operator, order = OPERATORS[type(cell)]

            def block(name: str, weight: Tensor, number=number, cell=cell, order=order) -> str:
                """A constant (1, G*H, ·), whose gates are in the operator's order."""
                return self.constant(f"{name}.{number}", reordered(weight, cell.gates, order)[None])

            weights = block("weight_ih", cell.weight_ih), block("weight_hh", cell.weight_hh)
            added = self.constant(f"none.{number}", torch.zeros(1, len(cell.total_bias)))  # there are two biases
            bias = main("Concat", block("bias", cell.total_bias), added, axis=1)
            states = [main("Unsqueeze", name, "first") for name in begin[done : done + len(names)]]
            results = [f"{operator}.{next(self.numbers)}" for _ in range(1 + len(names))]
            options = {"hidden_size": cell.hidden_size, "direction": "reverse" if stack.reverse else "forward"}
            main(operator, x, *weights, bias, "", *states, outputs=results, **options)
            for result, end in zip(results[1:], ends[done:], strict=False):
                main("Squeeze", result, "first", outputs=[end])
            x, done = main("Squeeze", results[0], "one"), done + len(names)
        return x

    def body(self, stack: _Stack) -> Any:
        """One step: what is carried, and x (B, I), to what is carried, the top layer's h and the decisions."""
        step = _Nodes(self.onnx, self.numbers)
        after = self.by_neuron(step, stack) if isinstance(stack.policy, Selective) else self.by_step(step, stack)
        given = [self.value(name, None, None) for name in (*stack.states, *stack.gate)]
        given.append(self.value("x.t", None, stack.layers[0][1].input_size))
        after[-2] = step("Identity", after[-2])  # the output is a state as well
        return self.onnx.helper.make_graph(step.nodes, "step", given, [self.value(name, None, None) for name in after])

    def by_step(self, step: _Nodes, stack: _Stack) -> list[str]:
        policy, entries = cast(Skip, stack.policy), len(stack.layers[-1][2])

        def compute(nodes: _Nodes) -> list[str]:
            below, candidates = "x.t", []
            for number, cell, names in stack.layers:
                candidates += self.candidate(nodes, number, cell, below, names)
                below = candidates[-entries]
            return candidates

        q, s = stack.gate
        accumulated = step("Add", s, step("Min", q, step("Sub", self.unit, s)))
        u = step("Greater", accumulated, self.half)
        weight = self.constant(f"weight of {q}", policy.weight.reshape(-1, 1))
        bias = self.constant(f"bias of {q}", policy.bias.reshape(1, 1))

        def update(nodes: _Nodes) -> list[str]:
            new = compute(nodes)
            proposed = nodes("Sigmoid", nodes("Add", nodes("MatMul", new[-1], weight), bias))
            return [nodes("Where", u, *pair) for pair in zip([*new, proposed], [*stack.states, q], strict=True)]

        *states, q_after = self.if_any(step, accumulated, update, [*stack.states, q])
        s_after = step("Where", u, self.zero, accumulated)
        return [*states, q_after, s_after, states[-entries], step("Where", u, self.unit, self.zero)]

    def by_neuron(self, step: _Nodes, stack: _Stack) -> list[str]:
        policy, below, after, decisions = cast(Selective, stack.policy), "x.t", [], []
        for (number, cell, names), coordinator in zip(stack.layers, policy.coordinators, strict=True):
            weight = self.constant(f"coordinator.{number}.input", coordinator.weight_input)
            bias = self.constant(f"coordinator.{number}.bias", coordinator.bias)
            state = step("Mul", names[0], self.constant(f"coordinator.{number}.state", coordinator.weight_state))
            a = step("Add", step("Gemm", below, weight, bias, transB=1), state)
            slope = self.constant(f"slope.{number}", policy.slope)
            ramp = step("Mul", step("Add", step("Mul", a, slope), self.unit), self.half)
            u = step("Greater", ramp, self.half)

            def update(nodes: _Nodes, number=number, cell=cell, below=below, names=names, u=u) -> list[str]:
                new = self.candidate(nodes, number, cell, below, names)
                return [nodes("Where", u, *pair) for pair in zip(new, names, strict=True)]

            updated = self.if_any(step, ramp, update, names)
            decisions.append(step("Where", u, self.unit, self.zero))
            below = updated[0]
            after += updated
        return [*after, below, step("Concat", *decisions, axis=1)]

    def if_any(
        self, step: _Nodes, numbers: str, update: Callable[[_Nodes], list[str]], before: Sequence[str]
    ) -> list[str]:
        """What `update` gives if any of the numbers is above a half, else `before`."""
        graphs = {}
        for branch in ("then_branch", "else_branch"):
            nodes = _Nodes(self.onnx, self.numbers)
            names = update(nodes) if branch == "then_branch" else [nodes("Identity", name) for name in before]
            values = [self.value(name, None, None) for name in names]
            graphs[branch] = self.onnx.helper.make_graph(nodes.nodes, branch, [], values)
        some = step("Greater", step("ReduceMax", numbers, keepdims=0), self.half)
        results = [f"{numbers}.{number}" for number in range(len(before))]
        step("If", some, outputs=results, **graphs)
        return results

    def candidate(self, nodes: _Nodes, number: int, cell: Cell, x: str, names: Sequence[str]) -> list[str]:
        """A cell's candidate state, entry by entry."""
        size = cell.hidden_size

        def product(first: int, last: int, state: str, part: str) -> str:
            """Pre-activations of the gates from `first` to before `last`."""
            rows = slice(first * size, last * size)
            weight_ih = self.constant(f"weight_ih.{number}.{part}", cell.weight_ih[rows].T)
            weight_hh = self.constant(f"weight_hh.{number}.{part}", cell.weight_hh[rows].T)
            bias = self.constant(f"bias.{number}.{part}", cell.total_bias[rows])
            return nodes("Gemm", state, weight_hh, nodes("Gemm", x, weight_ih, bias))

        def split(gates: str, count: int) -> list[str]:
            parts = [f"{gates}.{index}" for index in range(count)]
            nodes("Split", gates, outputs=parts, axis=1)
            return parts

        h = names[0]
        if isinstance(cell, LSTMCell):
            i, j, f, o = split(product(0, 4, h, "gates"), 4)
            kept = nodes("Mul", names[1], nodes("Sigmoid", f))
            c = nodes("Add", kept, nodes("Mul", nodes("Sigmoid", i), nodes("Tanh", j)))
            return [nodes("Mul", nodes("Tanh", c), nodes("Sigmoid", o)), c]
        r, z = split(nodes("Sigmoid", product(0, 2, h, "gates")), 2)
        new = nodes("Tanh", product(2, 3, nodes("Mul", r, h), "candidate"))
        return [nodes("Add", new, nodes("Mul", z, nodes("Sub", h, new)))]
