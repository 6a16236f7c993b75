"""Ownership as a peer lives it: claiming, renewing, taking over, handing over, keeping copies for others.

What to do is decided by `protocol/experts/ownership.py`; this file does it. One loop looks at the directory every tenth
of a lease, and at once when news of another peer comes; whatever takes time (a handover, a snapshot) runs beside it,
marked busy. Fencing is by epoch: a claim is announced before its slot is trained, and a peer that sees a stronger claim
than its own lets go in the same pass.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic

from ...protocol import resources
from ...protocol.directory.records import MAX_EPOCH, Lease, LeaseRecord
from ...protocol.directory.standing import situation_of
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused, TransportError
from ...protocol.experts.ownership import (
    COPY_RAISE,
    ClaimFree,
    Copy,
    DropStandby,
    KeepStandby,
    Reclaim,
    RequestHandover,
    Rules,
    Situation,
    TakeOver,
    Watch,
    Yield,
    decide,
    grants_handover,
)
from ...protocol.messages import SurrogateDelta
from ...protocol.transport.downloads import Resource
from ...protocol.transport.fetches import Turns
from ..learning.owning import Owner
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..seed.store import SeedMissing
from ..standins.publishing import Published, Publishing
from ..watching.state import Count
from ..watching.state import Lease as LeaseSeen
from .copies import READ_BYTES_PER_SECOND, CopyStore, Snapshot, copy_from, newer_than, opened, pause_after
from .slot_serving import SlotServing
from .slot_state import SlotTensors

log = get_logger(__name__)


SNAPSHOT_SECONDS = 60.0
SLOWEST_BYTES_PER_SECOND = 65_536  # whoever takes a slot more slowly does not get it frozen
PARALLEL_FETCHES, FROM_ONE_PEER = 4, 2  # whole slots: who sends slowly must not keep this peer from taking others


class SlotKeeper(Generic[Owner]):
    """Holds this peer's slots. Runs on the asyncio loop; the trainer's thread only sees `adopt` and `release`.

    Args:
        capacity: slots this peer may own.
        folder: where copies for others are kept.
        saved: slots found in this peer's checkpoint.
        max_slot_bytes: refuse larger snapshots.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Owner],
        exchange: Publishing[Owner],
        *,
        capacity: int,
        num_slots: int,
        folder: Path,
        saved: Mapping[int, Snapshot],
        max_slot_bytes: int,
    ) -> None:
        self._links, self._trainer, self._exchange = links, trainer, exchange
        self.capacity = capacity
        self.num_slots = num_slots
        self._copies = CopyStore(folder, saved)
        self.max_slot_bytes = max_slot_bytes
        self._rules = Rules(lease=links.manifest.ownership.lease_seconds)
        self._watch = Watch(links.peer_id)
        self._watch.remember(links.clock(), self._copies.held, self._rules)
        self.held: dict[int, int] = {}  # slot -> epoch
        self._versions: dict[int, int] = {}  # slot -> owner's step of the newest snapshot offered
        self._busy: set[int] = set()
        self._fetching, self._fetching_from = asyncio.Semaphore(PARALLEL_FETCHES), Turns(FROM_ONE_PEER)
        self._granted: dict[int, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticking = asyncio.Lock()
        self._announcing = asyncio.Lock()
        self._asked = self._announced = 0  # calls of `announce`, and up to which of them it has been done
        self._unsent: list[SurrogateDelta] = []  # announcements of slots that are in no published lease yet
        self._out_of_epochs: set[int] = set()
        self._leaving = False
        self.step = 0  # the trainer's, as last reported
        self.serving = SlotServing(links, trainer, exchange, self._copies, lambda: (self.held, self.step))

    async def recall(self) -> None:
        """Learn epochs that the directory has forgotten but the stand-ins fetched from others still name."""
        epochs = await asyncio.wrap_future(self._trainer.ask(lambda _: self._exchange.epochs()))
        self._watch.recall(self._links.clock(), epochs)

    # -- the loop --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled: look, decide, act, renew."""
        renewed = -math.inf
        while True:
            changed = self._links.news.next_change()
            await self.tick()
            now = self._links.loop.time()  # a wall clock that is set back must not stop renewals
            if now - renewed >= self._rules.lease / 4:
                renewed = now
                await self.announce()
            if not await self._links.news.wait(changed, self._rules.lease / 10):
                await self._links.read_directory()

    async def tick(self) -> None:
        """Decide and act once, on what is known now."""
        async with self._ticking:  # letting go takes time: nobody may act on a decision that another tick has acted on
            await self._tick()

    async def _tick(self) -> None:
        situation = self._situation()
        if not self._links.directory.clocks.right(self._rules.lease):  # no telling then who is gone
            situation = replace(situation, capacity=0)
        for action in decide(self._watch, situation, self._rules):
            match action:
                case ClaimFree(epoch=epoch) | TakeOver(epoch=epoch) | RequestHandover(epoch=epoch) if epoch > MAX_EPOCH:
                    self._give_up_on(action.slot)
                case Yield(slot, to_peer, epoch):
                    snapshot = await self._let_go(slot, to_peer, epoch)
                    if snapshot is not None:
                        self._spawn(slot, self._copies.store(slot, snapshot))
                case Reclaim(slot, to_peer, epoch):
                    snapshot = await self._let_go(slot, to_peer, epoch - COPY_RAISE)
                    if snapshot is not None:  # else this peer has begun to leave meanwhile
                        self._spawn(slot, self._claim_back(slot, epoch, snapshot))
                case DropStandby(slot):
                    self._copies.drop(slot)
                case ClaimFree(slot, epoch):
                    self._spawn(slot, self._claim(slot, epoch))
                case TakeOver():
                    self._spawn(action.slot, self._take_over(action))
                case RequestHandover(slot, from_peer, epoch):
                    self._spawn(slot, self._ask_for(slot, from_peer, epoch))
                case KeepStandby(slot, owner, epoch):
                    self._copies.refresh(slot, partial(self._fetch, owner, resources.snapshot(slot), epoch))
        self._report()

    def _give_up_on(self, slot: int) -> None:
        """Somebody has claimed the last epoch there is; a claim beyond would be refused by all."""
        if slot not in self._out_of_epochs:
            self._out_of_epochs.add(slot)
            log.error("slot.out_of_epochs", slot=slot)

    def _situation(self) -> Situation:
        return situation_of(
            self._links.view(),
            self._watch,
            now=self._links.clock(),
            capacity=0 if self._leaving else self.capacity,
            num_slots=self.num_slots,
            replication=self._links.manifest.ownership.replication,
            held=self.held,
            copies=self._copies.held,
            busy=self._busy,
        )

    def _spawn(self, slot: int, work: Awaitable[object]) -> None:
        self._copies.stop_refreshing(slot)
        self._busy.add(slot)

        async def guarded() -> None:
            try:
                await work
            except (FetchFailed, PeerUnreachable, Refused, SeedMissing, TransportError, ValueError, OSError) as error:
                waits = isinstance(error, Refused) and error.reason == "no-composer"  # as the worker's phase says
                (log.debug if waits else log.warning)("slot.attempt_failed", slot=slot, error=str(error))
                await asyncio.sleep(pause_after(error))  # still busy: every bit of news would try it again
            except Exception as error:  # what nobody thought of is tried again no sooner
                log.error("slot.attempt_broke", slot=slot, exc_info=error)
                await asyncio.sleep(pause_after(error))
            finally:
                self._busy.discard(slot)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- gaining and losing ----------------------------------------------------------------------------------------

    async def _acquire(self, slot: int, epoch: int, snapshot: Snapshot | None) -> None:
        tensors = None if snapshot is None else snapshot.tensors
        published = None if snapshot is None else snapshot.published
        since = 0 if snapshot is None else snapshot.copy.epoch
        await self._exchange.prepare(slot, epoch, {since} if published is None else {since, published.epoch})
        announcement = await asyncio.wrap_future(
            self._trainer.ask(lambda owner: self._exchange.adopt(owner, slot, epoch, tensors, since, published))
        )
        self.held[slot] = epoch
        self._versions[slot] = self.step
        self._copies.set_aside(slot)
        log.info("slot.owned", slot=slot, epoch=epoch)
        self._unsent.append(announcement)
        await self.announce()
        self._links.news.changed()

    async def _claim(self, slot: int, epoch: int) -> None:
        """A slot that nobody has owned yet."""
        await self._acquire(slot, epoch, await self._rebuild(slot))

    async def _rebuild(self, slot: int) -> Snapshot | None:
        """A slot from what runs in its place: as seeded, or as last published. None: the composer here knows it."""
        if await self._exchange.can_seed(slot):
            return None
        for peer in self._links.active_composers(waiting=True):
            try:
                return await self._fetch(peer, resources.rebuilt(slot))
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.info("slot.not_rebuilt", slot=slot, peer=peer, error=str(error))
        raise Refused("no-composer", f"no composer has made slot {slot}'s first state")

    async def _take_over(self, action: TakeOver) -> None:
        slot = action.slot
        own = snapshot = None if action.copy is None else await self._copies.load_or_drop(slot)
        fetch = partial(self._fetch, resource=resources.snapshot(slot))
        if snapshot is None:
            patience = self._rules.lease + self.max_slot_bytes / READ_BYTES_PER_SECOND
            snapshot = await copy_from(action.sources, fetch, slot=slot, seconds=patience)
        elif action.outdone and self._links.manifest.ownership.snapshot_format == "full":
            snapshot = await newer_than(snapshot, action.sources, fetch, slot=slot, seconds=self._rules.lease)
        if lost := snapshot is None:
            snapshot = await self._rebuild(slot)
        else:
            log.warning("slot.taken_over", slot=slot, epoch=action.epoch, copy=str(action.copy))
        try:
            await self._acquire(slot, action.epoch, snapshot)
        except ValueError as error:
            if own is None or snapshot is own:
                self._copies.drop(slot)  # if it was that one: the next try asks others
                raise
            log.warning("slot.newer_copy_refused", slot=slot, error=str(error))  # of somebody who may mean no good
            await self._acquire(slot, action.epoch, own)
        if lost:
            log.error("slot.lost", slot=slot, epoch=action.epoch, restart="from its stand-ins or the run's seed")
            self._links.state.count(Count.LOST_SLOTS)

    async def _claim_back(self, slot: int, epoch: int, snapshot: Snapshot) -> None:
        log.warning("slot.claimed_back", slot=slot, epoch=epoch, copy=str(snapshot.copy))
        await self._copies.store(slot, snapshot)  # whatever becomes of the claim; a full disk keeps nobody from it
        await self._acquire(slot, epoch, snapshot)

    async def _ask_for(self, slot: int, owner: str, epoch: int) -> None:
        await self._acquire(slot, epoch, await self._fetch(owner, resources.handover(slot), epoch - COPY_RAISE))

    async def _let_go(self, slot: int, to_peer: str, epoch: int) -> Snapshot | None:
        """Stop owning a slot. Returns its last state, unless this peer leaves: until a standby has fetched the new
        owner's it may be the only copy."""
        held = self.held.pop(slot)
        version = self._versions.pop(slot)
        if slot in self._granted:
            self._granted.pop(slot).cancel()

        def release(owner: Owner) -> tuple[SlotTensors | None, Published | None]:
            tensors = None if self._leaving else self._exchange.snapshot(owner, slot, held)
            published = self._exchange.published(owner, slot)
            self._exchange.release(owner, slot)
            return tensors, published

        tensors, published = await asyncio.wrap_future(self._trainer.ask(release))
        log.info("slot.released", slot=slot, to=to_peer, epoch=epoch)
        await self.announce()
        if tensors is None:
            self._copies.drop(slot)
            return None
        standin = None if published is None else await asyncio.to_thread(published.snapshot)
        return Snapshot(Copy(held, version), tensors, standin)

    async def _fetch(self, peer: str, resource: str, epoch: int | None = None) -> Snapshot:
        """A slot's state from a peer; raises as `opened` does."""
        async with self._fetching_from.take(peer), self._fetching:
            fetch = self._links.fetch(peer, resource, max_bytes=self.max_slot_bytes, deadline_seconds=SNAPSHOT_SECONDS)
            got = await self._links.while_here(peer, fetch)
        return await asyncio.to_thread(opened, got.data, resource, epoch)

    # -- handing over ----------------------------------------------------------------------------------------------

    async def serve_handover(self, slot: int, requester: str) -> Resource | None:
        """Freeze a held slot and give it away. Training resumes a lease after the new owner has taken its last part."""
        if not grants_handover(self._watch, self._situation(), slot, requester, self.held.get(slot, -1) + COPY_RAISE):
            raise Refused("not-granted", f"slot {slot} is not {requester}'s to have")
        full = self._links.manifest.ownership.handover == "full"

        def freeze(owner: Owner) -> None:
            owner.freeze(slot)
            if not full:  # what is published may be all that travels
                self._exchange.publish_now(owner, [slot])

        try:  # each waits for a step to end, which may take as long as a lease
            await asyncio.wrap_future(self._trainer.ask(freeze))
            given = await self.serving.snapshot(slot, full=full)
        finally:
            self._expect_claim(slot)
        if given is None:
            return None
        until = self._links.loop.time() + self._rules.lease + len(given.data) / SLOWEST_BYTES_PER_SECOND

        def taken() -> None:
            if slot in self._granted and self._links.loop.time() < until:
                self._expect_claim(slot)

        return replace(given, on_read=taken)

    def _expect_claim(self, slot: int) -> None:
        """Within a lease from now."""
        if slot in self._granted:
            self._granted.pop(slot).cancel()
        self._granted[slot] = self._links.loop.call_later(self._rules.lease, self._resume, slot)

    def _resume(self, slot: int) -> None:
        self._granted.pop(slot, None)
        if slot in self.held:
            log.warning("slot.handover_lapsed", slot=slot)
            self._trainer.ask(lambda owner: owner.thaw(slot))

    # -- announcing ------------------------------------------------------------------------------------------------

    async def announce(self) -> None:
        """Publish the leases of all held slots, then where the stand-ins of new ones stand.

        Whoever asks while that is under way waits for the next time, together: a peer that gains hundreds of slots at
        once publishes a few records, not one for each.
        """
        self._asked = wanted = self._asked + 1
        async with self._announcing:
            if self._announced >= wanted:
                return
            told = self._asked
            await self._announce()
            unsent, self._unsent = self._unsent, []
            if unsent:
                await self._exchange.send(unsent)
            self._announced = told

    async def _announce(self) -> None:
        every = self._links.manifest.ownership.snapshot_every
        for slot, version in self._versions.items():
            if self.step - version >= every:
                self._versions[slot] = self.step - self.step % every
        now = self._links.clock()
        record = LeaseRecord(
            owner=self._links.peer_id,
            leases=[Lease(slot, epoch, self._versions[slot]) for slot, epoch in sorted(self.held.items())],
            issued_at=now,
            expires_at=now + self._rules.lease,
        )
        await self._links.announce(record)
        self._report()

    def _report(self) -> None:
        updates = self._exchange.updates
        self._links.state.set_slots(
            leases=[
                LeaseSeen(slot=slot, epoch=epoch, version=self._versions[slot], updates=updates.get(slot, 0))
                for slot, epoch in self.held.items()
            ],
            standby=sorted(set(self._copies.held) - set(self.held)),
        )

    async def drain(self, seconds: float) -> None:
        """Offer every held slot to the others and wait until all are taken, or nobody has room, or time is up.

        The peer's own record must say `leaving` already: it is what makes the others ask.
        """
        self._leaving = True
        for task in list(self._tasks):  # what is not acquired by now stays with its owner
            task.cancel()
        for slot in range(self.num_slots):
            self._copies.stop_refreshing(slot)
        deadline = self._links.loop.time() + seconds
        while True:
            changed = self._links.news.next_change()
            await self.tick()  # after one that is under way: a slot that it took from `held` is let go by then
            desired = self._situation().desired
            if not any(desired[slot] for slot in self.held) or self._links.loop.time() >= deadline:
                return
            if not await self._links.news.wait(changed, min(1.0, self._rules.lease / 10)):
                await self._links.read_directory()
