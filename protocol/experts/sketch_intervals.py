"""Which interval gradient sketches are of. Pure: openings heard and rounds' ends in, numbers out.

    interval n   what composers collect until it is opened, under projections that all seed alike
    open n       said by the first composer that has collected for long enough: all bring what they have, n + 1 begins

Sketches add up only under one seed, so composers must agree on the number. A newcomer does not know it: it believes the
first opening that it hears. From then on an opening may skip a few intervals, for openings are lost, but not many.
That nobody strays for good, be it by a split or by a liar's numbers: who has taken part, or was asked to, several times
in a row without one complete round, is a newcomer again. Until then it loses the intervals that it collects, no more.
"""

from __future__ import annotations

import hashlib
from enum import Enum

AHEAD = 64  # intervals that an opening may skip
STRIKES = 3  # openings in a row without a complete round, after which a peer doubts its number
SEED_BYTES = 16

_SEED_DOMAIN = b"shoal-sketch"


def interval_seed(run_id: str, interval: int) -> int:
    """Seed of an interval's projections, below 2¹²⁸: the same for all peers, another for each interval."""
    name = f"{run_id} {interval}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=SEED_BYTES, person=_SEED_DOMAIN).digest())


class Heard(Enum):
    """What an opening means to who hears it."""

    OPEN = "open"  # take part now
    KNOWN = "known"  # the last one, opened by several at the same time
    STALE = "stale"  # opened before, by the count here
    FAR_AHEAD = "far-ahead"  # refused


class Intervals:
    """One peer's count.

    Args:
        limit: intervals from here on do not exist.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.next = 0  # the interval to be opened next, which is being collected now
        self._sure = False
        self._strikes = 0

    def open(self, interval: int) -> bool:
        """Open the interval that was collected here. False if it is not the next one: nobody would come."""
        if interval != self.next or interval >= self._limit:
            return False
        self._begin(interval)
        return True

    def hear(self, interval: int) -> Heard:
        """Another composer opens an interval."""
        if interval >= self._limit:
            return Heard.FAR_AHEAD
        if interval == self.next - 1:
            return Heard.KNOWN
        if self._sure and not self.next <= interval <= self.next + AHEAD:
            self._strike()
            return Heard.STALE if interval < self.next else Heard.FAR_AHEAD
        if not self._sure:
            self._sure, self._strikes = True, 0
        self._begin(interval)
        return Heard.OPEN

    def completed(self) -> None:
        """A round of the last interval was complete: others count like this peer."""
        self._sure, self._strikes = True, 0

    def _begin(self, interval: int) -> None:
        self.next = interval + 1
        self._strike()

    def _strike(self) -> None:
        self._strikes += 1
        if self._strikes > STRIKES:
            self._sure = False
