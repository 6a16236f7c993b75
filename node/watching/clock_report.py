"""Telling people that a clock is off, this machine's or a peer's: what fails of it looks like anything else."""

from __future__ import annotations

import math

from ...protocol.directory.clocks import MAX_APART_SECONDS, Clocks
from ...protocol.errors import ClockOff
from ..logs import get_logger
from .state import PeerState

log = get_logger(__name__)

AGAIN_SECONDS = 60.0  # an own clock that is off is told so often


class ClockReport:
    """Looks at `clocks` and tells `state` and the log. On the asyncio loop."""

    def __init__(self, clocks: Clocks, state: PeerState) -> None:
        self._clocks, self._state = clocks, state
        self._off: set[str] = set()  # peers
        self._told = -math.inf  # monotonic seconds; -inf: the own clock is right

    def tell(self, now: float) -> None:
        """Call it often. `now`: monotonic seconds."""
        offset = self._clocks.offset()
        if offset is None:
            return
        self._state.set_clock_offset(-offset)
        if abs(offset) <= MAX_APART_SECONDS:
            if self._told > -math.inf:
                self._told = -math.inf
                log.info("clock.right")
            self._tell_of_peers()
        elif now >= self._told + AGAIN_SECONDS:
            self._told = now
            error = ClockOff(
                f"this machine's clock is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead of'} its peers'",
                fix="synchronise the clock (NTP; `timedatectl set-ntp true`): this peer takes part again then",
            )
            self._state.note_error(error)
            log.error("clock.off", seconds=round(-offset, 1), error=str(error))

    def _tell_of_peers(self) -> None:
        ahead = self._clocks.ahead()
        off = {peer for peer, seconds in ahead.items() if abs(seconds) > MAX_APART_SECONDS}
        for peer in sorted(off - self._off):
            log.warning("peer.clock_off", peer=peer, ahead_seconds=round(ahead[peer], 1))
        self._off = off
