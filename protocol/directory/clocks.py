"""Whether this machine's clock goes with its peers'. Leases, votes and the DHT compare wall clocks.

Two witnesses. Every signed record says when it was issued: what comes by gossip tells how far clocks are apart, whether
or not the record's times let it in. And the machine's monotonic clock shows at once that the wall clock has jumped,
before any peer can be heard: what was learned until then counts no more. Nor does it after a sleep that both clocks
went on through, as of a container that was paused. What comes first then has waited all the while: a peer counts once
it has been heard for some seconds.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from .records import MAX_CLOCK_AHEAD_SECONDS

logger = logging.getLogger(__name__)

MAX_APART_SECONDS = MAX_CLOCK_AHEAD_SECONDS  # beyond it, one side refuses what the other says
ASLEEP_SECONDS = 15.0  # without a look at the clocks, which a peer that runs takes every second
_RECENT_SECONDS = 60.0  # a peer counts with what took the shortest way in this time
_SILENT_SECONDS = 150.0  # a peer that was not heard for so long counts no more; it would speak more often
_WAITING_SECONDS = 5.0  # in which what has waited for this machine to wake is all read, and more has come
_PER_PEER = 16
_MAX_PEERS = 10_000  # so that invented identities cannot exhaust memory


@dataclass
class _Heard:
    """Of one peer."""

    since: float  # monotonic seconds
    last: float
    offsets: deque[tuple[float, float]] = field(default_factory=deque)  # (when, issued minus arrival), ever smaller


class Clocks:
    """What one peer knows of its own and others' clocks.

    Args:
        wall: unix seconds.
        monotonic: seconds.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._apart = wall() - monotonic()
        self._looked_at = monotonic()
        self._jumped_at = -math.inf  # monotonic seconds
        self._heard: dict[str, _Heard] = {}

    def heard(self, sender: str, issued_at: float) -> None:
        """A record that `sender` signed has just come. A replay is taken for a slow one, which counts for nothing."""
        self._look()
        now, offset = self._monotonic(), issued_at - self._wall()
        heard = self._heard.get(sender)
        if heard is None:
            if len(self._heard) >= _MAX_PEERS:
                return
            heard = self._heard[sender] = _Heard(now, now)
        heard.last, offsets = now, heard.offsets
        while offsets and (offsets[-1][1] <= offset or len(offsets) >= _PER_PEER):
            offsets.pop()
        offsets.append((now, offset))

    def ahead(self) -> dict[str, float]:
        """By peer, the seconds that its clock seems ahead of ours; low by what its fastest recent record took."""
        self._look()
        now = self._monotonic()
        self._heard = {peer: heard for peer, heard in self._heard.items() if heard.last >= now - _SILENT_SECONDS}
        for heard in self._heard.values():
            while len(heard.offsets) > 1 and heard.offsets[0][0] < now - _RECENT_SECONDS:
                heard.offsets.popleft()
        known = {peer: heard for peer, heard in self._heard.items() if heard.last - heard.since >= _WAITING_SECONDS}
        return {peer: heard.offsets[0][1] for peer, heard in known.items()}

    def offset(self) -> float | None:
        """Seconds that the swarm's clocks seem ahead of ours: the median peer's. None before most of them count.

        Of an even number of peers ours breaks the tie: of three clocks the odd one is off.
        """
        ahead = list(self.ahead().values())
        if 2 * len(ahead) <= len(self._heard):
            return None
        return statistics.median(ahead if len(ahead) % 2 else [*ahead, 0.0])

    def right(self, seconds: float) -> bool:
        """Whether others' leases may be judged by this clock: it goes with theirs, and has for `seconds` not jumped.

        Nor for as long as it takes to hear whether it does, where that is longer.
        """
        offset = self.offset()
        settled = self._monotonic() - self._jumped_at >= max(seconds, 2 * _WAITING_SECONDS)
        return settled and (offset is None or abs(offset) <= MAX_APART_SECONDS)

    def _look(self) -> None:
        before, self._apart = self._apart, self._wall() - self._monotonic()
        looked_at, self._looked_at = self._looked_at, self._monotonic()
        if abs(self._apart - before) > MAX_APART_SECONDS:
            logger.warning("this machine's clock has jumped by %+.1f s: set, or asleep", self._apart - before)
        elif self._looked_at - looked_at > ASLEEP_SECONDS:
            logger.warning("this peer was asleep or hung for %.1f s", self._looked_at - looked_at)
        else:
            return
        self._jumped_at = self._looked_at
        self._heard.clear()
