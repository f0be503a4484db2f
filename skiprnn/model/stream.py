"""One sequence, sample by sample: a Skip RNN says how many coming samples it will not look at, so none need be read."""

from typing import NamedTuple

import torch
from torch import Tensor

from skiprnn.model.policies import Always, Skip

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
        if not isinstance(rnn.policy, (Always, Skip)):
            raise ValueError(f"a stream needs policy skip or always; this is {type(rnn.policy).__name__}")
        self.rnn, self.state = rnn, state
        self.output: Tensor | None = None
        self.unneeded = 0 if state is None else self._look_ahead()

    @torch.no_grad()
    def push(self, x: Tensor) -> Pushed:
        """The next sample (I,): the output after it, and how many coming samples are not needed."""
        output, self.state, _ = self.rnn(x.reshape(1, 1, -1), self.state)
        self.output = output.reshape(-1)
        self.unneeded = self._look_ahead()
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
            accumulated = self._accumulate(count)[-1]
            self.state = self.state._replace(cum_update_prob=accumulated)
            self.unneeded = self._look_ahead()

    def _look_ahead(self) -> int:
        return len(self._accumulate(HORIZON)) if isinstance(self.rnn.policy, Skip) else 0

    def _accumulate(self, most: int) -> list[Tensor]:
        """cum_update_prob after each coming skip, up to `most`; by repeated addition, as everywhere, for exact ties."""
        sums: list[Tensor] = []
        q, s = self.state.update_prob, self.state.cum_update_prob
        while len(sums) < most:
            s = self.rnn.policy.decide((q, s), None)
            if torch.round(s) > 0:
                break
            sums.append(s)
        return sums
