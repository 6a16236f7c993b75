"""What comes at once for many steps, shared out over as many steps of its owner.

A gradient that was summed over an interval stands for many steps of those who sent it. Taken into one step it would
count as one: an optimizer weighs each step's mean gradient alike, of however many tokens it is a mean, and in all other
steps the owner would learn from its own tokens alone. So each step takes a share, of the gradient and of its tokens,
until the sender's next one is there. That is in proportion, and late by one interval.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Gradient(Protocol):
    """A summed gradient of an expert."""

    def small(self) -> Gradient:
        """In little memory."""
        ...

    def dense(self) -> tuple[Tensor, Tensor]:
        """d gate_up (2F, D) and d down (D, F), float32."""
        ...


@dataclass(frozen=True)
class SummedGradient:
    """The matrices themselves, of any dtype."""

    d_gate_up: Tensor
    d_down: Tensor

    def small(self) -> SummedGradient:
        """In bfloat16."""
        return SummedGradient(self.d_gate_up.to(torch.bfloat16), self.d_down.to(torch.bfloat16))

    def dense(self) -> tuple[Tensor, Tensor]:
        """As `Gradient`."""
        return self.d_gate_up.float(), self.d_down.float()


@dataclass
class Share:
    """What one gradient adds to each step.

    Attributes:
        sender: whose it is.
        gradient: all of it.
        steps: to share it out over.
        tokens: of one step.
        rows: 0 if none was routed to the expert.
        left: steps that are still to take theirs.
    """

    sender: str
    gradient: Gradient
    steps: int
    tokens: float
    rows: int
    left: int


@dataclass
class Shares:
    """Of one expert.

    Args:
        interval: steps for which a sender's first gradient lasts. Later ones last for as many as the owner took since
            the one before, at most twice the interval: it may be faster or slower than the sender.
    """

    interval: int
    _steps: int = 0  # of the owner, ever
    _heard: dict[str, int] = field(default_factory=dict)  # by sender, the owner's steps then
    _shares: list[Share] = field(default_factory=list)

    def put(self, sender: str, gradient: Gradient, *, tokens: float, rows: int) -> None:
        """From the next step on, in place of what is left of the sender's last one, if that was in any."""
        since = self._steps - self._heard.get(sender, self._steps - self.interval)
        if since:
            self._shares = [share for share in self._shares if share.sender != sender]
        steps = min(max(1, since), 2 * self.interval)
        self._heard[sender] = self._steps
        self._shares.append(Share(sender, gradient.small(), steps, tokens / steps, rows, steps))

    def of_step(self) -> list[Share]:
        """What the step that is being taken is to learn from."""
        self._steps += 1
        forgotten = self._steps - 4 * self.interval
        self._heard = {sender: at for sender, at in self._heard.items() if at >= forgotten}
        now = self._shares
        for share in now:
            share.left -= 1
        self._shares = [share for share in now if share.left]
        return now
