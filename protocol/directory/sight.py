"""Whether a peer has lost sight of its swarm: whom the directory shows, against who fell silent without leaving. Pure.

A peer whose network is gone sees all others fall silent one lease later, and so does every peer of a side of a split.
Nobody can tell from inside which side is the swarm; the larger one goes on as one, the smaller says that it is cut off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .view import View

_PASSING_ROLES = frozenset({"observer"})  # they come and go
_LEFT_PHASES = frozenset({"leaving", "stopped", "failed"})  # whoever said so fell silent for a reason


@dataclass(frozen=True)
class Sight:
    """Other peers, counted."""

    live: int  # in the directory
    connected: int  # of these, with an open connection to this peer
    silent: int  # whose records ran out a short time ago, without a word

    @property
    def cut_off(self) -> bool:
        """No majority of those known is in sight. With a single other peer, its death looks the same."""
        return self.silent > 0 and 2 * (self.live + 1) <= self.live + 1 + self.silent


def sight_of(view: View, peer_id: str, connected: Collection[str]) -> Sight:
    """What `peer_id` sees, who has open connections to `connected`."""
    live = {p for p, record in view.peers.items() if p != peer_id and record.role not in _PASSING_ROLES}
    silent = [
        p
        for p, record in view.absent.items()
        if p != peer_id and record.role not in _PASSING_ROLES and record.phase not in _LEFT_PHASES
    ]
    return Sight(len(live), len(live & set(connected)), len(silent))
