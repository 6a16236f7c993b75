"""How things stand for a peer that owns slots, as the directory shows it: what `ownership.decide` starts from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .ownership import Copy, Situation, Watch, desired_owners
from .view import View

OWNING_ROLES = frozenset({"composer", "worker"})
# A peer in one of these phases is not counted on to take slots.
ABSENT_PHASES = frozenset({"starting", "joining", "failed", "stopped"})


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
    owners = {
        peer: record
        for peer, record in view.peers.items()
        if record.role in OWNING_ROLES and record.phase not in ABSENT_PHASES and peer not in watch.distrusted
    }
    leaving = {peer for peer, record in owners.items() if record.phase == "leaving"}
    capacities = {peer: 0 if peer in leaving else record.capacity for peer, record in owners.items()}
    capacities[watch.me] = capacity
    desired = desired_owners(num_slots, capacities, replication)
    watch.observe(now, {**view.last_holders, **view.leases}, desired)
    return Situation(
        now=now,
        capacity=capacity,
        desired=desired,
        live={peer for peer in owners if peer not in leaving},
        leaving=leaving,
        held=held,
        copies=copies,
        busy=busy,
    )
