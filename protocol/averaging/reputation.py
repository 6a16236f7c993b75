"""Who spoils rounds, and what that costs: pure.

A round needs every part of every member. A member that sends what no honest peer sends would keep it from committing
for ever. So who does that is not met for a while, and its votes do not count.

    proven      this peer itself received from it a part with NaN or of a wrong shape, or an answer that weighs the
                members otherwise than their facts say. Streams are authenticated, so nobody else can have sent it.
    suspicion   a reducer says that a member's part did not come, or did not return its average to this peer. Either may
                lie: a reducer that stands alone with it is suspected as much as the member; if most reducers say so,
                only the member is.

A quorum is still one of all active composers, shunned ones included: peers whose opinions of each other differ must not
come to two majorities. Silence is no lie: who is slow or gone is only suspected, and a commit with it clears it. A liar
that spoils only one reducer's parts is known to that one at once, to the others after some rounds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

STRIKES = 3.0  # of suspicion, since the last commit with that peer
SHUN_SECONDS = 300.0  # the first time; twice as long each time after that
MAX_SHUN_SECONDS = 6 * 3600.0  # also what it takes until a peer that spoils nothing more has a clean record


def suspects(missing: Mapping[str, Collection[str]], reducers: Collection[str]) -> dict[str, float]:
    """Suspicion that one failed round brings, by peer.

    Args:
        missing: member to those that did not get all its parts, or averages of it, by their own word.
        reducers: all of the round.
    """
    suspicion: dict[str, float] = {}
    for member, accusers in missing.items():
        others = set(reducers) - {member}
        accusing = others.intersection(accusers)
        if 2 * len(accusing) > len(others):
            suspicion[member] = suspicion.get(member, 0.0) + 1.0
            continue
        for peer in {member, *accusing}:
            suspicion[peer] = suspicion.get(peer, 0.0) + 0.5
    return suspicion


@dataclass
class _Record:
    suspicion: float = 0.0
    times: int = 0  # that it was shunned
    until: float = 0.0
    last: float = 0.0  # failed round that was laid at its door


@dataclass
class Reputation:
    """What one peer thinks of the others; nothing of it is told to anybody.

    Args:
        me: is never shunned.
    """

    me: str
    _records: dict[str, _Record] = field(default_factory=dict)

    def failed(
        self, proven: Collection[str], suspicion: Mapping[str, float], now: float, spare: float = math.inf
    ) -> list[str]:
        """A round came to nothing. Returns who is shunned from now on and was not before.

        Args:
            now: monotonic seconds, as in all methods.
            spare: how many members a quorum can do without. No more are shunned on suspicion at a time, the most
                suspected first: without a quorum nothing would be gained.
        """
        caught: list[str] = []
        self._records = {
            peer: record
            for peer, record in self._records.items()
            if max(record.last, record.until) > now - MAX_SHUN_SECONDS
        }
        for peer in {*proven, *suspicion} - {self.me}:
            record = self._records.setdefault(peer, _Record())
            record.suspicion += suspicion.get(peer, 0.0)
            record.last = now
        free = {peer: record for peer, record in self._records.items() if record.until <= now and peer != self.me}
        for peer in sorted(free, key=lambda peer: (peer not in proven, -free[peer].suspicion, peer)):
            record = free[peer]
            if peer in proven or (record.suspicion >= STRIKES and spare > len(caught)):
                record.suspicion = 0.0
                record.until = now + min(MAX_SHUN_SECONDS, SHUN_SECONDS * 2**record.times)
                record.times += 1
                caught.append(peer)
        return caught

    def committed(self, members: Collection[str]) -> None:
        """A round with these members was committed: whoever was only suspected is not any more."""
        for peer in members:
            if peer in self._records:
                self._records[peer].suspicion = 0.0

    def shunned(self, now: float) -> frozenset[str]:
        """Peers to keep out of rounds and votes."""
        return frozenset(peer for peer, record in self._records.items() if record.until > now)
