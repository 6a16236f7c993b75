"""When each fragment of the backbone is due, and how long its round waits for who is late. Pure.

    fragment f of P     due every H inner steps, H being its tier's, offset so that the P do not come at once
    round r             merges fragment r mod P, so each fragment counts rounds of its own: f, f + P, f + 2P, ...
    round               [ until a quorum is there | grace for stragglers | all-reduce and votes ]
                        <------------------ overlap: so many inner steps, if it can be ------->

Training goes on all the while. A round that takes longer than the overlap costs nothing but freshness, and one that
leaves somebody behind costs that member's work of one round; between the two lies the grace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """One fragment is due every H inner steps of whichever composer comes to one first.

    Attributes:
        every: H at the first step.
        offset: the first due step.
        growth: H at step `steps` over that at the first, neither below 1. In between it changes evenly, then it stays.
        steps: of the run.
    """

    every: int
    offset: int
    growth: float = 1.0
    steps: int = 1

    @classmethod
    def of(cls, index: int, fragments: int, every: int, growth: float = 1.0, steps: int = 1) -> Cadence:
        """Of fragment `index` of `fragments`, each merged once per `every` steps at first."""
        return cls(every, max(1, (index + 1) * every // fragments), growth, steps)

    def before(self, step: int) -> int:
        """The last due step at or before `step`; before the first one, `offset - every`."""
        return self._due(self._number(step))

    def after(self, step: int) -> int:
        """The first due step after `step`."""
        return self._due(self._number(step) + 1)

    def nearest(self, step: int) -> int:
        """The due step that a round begun at `step` stands for.

        Composers are some steps apart: who joins a round shortly before its own due step has done that one.
        """
        last, following = self.before(step), self.after(step)
        return following if following - step <= (following - last) // 2 else last

    def _number(self, step: int) -> int:
        """Of `before(step)`, the first due step having number 0."""
        number = math.ceil((self._slowed(step) - self._slowed(self.offset)) / self.every) + 1
        while self._due(number) > step:
            number -= 1
        return number

    def _due(self, number: int) -> int:
        if self.growth == 1.0:
            return self.offset + number * self.every
        slowed = self._slowed(self.offset) + number * self.every
        faster, whole = (self.growth - 1) / self.steps, self._slowed(self.steps)
        if slowed > whole:
            exact = self.steps + (slowed - whole) * self.growth
        else:
            exact = slowed if slowed < 0 else math.expm1(slowed * faster) / faster
        return math.floor(exact + 0.5)  # what is one apart stays so, which `round` does not grant

    def _slowed(self, step: int) -> float:
        """Steps by a clock that goes slower as H grows: there is a round whenever `every` of them have passed."""
        if self.growth == 1.0 or step <= 0:
            return step
        faster, within = (self.growth - 1) / self.steps, min(step, self.steps)
        return math.log1p(within * faster) / faster + (step - within) / self.growth


class MovingAverage:
    """An exponential moving average; None before the first value."""

    def __init__(self, weight: float) -> None:
        self.value: float | None = None
        self._weight = weight

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + self._weight * (value - self.value)


class Grace:
    """How long a round that has its quorum waits for the others, from what steps and rounds took lately.

    Args:
        overlap: inner steps that a round may take without being late.
        longest: seconds; also what is granted as long as nothing is known.
    """

    def __init__(self, overlap: int, longest: float) -> None:
        self._overlap, self._longest = overlap, longest
        self._step, self._quorum, self._sync = MovingAverage(0.1), MovingAverage(0.25), MovingAverage(0.25)

    def took_step(self, seconds: float) -> None:
        """One inner step."""
        self._step.add(seconds)

    def took_round(self, quorum: float, sync: float) -> None:
        """A committed round: seconds until a quorum had met, and from the start of the all-reduce to the commit."""
        self._quorum.add(quorum)
        self._sync.add(sync)

    @property
    def seconds(self) -> float:
        """At least as long as one step: most who are late are in the middle of one."""
        step, quorum, sync = self._step.value, self._quorum.value, self._sync.value
        if step is None or quorum is None or sync is None:
            return self._longest
        return min(self._longest, max(step, self._overlap * step - quorum - sync))
