"""Who counts: for a quorum, and as a source of copies, when others have fallen silent."""

from __future__ import annotations

from shoal.protocol.averaging.rounds import quorum
from shoal.protocol.directory.records import Lease, LeaseRecord, PeerRecord
from shoal.protocol.directory.standing import electorate, situation_of
from shoal.protocol.directory.view import ABSENT_LIFETIMES, LeaseClaim, View, remember, resolve
from shoal.protocol.experts.ownership import Copy, Rules, TakeOver, Watch, decide

LEASE = 20.0
ME, FULL, GONE = (f"12D3KooW{letter * 44}" for letter in "ABC")


def record(peer: str, issued_at: float, *, phase: str = "training", capacity: int = 4) -> PeerRecord:
    return PeerRecord(
        peer_id=peer, role="composer", phase=phase, capacity=capacity, transport_addrs=[], dht_addrs=[],
        metrics_url="", version="", protocol_version=1, step=1, tokens=1, tokens_per_second=1.0, loss=1.0, slots=[],
        round=0, fidelity=0.0, issued_at=issued_at, expires_at=issued_at + LEASE,
    )  # fmt: skip


def view(now: float, peers: list[PeerRecord], leases: list[LeaseRecord]) -> View:
    strongest: dict[int, LeaseClaim] = {}
    for lease in leases:
        remember(strongest, lease)
    return resolve(now, peers=peers, leases=leases, votes=(), strongest=strongest)


def test_who_falls_silent_counts_for_a_while_and_who_leaves_does_not() -> None:
    """Else the smaller side of a split would have a quorum as soon as the others' records have run out."""
    peers = [record(f"peer{i}", 100.0) for i in range(5)]
    peers += [record("left", 100.0, phase="leaving"), record("here1", 130.0), record("here2", 130.0)]
    seen = view(131.0, peers, [])
    assert set(seen.peers) == {"here1", "here2"}
    assert electorate(seen) == 7
    assert quorum(electorate(seen)) > len(seen.peers)
    long_after = 100.0 + LEASE + ABSENT_LIFETIMES * LEASE
    fresh = [record("here1", long_after), record("here2", long_after)]
    assert electorate(view(long_after - 1, [*peers[:6], *fresh], [])) == 7
    assert electorate(view(long_after, [*peers[:6], *fresh], [])) == 2


def test_a_copy_is_asked_for_at_the_standbys_of_the_owner_that_died() -> None:
    """They may be full, or listed no more; who has room but no copy must still find theirs."""
    watch = Watch(ME)
    asked: set[str] = set()
    for number in range(20):  # whoever is listed without the dead owner depends on the slots' draws
        lease = LeaseRecord(owner=GONE, leases=[Lease(number, 1, 0)], issued_at=100.0, expires_at=100.0 + LEASE)
        peers = [record(GONE, 100.0), record(FULL, 190.0, capacity=1), record(ME, 190.0)]
        situation = situation_of(
            view(191.0, peers, [lease]), watch, now=191.0, capacity=4, num_slots=number + 1, replication=2,
            held={}, copies={}, busy=(),
        )  # fmt: skip
        with_owner = situation.former()[number]
        for action in decide(watch, situation, Rules(lease=LEASE)):
            if isinstance(action, TakeOver) and action.slot == number:
                assert action.lost
                assert set(with_owner) - {ME} <= set(action.sources)
                asked |= set(action.sources)
    assert FULL in asked


def test_remember_keeps_the_strongest_and_its_newest_renewal() -> None:
    strongest: dict[int, LeaseClaim] = {}

    def claim(owner: str, epoch: int, issued_at: float) -> None:
        leases = [Lease(0, epoch, 0)]
        remember(strongest, LeaseRecord(owner=owner, leases=leases, issued_at=issued_at, expires_at=issued_at + LEASE))

    claim(FULL, 2, 100.0)
    claim(FULL, 2, 110.0)
    assert strongest[0].expires_at == 110.0 + LEASE
    claim(ME, 1, 120.0)
    assert strongest[0].owner == FULL
    claim(ME, 2, 120.0)  # of one epoch the smaller id
    assert (strongest[0].owner, strongest[0].epoch) == (ME, 2)


def test_an_own_copy_comes_before_all_sources() -> None:
    watch = Watch(ME)
    lease = LeaseRecord(owner=GONE, leases=[Lease(0, 1, 0)], issued_at=100.0, expires_at=100.0 + LEASE)
    situation = situation_of(
        view(191.0, [record(ME, 190.0)], [lease]), watch, now=191.0, capacity=4, num_slots=1, replication=2,
        held={}, copies={0: Copy(1, 0)}, busy=(),
    )  # fmt: skip
    [action] = decide(watch, situation, Rules(lease=LEASE))
    assert isinstance(action, TakeOver)
    assert not action.lost
