"""How things stand, as the directory shows it: what `ownership.decide` starts from, and who has a vote. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

from ..experts.ownership import Copy, Situation, Watch
from ..experts.rendezvous import desired_owners
from .records import PeerRecord, VoteRecord
from .view import LeaseClaim, View

OWNING_ROLES = frozenset({"composer", "worker"})
# A peer in one of these phases is not counted on to take slots.
ABSENT_PHASES = frozenset({"starting", "joining", "failed", "stopped"})
# Phases in which a composer takes part in outer rounds and counts towards their quorum.
ACTIVE_PHASES = frozenset({"training", "finished"})


@dataclass(frozen=True)
class Standing:
    """Who can own slots, and who has said that it does: the same for all who see the same view."""

    live: frozenset[str]  # able to own slots, leaving ones not among them
    leaving: frozenset[str]
    capacities: Mapping[str, int]  # of both, in slots; 0 for those that leave
    claims: Mapping[int, LeaseClaim]  # by slot: live and last known
    silent: Mapping[str, int]  # capacities of those that have fallen silent lately

    def desired(self, num_slots: int, replication: int) -> Sequence[Sequence[str]]:
        """See `rendezvous.desired_owners`."""
        return _desired(num_slots, self._frozen, replication)

    def former(self, num_slots: int, replication: int) -> Sequence[Sequence[str]]:
        """`desired` as it was with those that have fallen silent."""
        return _desired(num_slots, frozenset({**self.silent, **self.capacities}.items()), replication)

    @cached_property
    def _frozen(self) -> frozenset[tuple[str, int]]:
        return frozenset(self.capacities.items())


def standing_of(view: View, distrusted: Collection[str] = ()) -> Standing:
    """The view without what `distrusted` peers say."""
    owners = {p: record for p, record in view.peers.items() if _can_own(record) and p not in distrusted}
    leaving = frozenset(peer for peer, record in owners.items() if record.phase == "leaving")
    return Standing(
        live=frozenset(owners.keys() - leaving),
        leaving=leaving,
        capacities={peer: 0 if peer in leaving else record.capacity for peer, record in owners.items()},
        claims={**view.last_holders, **view.leases},
        silent={p: record.capacity for p, record in view.absent.items() if _can_own(record) and p not in distrusted},
    )


def _can_own(record: PeerRecord) -> bool:
    return record.role in OWNING_ROLES and record.phase not in ABSENT_PHASES


def situation_of(
    view: View,
    watch: Watch,
    *,
    now: float,
    capacity: int,
    num_slots: int,
    replication: int,
    held: Mapping[int, int],
    copies: Mapping[int, Copy],
    busy: Collection[int],
) -> Situation:
    """The directory in the eyes of a peer, whose `watch` takes it in. Whom the peer distrusts is not there.

    Args:
        now: unix seconds.
        capacity: slots that this peer can own; 0 when leaving.
        held, copies, busy: as in `Situation`.
    """
    for peer in view.distrusted - watch.distrusted:
        watch.distrust(now, peer)
    return situated(
        standing_of(view, watch.distrusted),
        watch,
        now=now,
        capacity=capacity,
        num_slots=num_slots,
        replication=replication,
        held=held,
        copies=copies,
        busy=busy,
    )


def situated(
    standing: Standing,
    watch: Watch,
    *,
    now: float,
    capacity: int,
    num_slots: int,
    replication: int,
    held: Mapping[int, int],
    copies: Mapping[int, Copy],
    busy: Collection[int],
) -> Situation:
    """`situation_of` for a standing that is known already."""
    if standing.capacities.get(watch.me) == capacity:
        desired = standing.desired(num_slots, replication)
    else:  # the directory does not know yet
        capacities = {**standing.capacities, watch.me: capacity}
        desired = _desired(num_slots, frozenset(capacities.items()), replication)
    watch.observe(now, standing.claims, desired)
    return Situation(
        now=now,
        capacity=capacity,
        desired=desired,
        live=standing.live,
        leaving=standing.leaving,
        held=held,
        copies=copies,
        busy=busy,
        former=partial(standing.former, num_slots, replication),
    )


@lru_cache(maxsize=256)
def _desired(num_slots: int, capacities: frozenset[tuple[str, int]], replication: int) -> tuple[tuple[str, ...], ...]:
    """Peers look at every piece of news, and few change what anybody can own."""
    return tuple(map(tuple, desired_owners(num_slots, dict(capacities), replication)))


def active_composers(view: View, *, waiting: bool = False) -> list[str]:
    """Composers that train or have finished and stay, or are only `waiting` to."""
    phases = ACTIVE_PHASES | {"ready"} if waiting else ACTIVE_PHASES
    return [peer for peer, record in view.peers.items() if record.role == "composer" and record.phase in phases]


def electorate(view: View) -> int:
    """How many composers a quorum is counted over: the active ones, and those that have fallen silent lately.

    Whoever is cut off with a minority sees the others fall silent, as if they had crashed. If it counted only those it
    sees, both sides would commit, each its own state.
    """
    silent = sum(r.role == "composer" and r.phase in ACTIVE_PHASES for r in view.absent.values())
    return len(active_composers(view)) + silent


def votes_of(view: View, fragment: int) -> dict[str, VoteRecord]:
    """By voter, what composers hold of a fragment. Anybody can sign a vote; those of others do not count.

    A composer that leaves still counts as a voter: what it has merged with others is merged.
    """
    return {
        voter: vote
        for voter, vote in view.votes.get(fragment, {}).items()
        if (record := view.peers.get(voter)) is not None
        and record.role == "composer"
        and (record.phase in ACTIVE_PHASES or record.phase == "leaving")
    }
