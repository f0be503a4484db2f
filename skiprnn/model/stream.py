"""Endless sequences, sample by sample: a policy that knows its next steps says how many coming samples it will not look
at, so none of these need be read.
"""

import ctypes
import json
import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model import engines
from skiprnn.model.engines.call import Call
from skiprnn.model.policies import RandomSteps, StepPolicy

HORIZON = 10_000  # samples looked ahead: a gate near 0 would skip for ever
FORMAT = b"skiprnn stream 1\n"  # then one line of JSON, then the tensors it lists


class Pushed(NamedTuple):
    """What the network knows after a sample; of several streams, those that got one, in their order."""

    output: Tensor  # (H,), the top layer's h; or (N, H)
    unneeded: int | Tensor  # coming samples that change nothing ([SKIP] eq. 6), at most HORIZON; or (N,)


class Stream:
    """Runs `rnn` on endless sequences, without gradients; made by rnn.stream().

    stream = rnn.stream()
    output, unneeded = stream.push(sample)
    stream.skip(unneeded)  # let them pass unread

    A sample that is pushed although it is unneeded counts as skipped. Neuron policies need every sample. Of several
    streams, rnn.stream(batch_size=B), each keeps its own time, and only those whose state is updated cost a product:

    output, unneeded = stream.push(samples, which)  # (N, I) for the streams (N,) that have one
    """

    def __init__(self, rnn, state=None, batch_size: int | None = None):
        saved = isinstance(state, bytes)
        if saved:
            found, tensors = _parse(state)
            if batch_size not in (None, found):
                raise ValueError(f"the saved state is of batch_size={found}; got {batch_size}")
            batch_size, state = found, None
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(
                f"batch_size must be the number of streams, or None for one without it; got {batch_size!r}"
            )
        self.rnn, self.batch_size = rnn, batch_size
        count = 1 if batch_size is None else batch_size
        self._read(self._unread(count))  # finds what no stream can have, as sharded weights
        ((states, gate),) = rnn.unpack(state, count)
        self._states = [tuple(entry.detach().clone() for entry in entries) for entries in states]
        self._gate = tuple(part.detach().clone() for part in gate)
        self._skips = torch.zeros(count, dtype=torch.int64)  # of each stream's coming samples, those it will skip
        self._due = torch.ones(count, dtype=torch.bool)  # and whether an update follows, as far as it was looked ahead
        if saved:
            self._load(tensors)
        else:
            self._look_ahead(torch.arange(count))

    @property
    def state(self):
        """What the network remembers, as rnn(x) returns it and takes it; B is 1 for one stream."""
        return self.rnn.pack([(self._states, self._gate)])

    @property
    def output(self) -> Tensor:
        """(H,), the top layer's h now; of several streams (B, H)."""
        return self._of(self._states[-1][0])

    @property
    def unneeded(self) -> int | Tensor:
        """How many coming samples change nothing; of several streams (B,)."""
        return self._of(self._skips)

    @torch.no_grad()
    def push(self, x: Tensor, which: Tensor | Sequence[int] | None = None) -> Pushed:
        """The next sample of the stream, or of some streams.

        Args:
            x: (I,); of several streams (N, I).
            which: (N,) integers, the streams that the samples belong to, each once; None: all B.

        Raises:
            ValueError: sizes, dtypes or streams that do not fit.
        """
        rows = self._rows(which)
        if not isinstance(x, Tensor):
            raise ValueError(f"a stream's samples must be a tensor; got {type(x).__name__}")
        x = x.unsqueeze(0) if self.batch_size is None else x
        if tuple(x.shape) != (len(rows), self.rnn.input_size):
            wanted = (self.rnn.input_size,) if self.batch_size is None else (len(rows), self.rnn.input_size)
            shape = tuple(x.shape[1:] if self.batch_size is None else x.shape)
            raise ValueError(f"a stream's samples must be {wanted}; got {shape}")
        x = self._read(x.unsqueeze(1))
        update = self._skips[rows] == 0
        if not update.all():
            self._pass(rows[~update], torch.ones(int((~update).sum()), dtype=torch.int64))
        if update.any():
            self._update(rows[update], x[update.to(x.device)])
        return Pushed(self._of(self._states[-1][0][rows]), self._of(self._skips[rows]))

    @torch.no_grad()
    def skip(self, count: int | Tensor | Sequence[int], which: Tensor | Sequence[int] | None = None) -> None:
        """Let `count` samples pass unread, of several streams as many of each, or (N,) as many as said of each.

        Raises:
            ValueError: one of them is needed.
        """
        rows = self._rows(which)
        counts = torch.as_tensor(count, dtype=torch.int64).expand(len(rows))
        if not ((counts >= 0) & (counts <= self._skips[rows])).all():
            raise ValueError(f"can skip 0 to {self._of(self._skips[rows])} samples now; got {count}")
        self._pass(rows, counts)

    def to_bytes(self) -> bytes:
        """The whole state: rnn.stream(these bytes) continues, in another process as well, with the same weights."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        body = b"".join(ctypes.string_at(tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())
        listed = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
        content = json.dumps({"batch_size": self.batch_size, "tensors": listed}).encode() + b"\n" + body
        return FORMAT + b"%08x\n" % zlib.crc32(content) + content

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what to_bytes saved."""
        own = self._tensors()
        for name in own | tensors:
            ours, theirs = (
                f"{tensor.dtype} {tuple(tensor.shape)}" if tensor is not None else "nothing"
                for tensor in (own.get(name), tensors.get(name))
            )
            if ours != theirs:
                raise ValueError(f"the saved state is of another network: {name} is {theirs}, here {ours}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes, by name."""
        policy, names = self.rnn.policy, self.rnn.cells[0].state_names
        states = {
            f"{name} of layer {layer}": entry
            for layer, entries in enumerate(self._states)
            for name, entry in zip(names, entries, strict=True)
        }
        return states | {
            **dict(zip(getattr(policy, "gate_names", ()), self._gate, strict=True)),
            f"skips of {policy.name}": self._skips,
            f"due of {policy.name}": self._due,
        }

    def _of(self, tensor: Tensor):
        """As the caller sees it, who has one stream or several."""
        if self.batch_size is not None:
            return tensor.clone()
        return tensor[0].clone() if tensor.dim() > 1 else int(tensor)

    def _rows(self, which) -> Tensor:
        if which is None:
            return torch.arange(len(self._skips))
        rows = torch.as_tensor(which, dtype=torch.int64).cpu()
        if self.batch_size is None or rows.dim() != 1 or len(rows.unique()) != len(rows):
            raise ValueError(f"which must be streams of a batch, each once; got {which}, of {self.batch_size}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.batch_size:
            raise ValueError(f"which must be streams 0 to {self.batch_size - 1}; got {which}")
        return rows

    def _read(self, x: Tensor) -> Tensor:
        """(N, 1, I), checked."""
        return self.rnn._read(x if self.rnn.batch_first else x.transpose(0, 1), None)[0]

    def _unread(self, count: int) -> Tensor:
        """(count, 1, I): samples that nobody looks at."""
        weight = self.rnn.cells[0].weight_ih
        return torch.empty(count, 1, self.rnn.input_size, dtype=weight.dtype, device=weight.device)

    def _update(self, rows: Tensor, x: Tensor) -> None:
        """A step of streams that need it."""
        rnn = self.rnn
        states = [tuple(entry[rows] for entry in entries) for entries in self._states]
        if isinstance(rnn.policy, RandomSteps):  # drawn when it looked ahead
            draw = x.new_ones(x.shape[:2])
        else:
            draw = rnn.policy.draw(x, sum(cell.hidden_size for cell in rnn.cells))
        call = Call(rnn.cells, rnn.policy, x, states, tuple(part[rows] for part in self._gate), draw)
        result = engines.ENGINES[rnn.engine_for(x)].run(call)
        for entries, after in zip(self._states, result.states, strict=True):
            for entry, new in zip(entries, after, strict=True):
                entry[rows] = new
        for part, new in zip(self._gate, result.gate, strict=True):
            part[rows] = new
        self._look_ahead(rows)

    def _pass(self, rows: Tensor, counts: Tensor) -> None:
        """Steps of streams that skip them, so many of each."""
        policy, gate = self.rnn.policy, tuple(part[rows] for part in self._gate)
        for passed in range(int(counts.max()) if gate and len(rows) else 0):
            going = (counts > passed).unsqueeze(1).to(gate[0].device)
            after = policy.after_skip(gate, policy.decide(gate, None))
            gate = tuple(torch.where(going, new, old) for new, old in zip(after, gate, strict=True))
        for part, new in zip(self._gate, gate, strict=True):
            part[rows] = new
        self._skips[rows] -= counts
        beyond = rows[(self._skips[rows] == 0) & ~self._due[rows]]
        if len(beyond):
            self._look_ahead(beyond)

    def _look_ahead(self, rows: Tensor) -> None:
        """Find how many samples these streams will skip; by repeated addition, as everywhere, for exact ties."""
        policy = self.rnn.policy
        if not isinstance(policy, StepPolicy) or (policy.draws and not isinstance(policy, RandomSteps)):
            return
        gate = tuple(part[rows] for part in self._gate)
        unread = self._unread(len(rows))
        skips, going = torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows), dtype=torch.bool)
        for _ in range(HORIZON):
            accumulated = policy.decide(gate, policy.draw(unread, 0))
            if accumulated is None:
                going[:] = False
                break
            going &= (policy.binarise(accumulated) == 0).flatten().cpu()
            if not going.any():
                break
            gate = policy.after_skip(gate, accumulated)
            skips += going
        self._skips[rows], self._due[rows] = skips, ~going


def _parse(data: bytes) -> tuple[int | None, dict[str, Tensor]]:
    """The batch size and the tensors that to_bytes wrote.

    Raises:
        ValueError: it wrote no such bytes.
    """
    try:
        digest, content = data.removeprefix(FORMAT).split(b"\n", 1)
        if not data.startswith(FORMAT) or int(digest, 16) != zlib.crc32(content):
            raise ValueError
        header, body = content.split(b"\n", 1)
        said = json.loads(header)
        tensors, start = {}, 0
        for name, (dtype, *shape) in said["tensors"].items():
            kind = getattr(torch, dtype)
            part = bytearray(body[start : start + math.prod(shape) * kind.itemsize])
            flat = torch.frombuffer(part, dtype=kind) if part else torch.empty(0, dtype=kind)
            tensors[name] = flat.view(shape)
            start += len(part)
        return said["batch_size"], tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise ValueError(
            f"these {len(data)} bytes are damaged, or not what this version's Stream.to_bytes writes"
        ) from None
