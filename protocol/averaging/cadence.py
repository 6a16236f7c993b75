"""When each fragment of the backbone is due, and how long its round waits for who is late. Pure.

    fragment f of P     due at its own H inner steps, H being its tier's, offset so that the P do not come at once
    round r             merges fragment r mod P, so each fragment counts rounds of its own: f, f + P, f + 2P, ...
    round               [ until a quorum is there | grace for stragglers | all-reduce and votes ]
                        <------------------ overlap: so many inner steps, if it can be ------->

Training goes on all the while. A round that takes longer than the overlap costs nothing but freshness, and one that
leaves somebody behind costs that member's work of one round; between the two lies the grace.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """One fragment is due at inner steps `offset`, `offset + every`, ... of whichever composer comes to one first."""

    every: int
    offset: int

    @classmethod
    def of(cls, index: int, fragments: int, every: int) -> Cadence:
        """Of fragment `index` of `fragments`, each merged once per `every` steps."""
        return cls(every, max(1, (index + 1) * every // fragments))

    def before(self, step: int) -> int:
        """The last due step at or before `step`; before the first one, `offset - every`."""
        return self.offset + (step - self.offset) // self.every * self.every

    def nearest(self, step: int) -> int:
        """The due step that a round begun at `step` stands for.

        Composers are some steps apart: who joins a round shortly before its own due step has done that one.
        """
        return self.before(step + self.every // 2)


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
