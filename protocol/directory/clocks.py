"""Whether this machine's clock goes with its peers'. Leases, votes and the DHT compare wall clocks.

Two witnesses. Every signed record says when it was issued: what comes by gossip tells how far clocks are apart, whether
or not the record's times let it in. And the machine's monotonic clock shows at once that the wall clock has jumped,
before any peer can be heard: what was learned until then counts no more.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable

from .records import MAX_CLOCK_AHEAD_SECONDS

logger = logging.getLogger(__name__)

MAX_APART_SECONDS = MAX_CLOCK_AHEAD_SECONDS  # beyond it, one side refuses what the other says
_RECENT_SECONDS = 60.0  # a peer counts with what took the shortest way in this time
_SILENT_SECONDS = 150.0  # a peer that was not heard for so long counts no more; it would speak more often
_PER_PEER = 16
_MAX_PEERS = 10_000  # so that invented identities cannot exhaust memory


class Clocks:
    """What one peer knows of its own and others' clocks.

    Args:
        wall: unix seconds.
        monotonic: seconds.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._apart = wall() - monotonic()
        self._jumped_at = -math.inf  # monotonic seconds
        # By sender: (when it came, issued minus arrival), each offset smaller than those before it.
        self._offsets: dict[str, deque[tuple[float, float]]] = {}

    def heard(self, sender: str, issued_at: float) -> None:
        """A record that `sender` signed has just come. A replay is taken for a slow one, which counts for nothing."""
        self._look()
        now, offset = self._monotonic(), issued_at - self._wall()
        offsets = self._offsets.get(sender)
        if offsets is None:
            if len(self._offsets) >= _MAX_PEERS:
                return
            offsets = self._offsets[sender] = deque()
        while offsets and (offsets[-1][1] <= offset or len(offsets) >= _PER_PEER):
            offsets.pop()
        offsets.append((now, offset))

    def ahead(self) -> dict[str, float]:
        """By peer, the seconds that its clock seems ahead of ours; low by what its fastest recent record took."""
        self._look()
        now = self._monotonic()
        self._offsets = {peer: known for peer, known in self._offsets.items() if known[-1][0] >= now - _SILENT_SECONDS}
        for offsets in self._offsets.values():
            while len(offsets) > 1 and offsets[0][0] < now - _RECENT_SECONDS:
                offsets.popleft()
        return {sender: offsets[0][1] for sender, offsets in self._offsets.items()}

    def offset(self) -> float | None:
        """Seconds that the swarm's clocks seem ahead of ours: the median peer's. None before anything was heard.

        Of an even number of peers ours breaks the tie: of three clocks the odd one is off.
        """
        ahead = list(self.ahead().values())
        if not ahead:
            return None
        return statistics.median(ahead if len(ahead) % 2 else [*ahead, 0.0])

    def right(self, seconds: float) -> bool:
        """Whether others' leases may be judged by this clock: it goes with theirs, and has for `seconds` not jumped."""
        offset = self.offset()
        settled = self._monotonic() - self._jumped_at >= seconds
        return settled and (offset is None or abs(offset) <= MAX_APART_SECONDS)

    def _look(self) -> None:
        before, self._apart = self._apart, self._wall() - self._monotonic()
        if abs(self._apart - before) > MAX_APART_SECONDS:
            self._jumped_at = self._monotonic()
            self._offsets.clear()
            logger.warning("this machine's clock has jumped by %+.1f s: set, or asleep", self._apart - before)
