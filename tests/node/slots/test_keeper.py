"""Slots of two composers over a real directory and transport: owned once, handed over to the bit, never stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from loopback import RUN, SECONDS, Loopback, LoopbackPeer, WallClock, loopback
from shoal.node.run.manifest import Manifest, OwnershipSpec
from shoal.node.slots.copies import Snapshot
from shoal.node.slots.keeper import PARALLEL_FETCHES
from shoal.node.storage.blobs import to_bytes
from shoal.node.watching.state import Phase
from shoal.protocol import messages
from shoal.protocol.directory.records import MAX_EPOCH, Lease, LeaseRecord, PeerRecord, seal_record
from shoal.protocol.errors import Refused
from shoal.protocol.experts.ownership import COPY_RAISE, Copy, TakeOver
from shoal.protocol.identity import Identity
from shoal.protocol.messages import SlotState, StandInSnapshot
from shoal.protocol.transport.downloads import FetchQuery, Resource
from tiny import SLOTS, manifest_of

LEASE_SECONDS = 4.0


def manifest() -> Manifest:
    base = manifest_of(outer={"every_steps": 1_000_000}, train={"steps": 1_000_000})
    return msgspec.structs.replace(base, ownership=OwnershipSpec(lease_seconds=LEASE_SECONDS, snapshot_every=1))


class Kept:
    """A swarm whose keepers run."""

    def __init__(self, swarm: Loopback) -> None:
        self.swarm = swarm
        self.tasks: dict[str, asyncio.Task[None]] = {}
        for peer in swarm.peers:
            swarm.call(self._start(peer))

    async def _start(self, peer: LoopbackPeer) -> None:
        await peer.keeper.recall()
        self.tasks[peer.peer_id] = asyncio.create_task(peer.keeper.run())

    def owned(self) -> list[set[int]]:
        return [set(peer.keeper.held) for peer in self.swarm.peers]

    def settled(self) -> bool:
        first, second = self.owned()
        return first | second == set(range(SLOTS)) and not first & second and bool(first) and bool(second)

    def step(self) -> None:
        for peer in self.swarm.peers:
            peer.step()
            peer.keeper.step = peer.composer.step


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with loopback(tmp_path, manifest(), 2) as swarm:
        kept = Kept(swarm)
        swarm.until(kept.settled, "every slot has one owner")
        yield kept
        assert not any(task.done() for task in kept.tasks.values()), "a keeper has ended"


def weights(peer: LoopbackPeer, slot: int) -> dict[str, torch.Tensor]:
    return peer.ask(lambda composer: composer.snapshot(slot))


async def leave(peer: LoopbackPeer) -> None:
    """As composing does it: the phase says so before the slots are offered."""
    peer.links.state.enter(Phase.LEAVING)
    peer.links.news.changed()
    await peer.keeper.drain(20.0)


def test_who_leaves_hands_everything_over_to_the_bit(kept: Kept) -> None:
    leaver, stayer = kept.swarm.peers
    kept.step()
    slots = set(leaver.keeper.held)
    epochs = dict(leaver.keeper.held)
    before = {slot: weights(leaver, slot) for slot in slots}
    kept.swarm.call(leave(leaver))
    kept.swarm.until(lambda: set(stayer.keeper.held) == set(range(SLOTS)), "the other has every slot")
    for slot in slots:
        after = weights(stayer, slot)
        assert stayer.keeper.held[slot] == epochs[slot] + COPY_RAISE
        assert all(torch.equal(after[name], value) for name, value in before[slot].items() if "published" not in name)
    assert not leaver.ask(lambda composer: composer.owned)
    stayer.step()


def test_a_deposed_owner_keeps_a_copy(kept: Kept) -> None:
    loser, winner = kept.swarm.peers
    kept.step()
    slot = min(loser.keeper.held)
    epoch = loser.keeper.held[slot]
    tensors = weights(loser, slot)
    kept.swarm.until(lambda: slot not in loser.keeper._busy, "nothing is under way")

    async def depose() -> None:
        announcement = await asyncio.wrap_future(
            winner.trainer.ask(lambda c: winner.exchange.adopt(c, slot, epoch + COPY_RAISE, tensors, epoch, None))
        )
        winner.keeper.held[slot], winner.keeper._versions[slot] = epoch + COPY_RAISE, 0
        await winner.keeper.announce()
        await winner.exchange.send([announcement])

    kept.swarm.call(depose())
    kept.swarm.until(lambda: loser.keeper.held.get(slot) != epoch, "it lets go")
    kept.swarm.until(
        lambda: loser.keeper._copies.held.get(slot, Copy(0, 0)).epoch >= epoch or slot in loser.keeper.held,
        "it has a copy, or the slot again",
    )


def test_a_slot_restarted_by_others_goes_on_from_its_owners_state(kept: Kept) -> None:
    """As after a split in which the owner was cut off from everybody who had a copy."""
    owner, restarter = kept.swarm.peers
    kept.step()
    slot = min(owner.keeper.held)
    epoch = owner.keeper.held[slot]
    kept.swarm.until(lambda: slot not in owner.keeper._busy | restarter.keeper._busy, "nothing is under way")
    before = weights(owner, slot)
    kept.swarm.call(restarter.keeper._take_over(TakeOver(slot, epoch + 1, None, ())))
    kept.swarm.until(lambda: owner.keeper.held.get(slot) == epoch + 1 + COPY_RAISE, "it has its slot back")
    kept.swarm.until(lambda: slot not in restarter.keeper.held, "the other lets go")
    after = weights(owner, slot)
    trained = [name for name in before if "publisher" not in name]
    assert any(name.endswith("exp_avg") for name in trained)
    assert all(torch.equal(after[name], before[name]) for name in trained)
    kept.swarm.until(lambda: runs_as_published(owner, restarter, slot), "the other follows its owner")


def test_who_begins_to_leave_while_it_would_claim_a_slot_back_leaves_in_order(kept: Kept) -> None:
    """Its keeper must live on: it renews the leases of what is still to be handed over."""
    owner, restarter = kept.swarm.peers
    slot, free = min(owner.keeper.held), threading.Event()
    epoch = owner.keeper.held[slot]
    kept.swarm.until(lambda: slot not in owner.keeper._busy | restarter.keeper._busy, "nothing is under way")
    owner.trainer.ask(lambda _: free.wait(SECONDS))
    try:
        kept.swarm.call(restarter.claim([slot], epoch + 1))
        kept.swarm.until(lambda: slot not in owner.keeper.held, "it is letting go of its slot")
        left = asyncio.run_coroutine_threadsafe(leave(owner), kept.swarm.network.loop)
        kept.swarm.until(lambda: owner.keeper._leaving, "it leaves")
    finally:
        free.set()
    left.result(SECONDS)
    assert not kept.tasks[owner.peer_id].done()


def runs_as_published(owner: LoopbackPeer, other: LoopbackPeer, slot: int) -> bool:
    target = other.ask(lambda _: other.exchange.owners().get(slot))
    if target is None or target.owner != owner.peer_id:
        return False
    ran, published = (p.ask(lambda c: [standin.digest() for standin in c.standins(slot)]) for p in (other, owner))
    return ran == published


def test_an_owner_that_dies_while_its_slot_is_copied_is_succeeded_in_time(kept: Kept) -> None:
    """The copy that there is must do: the one on its way may take as long as a fetch may."""
    stayer, goner = kept.swarm.peers
    slots = set(goner.keeper.held)
    kept.step()
    kept.swarm.until(lambda: slots <= set(stayer.keeper._copies.held), "every slot has a copy")

    async def occupy() -> None:
        for _ in range(PARALLEL_FETCHES):
            await stayer.keeper._fetching.acquire()

    async def stop(task: asyncio.Task[None]) -> None:
        task.cancel()

    kept.swarm.call(occupy())  # from now on fetches hang
    kept.step()
    kept.swarm.until(lambda: slots <= set(stayer.keeper._copies._refreshing), "newer copies are asked for")
    kept.swarm.call(stop(kept.tasks.pop(goner.peer_id)))
    kept.swarm.until(lambda: set(stayer.keeper.held) == set(range(SLOTS)), "the other took over")


def test_a_peer_that_sends_its_slots_slowly_holds_up_no_slots_of_others(tmp_path: Path) -> None:
    """A standby has several slots of an owner to copy, each of which may take hours; it must be able to take over."""
    with loopback(tmp_path, manifest(), 3) as swarm:
        first, slow, quick = swarm.peers
        asked = asyncio.Event()
        standin = StandInSnapshot(3, 1, 1, (b"layer",), bytes(16))
        state = SlotState(3, 1, 7, to_bytes({"0.down": torch.ones(2)}), standin)

        async def withhold(query: FetchQuery) -> Resource | None:
            asked.set()
            await asyncio.sleep(SECONDS)
            return None

        async def give(query: FetchQuery) -> Resource | None:
            return Resource(messages.encode(state))

        async def fetch() -> Snapshot:
            held_up = [
                asyncio.create_task(first.keeper._fetch(slow.peer_id, f"snapshot/{slot}")) for slot in range(SLOTS)
            ]
            try:
                await asked.wait()
                async with asyncio.timeout(10):
                    return await first.keeper._fetch(quick.peer_id, "snapshot/3")
            finally:
                for task in held_up:
                    task.cancel()

        slow.links.transport.serve(withhold)
        quick.links.transport.serve(give)
        assert swarm.call(fetch()).copy == Copy(1, 7)


def test_many_slots_at_once_are_announced_together(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept.swarm.peers[0]
    published: list[set[int]] = []
    publish = first.links.announce

    async def slowly(record: PeerRecord | LeaseRecord) -> None:
        if isinstance(record, LeaseRecord):
            await asyncio.sleep(0.1)
            published.append({lease.slot for lease in record.leases})
        await publish(record)

    async def gained(slot: int) -> set[int]:
        first.keeper.held[slot], first.keeper._versions[slot] = 1, 0
        await first.keeper.announce()
        return published[-1]

    async def all_at_once() -> list[set[int]]:
        return await asyncio.gather(*(gained(slot) for slot in range(SLOTS, SLOTS + 50)))

    held = set(first.keeper.held)
    monkeypatch.setattr(first.links, "announce", slowly)
    told = kept.swarm.call(all_at_once())
    assert len(published) <= 3  # the keeper may renew meanwhile
    assert all(slot in leases for slot, leases in enumerate(told, start=SLOTS))
    assert published[-1] >= held | set(range(SLOTS, SLOTS + 50))


def test_a_claim_of_the_last_epoch_ends_nobody(kept: Kept) -> None:
    """Whoever sees it lets go, and nobody dies of trying to claim beyond it."""
    victim, other = kept.swarm.peers
    slot = min(victim.keeper.held)
    kept.swarm.call(other.claim([slot], MAX_EPOCH, LEASE_SECONDS / 4))
    kept.swarm.until(lambda: slot not in victim.keeper.held, "the victim lets go")
    kept.swarm.until(
        lambda: any(slot in peer.keeper._out_of_epochs for peer in kept.swarm.peers), "the slot is given up"
    )
    kept.step()
    assert not any(task.done() for task in kept.tasks.values())


def test_a_stranger_who_claims_everything_costs_nothing_but_time(kept: Kept, tmp_path: Path) -> None:
    """It announces the largest capacity and every slot there could be, and goes silent."""
    stranger = Identity.load_or_create(tmp_path / "stranger.key")
    kept.step()
    now = time.time()
    leases = [Lease(slot, 7, 0) for slot in range(4096)]
    record = LeaseRecord(owner=stranger.peer_id, leases=leases, issued_at=now, expires_at=now + 2.0)
    boast = PeerRecord(
        peer_id=stranger.peer_id, role="composer", phase="training", capacity=65536, transport_addrs=[], dht_addrs=[],
        metrics_url="", version="", protocol_version=1, step=1 << 53, tokens=0, tokens_per_second=0.0, loss=0.0,
        slots=[], round=1 << 53, fidelity=0.0, issued_at=now, expires_at=now + 2.0,
    )  # fmt: skip

    async def hear(peer: LoopbackPeer) -> None:
        for each in (boast, record):
            assert peer.links.directory.receive(seal_record(stranger, RUN, each))
        peer.links.news.changed()

    for peer in kept.swarm.peers:
        kept.swarm.call(hear(peer))
    held = [peer.keeper.held for peer in kept.swarm.peers]
    kept.swarm.until(
        lambda: {slot for each in held for slot, epoch in list(each.items()) if epoch > 7} == set(range(SLOTS)),
        "every slot is taken from it",
    )
    for peer in kept.swarm.peers:
        assert peer.links.state.snapshot()["slots"]["lost"] == 0
    kept.step()


def test_a_slot_counts_as_lost_when_it_has_restarted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = kept.swarm.peers
    slot = min(owner.keeper.held)

    async def no_composer(slot: int) -> Snapshot | None:
        raise Refused("no-composer", "nobody has made it")

    monkeypatch.setattr(other.keeper, "_rebuild", no_composer)
    with pytest.raises(Refused):
        kept.swarm.call(other.keeper._take_over(TakeOver(slot, owner.keeper.held[slot] + 1, None, ())))
    assert other.links.state.snapshot()["slots"]["lost"] == 0


@pytest.mark.parametrize("damage", ["gone", "junk"])
def test_a_damaged_copy_is_dropped(kept: Kept, damage: str) -> None:
    keeper = kept.swarm.peers[0].keeper
    slot = next(s for s in range(SLOTS) if s not in keeper.held)
    kept.step()
    kept.swarm.until(lambda: slot in keeper._copies.held and slot not in keeper._busy, "a copy of the other's slot")
    path = keeper._copies._path(slot)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"junk")
    owner = kept.swarm.peers[1]
    tensors = weights(owner, slot)

    async def take_over() -> None:
        async with keeper._ticking:
            action = TakeOver(slot, owner.keeper.held[slot] + 1, keeper._copies.held[slot], (owner.peer_id,))
            await keeper._take_over(action)

    kept.swarm.call(take_over())
    mine = weights(kept.swarm.peers[0], slot)
    assert all(torch.equal(mine[name], tensors[name]) for name in tensors if "published" not in name)


def test_a_slot_stays_frozen_while_its_next_owner_takes_it(tmp_path: Path) -> None:
    with loopback(tmp_path, manifest(), 2) as swarm:
        owner, next_owner = swarm.peers
        tasks: list[asyncio.Task[None]] = []
        swarm.network.loop.call_soon_threadsafe(
            lambda: tasks.append(swarm.network.loop.create_task(owner.keeper.run()))
        )
        swarm.until(lambda: set(owner.keeper.held) == set(range(SLOTS)), "one owns all")

        def desired() -> set[int]:
            owners = owner.keeper._situation().desired
            return {slot for slot in range(SLOTS) if owners[slot][0] == next_owner.peer_id}

        swarm.until(lambda: bool(desired()), "the other one is to have some")
        slot = min(desired())
        given = swarm.call(owner.keeper.serve_handover(slot, next_owner.peer_id))
        assert given is not None
        assert given.on_read is not None
        until = time.monotonic() + 1.5 * LEASE_SECONDS
        while time.monotonic() < until:
            swarm.network.loop.call_soon_threadsafe(given.on_read)
            assert slot in owner.ask(lambda composer: set(composer.frozen))
            time.sleep(LEASE_SECONDS / 8)
        swarm.until(lambda: slot not in owner.ask(lambda composer: set(composer.frozen)), "the next owner is gone")
        swarm.network.loop.call_soon_threadsafe(given.on_read)  # late
        assert owner.ask(lambda composer: set(composer.frozen)) == set()
        assert slot in owner.keeper.held


def test_who_has_a_wrong_clock_takes_nobodys_slots(tmp_path: Path) -> None:
    """To its eyes every lease has long run out. It says so, and when its clock is right nobody has lost anything."""
    with loopback(tmp_path, manifest(), 3) as swarm:
        kept = Kept(swarm)

        def settled() -> bool:
            owned = kept.owned()
            return sorted(slot for slots in owned for slot in slots) == list(range(SLOTS))

        swarm.until(settled, "every slot has one owner")
        kept.step()
        wrong, *others = sorted(swarm.peers, key=lambda peer: -len(peer.keeper.held))  # one may own nothing
        swarm.until(lambda: all(standbys(swarm, slot) for slot in range(SLOTS)), "every slot has a copy")
        epochs = [dict(peer.keeper.held) for peer in others]
        mine = set(wrong.keeper.held)
        clock = wrong.links.clock
        assert isinstance(clock, WallClock)

        clock.ahead = 600.0
        swarm.until(lambda: error_code(wrong) == "SHOAL-109", "it says what is wrong")
        swarm.until(lambda: mine <= set().union(*(peer.keeper.held for peer in others)), "others take over its slots")
        assert set(wrong.keeper.held) <= mine
        clock.ahead = 0.0
        swarm.until(lambda: settled() and set(wrong.keeper.held) == mine, "it has its slots again")
        for peer, before in zip(others, epochs, strict=True):
            assert {slot: peer.keeper.held.get(slot) for slot in before} == before
        assert not any(peer.links.state.snapshot()["slots"]["lost"] for peer in swarm.peers)
        assert all(error_code(peer) == "" for peer in others)


def standbys(swarm: Loopback, slot: int) -> list[str]:
    return [peer.peer_id for peer in swarm.peers if slot in peer.keeper._copies.held]


def error_code(peer: LoopbackPeer) -> str:
    error = peer.links.state.snapshot()["last_error"]
    return error["code"] if error else ""
