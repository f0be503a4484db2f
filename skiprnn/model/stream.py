"""One sequence, sample by sample: a Skip RNN says how many coming samples it will not look at, so none need be read."""

from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model.policies import Gate, StepPolicy

HORIZON = 10_000  # samples looked ahead: a gate near 0 would skip for ever


class Pushed(NamedTuple):
    """What the network knows after a sample."""

    output: Tensor  # (H,), the top layer's h
    unneeded: int  # coming samples that change nothing ([SKIP] eq. 6), at most HORIZON


class Stream:
    """Runs `rnn` on one endless sequence, without gradients; made by rnn.stream().

    stream = rnn.stream()
    output, unneeded = stream.push(sample)
    stream.skip(unneeded)  # let them pass unread

    A sample that is pushed although it is unneeded counts as skipped.
    """

    def __init__(self, rnn, state=None):
        if not isinstance(rnn.policy, StepPolicy) or rnn.policy.draws:
            raise ValueError(f"a stream needs a policy whose state tells its steps; this is {rnn.policy.name}")
        self.rnn, self.state = rnn, state
        self.output: Tensor | None = None
        self.unneeded = 0 if state is None else len(self._look_ahead(HORIZON))

    @torch.no_grad()
    def push(self, x: Tensor) -> Pushed:
        """The next sample (I,): the output after it, and how many coming samples are not needed."""
        output, self.state, _ = self.rnn(x.reshape(1, 1, -1), self.state)
        self.output = output.reshape(-1)
        self.unneeded = len(self._look_ahead(HORIZON))
        return Pushed(self.output, self.unneeded)

    @torch.no_grad()
    def skip(self, count: int) -> None:
        """Let `count` samples pass unread.

        Raises:
            ValueError: one of them is needed.
        """
        if not 0 <= count <= self.unneeded:
            raise ValueError(f"can skip 0 to {self.unneeded} samples now; got {count}")
        if count:
            ((states, _),) = self.rnn.unpack(self.state, 1)
            self.state = self.rnn.pack([(states, self._look_ahead(count)[-1])])
            self.unneeded = len(self._look_ahead(HORIZON))

    def _look_ahead(self, most: int) -> list[Gate]:
        """The gate after each coming skip, up to `most`; by repeated addition, as everywhere, for exact ties."""
        ((_, gate),) = self.rnn.unpack(self.state, 1)
        gates: list[Gate] = []
        while len(gates) < most:
            accumulated = self.rnn.policy.decide(gate, None)
            if accumulated is None or self.rnn.policy.binarise(accumulated) != 0:
                break
            gate = self.rnn.policy.after_skip(gate, accumulated)
            gates.append(gate)
        return gates
