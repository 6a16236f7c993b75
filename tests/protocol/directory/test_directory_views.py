"""The directory fed by gossip: how views resolve, who is noticed, and what a stalled DHT process costs."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from directory_nodes import RUN, Node, leases, peer_record, vote
from hivemind.utils import MPFuture
from shoal.protocol.directory.dht import start_dht
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import MAX_EPOCH, seal_record
from shoal.protocol.directory.view import View
from shoal.protocol.errors import DirectoryError
from shoal.protocol.identity import Identity


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def offline(nodes: list[Node], clock: Callable[[], float], identity: Identity | None = None) -> Directory:
    """A directory that is only fed by gossip."""
    return Directory(nodes[0].dht, identity or Identity.generate(), RUN, clock=clock)


def known_epochs(view: View) -> dict[int, int]:
    """By slot, the epoch that a takeover must exceed, whether its holder is still there or not."""
    return {slot: claim.epoch for slot, claim in {**view.last_holders, **view.leases}.items()}


def test_gossip_is_as_good_and_the_newest_wins(nodes: list[Node]) -> None:
    clock = Clock()
    directory = offline(nodes, clock)
    peer = Identity.generate()
    old = seal_record(peer, RUN, leases(peer, (1, 1), (2, 1), issued=clock.now))
    new = seal_record(peer, RUN, leases(peer, (2, 1), issued=clock.now + 1))
    assert directory.receive(old)
    assert set(directory.view().leases) == {1, 2}
    assert directory.receive(new)
    assert set(directory.view().leases) == {2}  # 1 was given up
    assert not directory.receive(new)
    assert not directory.refusals  # gossip repeats itself; that is no offence
    assert not directory.receive(old)
    assert directory.refusals == {"replayed": 1}
    assert set(directory.view().leases) == {2}
    assert not directory.receive(b"junk")
    assert directory.refusals["malformed"] == 1


def test_who_is_distrusted_hides_nobody(nodes: list[Node]) -> None:
    """Its claims are in no view, past and to come, and what they had won over is there again."""
    clock = Clock()
    directory = offline(nodes, clock)
    honest, liar = Identity.generate(), Identity.generate()
    directory.receive(seal_record(honest, RUN, leases(honest, (0, 4), (1, 2), issued=clock.now)))
    directory.receive(seal_record(liar, RUN, leases(liar, (0, 99), (2, 5), issued=clock.now)))
    assert {slot: claim.owner for slot, claim in directory.view().leases.items()} == {
        0: liar.peer_id, 1: honest.peer_id, 2: liar.peer_id
    }  # fmt: skip
    directory.distrust([liar.peer_id])
    for issued in (0.5, 1.0):
        view = directory.view()
        assert {slot: (claim.owner, claim.epoch) for slot, claim in view.leases.items()} == {
            0: (honest.peer_id, 4), 1: (honest.peer_id, 2)
        }  # fmt: skip
        assert known_epochs(view) == {0: 4, 1: 2}
        assert view.distrusted == {liar.peer_id}
        directory.receive(seal_record(liar, RUN, leases(liar, (0, 100), (1, 100), issued=clock.now + issued)))


def test_view_resolution(nodes: list[Node]) -> None:
    clock = Clock()
    directory = offline(nodes, clock)
    low, high = sorted((Identity.generate() for _ in range(2)), key=lambda identity: identity.peer_id)
    start = clock.now
    directory.receive(seal_record(low, RUN, leases(low, (0, 5), (1, 7), (2, 1), issued=start, lasts=30)))
    directory.receive(seal_record(high, RUN, leases(high, (0, 6), (1, 7), (3, 2), issued=start, lasts=20)))
    view = directory.view()
    assert {slot: claim.owner for slot, claim in view.leases.items()} == {
        0: high.peer_id,  # higher epoch
        1: low.peer_id,  # equal epochs: smaller peer id
        2: low.peer_id,
        3: high.peer_id,
    }
    assert known_epochs(view) == {0: 6, 1: 7, 2: 1, 3: 2}
    assert view.last_holders == {}

    clock.now = start + 20  # high's have expired, at this very instant
    view = directory.view()
    assert {slot: claim.owner for slot, claim in view.leases.items()} == {1: low.peer_id, 2: low.peer_id}
    assert {slot: (claim.owner, claim.epoch) for slot, claim in view.last_holders.items()} == {
        0: (high.peer_id, 6),  # low still claims it with epoch 5: deposed, and stays so
        3: (high.peer_id, 2),
    }
    assert known_epochs(view)[0] == 6

    clock.now = start + 5000  # long forgotten, but not the epochs
    view = directory.view()
    assert not view.leases
    assert not view.peers
    assert known_epochs(view) == {0: 6, 1: 7, 2: 1, 3: 2}
    directory.receive(seal_record(low, RUN, leases(low, (0, 7), issued=clock.now)))
    assert directory.view().leases[0].epoch == 7


def test_expired_peers_and_votes_drop_out(nodes: list[Node]) -> None:
    clock = Clock()
    directory = offline(nodes, clock)
    peer = Identity.generate()
    directory.receive(seal_record(peer, RUN, peer_record(peer, issued_at=clock.now, expires_at=clock.now + 10)))
    directory.receive(seal_record(peer, RUN, vote(2, clock.now)))
    assert peer.peer_id in directory.view().peers
    assert peer.peer_id in directory.view().votes[2]
    clock.now += 10
    assert peer.peer_id not in directory.view().peers
    clock.now += 50
    assert not directory.view().votes


def with_a_clock_to_set(nodes: list[Node]) -> tuple[Directory, Clock, Clock]:
    """A directory, its wall clock and its monotonic clock."""
    wall, monotonic = Clock(), Clock()
    return Directory(nodes[0].dht, Identity.generate(), RUN, clock=wall, monotonic=monotonic), wall, monotonic


def test_clock_offset(nodes: list[Node]) -> None:
    directory, wall, monotonic = with_a_clock_to_set(nodes)
    peers = {Identity.generate(): offset for offset in (3.0, 3.5, -100.0)}  # one of them is late, or wrong
    for _ in range(2):
        assert directory.clocks.offset() is None
        for peer, offset in peers.items():
            issued = wall.now + offset
            directory.receive(seal_record(peer, RUN, peer_record(peer, issued_at=issued, expires_at=issued + 200)))
        wall.now += 6
        monotonic.now += 6
    assert directory.clocks.offset() == pytest.approx(3.0)


@pytest.mark.parametrize(("ahead", "reason"), [(600.0, "expired"), (-600.0, "future")])
def test_refused_times_tell_how_far_the_own_clock_is_off(nodes: list[Node], ahead: float, reason: str) -> None:
    directory, wall, monotonic = with_a_clock_to_set(nodes)
    others, now = [Identity.generate() for _ in range(3)], wall.now
    for peer in others:
        assert directory.receive(seal_record(peer, RUN, peer_record(peer, issued_at=now, expires_at=now + 20)))
    wall.now += ahead
    for number in (1, 2):
        for peer in others:
            late = peer_record(peer, issued_at=now + 6 * number, expires_at=now + 6 * number + 20)
            wall.now, monotonic.now = now + ahead + 6 * number, now + 6 * number
            assert not directory.receive(seal_record(peer, RUN, late))
    assert directory.refusals == {reason: 6}
    assert directory.clocks.offset() == pytest.approx(-ahead)
    assert not directory.clocks.right(20.0)


def test_a_copy_of_our_key_is_noticed(nodes: list[Node]) -> None:
    clock = Clock()
    me = Identity.generate()
    before = seal_record(me, RUN, peer_record(me, issued_at=clock.now - 5))
    directory = offline(nodes, clock, me)
    assert directory.receive(before)  # our own, from before a restart
    assert not directory.receive(seal_record(me, RUN, peer_record(me, issued_at=clock.now + 1)))
    assert directory.refusals == {"identity-in-use": 1}


@pytest.mark.parametrize("back", [30.0, 3000.0])
def test_our_own_records_are_no_copys_after_the_clock_was_set_back(nodes: list[Node], back: float) -> None:
    clock, me = Clock(), Identity.generate()
    directory = offline(nodes, clock, me)
    clock.now += 1
    before = peer_record(me, issued_at=clock.now, expires_at=clock.now + 20)
    asyncio.run(directory.put(before))
    clock.now -= back
    asyncio.run(directory.put(peer_record(me, issued_at=clock.now, expires_at=clock.now + 20)))
    clock.now += back + 1
    assert not directory.receive(seal_record(me, RUN, before))
    assert directory.refusals["identity-in-use"] == 0
    assert not directory.receive(seal_record(me, RUN, peer_record(me, issued_at=clock.now, expires_at=clock.now + 20)))
    assert directory.refusals["identity-in-use"] == 1


def test_reads_overlap_and_do_not_block_the_loop(nodes: list[Node]) -> None:
    async def scenario() -> None:
        directory = nodes[1].directory()
        turns = 0

        async def spin() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        spinner = asyncio.create_task(spin())
        try:
            await asyncio.gather(*(directory.read() for _ in range(8)))
        finally:
            spinner.cancel()
        assert turns > 100

    asyncio.run(scenario())


def test_a_stopped_dht_process_is_an_error_with_a_deadline(tmp_path: Path) -> None:
    dht = start_dht(tmp_path / "key", initial_peers=[], host="127.0.0.1", port=0, announce=[], run_id=RUN)
    try:
        identity = Identity.load(tmp_path / "key")

        async def scenario() -> None:
            directory = Directory(dht, identity, RUN, timeout_seconds=0.5)
            assert dht.pid is not None
            with MPFuture._update_lock:  # if it had this one, the other tests' DHTs would stand still too
                os.kill(dht.pid, signal.SIGSTOP)
            try:
                with pytest.raises(DirectoryError, match="did not answer"):
                    await directory.read()
                # The pipe holds what a stalled process does not take: sending never blocks.
                large = leases(identity, *((slot, MAX_EPOCH) for slot in range(4096)), issued=time.time())
                started = time.monotonic()
                for result in await asyncio.gather(*(directory.put(large) for _ in range(6)), return_exceptions=True):
                    assert isinstance(result, DirectoryError)
                assert time.monotonic() - started < 5
                assert directory.failures["timeout"] >= 6
            finally:
                os.kill(dht.pid, signal.SIGKILL)
            dht.join(10)
            with pytest.raises(DirectoryError, match="has ended"):
                await directory.read()

        asyncio.run(scenario())
    finally:
        dht.shutdown()


def test_our_own_record_is_no_copys_where_others_have_filled_the_directory(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.protocol.directory.directory._MAX_CACHED", 1)
    me, other = Identity.generate(), Identity.generate()
    directory = offline(nodes, time.time, me)
    assert directory.receive(seal_record(other, RUN, peer_record(other)))
    mine = peer_record(me)
    asyncio.run(directory.put(mine))
    assert not directory.receive(seal_record(me, RUN, mine))  # it comes back by gossip
    assert directory.refusals["identity-in-use"] == 0
