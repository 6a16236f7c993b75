"""Stand-ins as a composer lives them: publishing its own, applying everybody else's, repairing what gossip lost.

The order of deltas is `protocol/experts/surrogates.py`'s business, their content the kernels'; `following.py` applies
those of others beside training. This file carries messages there and back. It also passes on routing counts, which the
load-balance loss wants from the whole swarm.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...protocol import messages, resources
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused
from ...protocol.experts.surrogates import SEED, Need, Point, SlotPublisher
from ...protocol.messages import DeltaBatch, ExpertCounts, StandInSnapshot, SurrogateDelta
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import COUNTS_TOPIC, Links
from ..slots.slot_order import LayerOrder
from ..slots.slot_state import SlotTensors
from .following import Following
from .publishing import ANNOUNCE_EVERY_SECONDS, Published, Publishing
from .saving import SavedStandIns, standins_to_save

log = get_logger(__name__)

REPAIR_EVERY_SECONDS = 1.0
FETCH_SECONDS = 30.0
COUNTS_LIVE_SECONDS = 60.0  # a composer that reported nothing for longer does not weigh on the balance loss


@dataclass(frozen=True)
class Target:
    """Who trains a slot, under which lease, and which of its stand-ins runs here."""

    owner: str
    epoch: int
    seq: int


class Exchange(Publishing[Composer]):
    """Built before the trainer runs, with the composer's stand-ins at their seeded state."""

    def __init__(
        self, links: Links, trainer: Trainer[Composer], composer: Composer, order: LayerOrder, *, max_standin_bytes: int
    ) -> None:
        self.menu, self.shape = composer.menu, composer.shape
        super().__init__(links, trainer, order, self.menu)
        self.layers = order
        self._max_standin_bytes = max_standin_bytes
        self._following = Following(links, trainer, self._book, order, composer)
        self._leases: dict[int, tuple[str, int]] = {}
        self._repairing: set[Need] = set()  # fetches under way
        self._recalled: dict[int, int] = {}  # epochs by slot, of the checkpoint that this peer goes on from
        self.fetch_first: Callable[[int], Awaitable[None]] | None = None  # a slot's first experts, where they are far
        self._others_counts: dict[str, tuple[float, Tensor]] = {}

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Publish what is due."""
        if not composer.came_round(self._links.manifest.standin.publish_every):
            return
        self.publish(composer)
        if composer.last_counts is not None:
            composer.swarm_counts = self._counts_of_others(composer.last_counts)
            of_a_batch = composer.last_counts // composer.last_batches  # others take no more
            counts = tuple(tuple(row) for row in of_a_batch.tolist())
            self._links.loop.call_soon_threadsafe(self._tell_counts, ExpertCounts(composer.step, counts))

    def _counts_of_others(self, own: Tensor) -> Tensor | None:
        """The sum of the other composers' newest (L, E) counts. Their steps are as large as ours: more is a lie."""
        now = time.monotonic()
        counts = [
            theirs
            for at, theirs in self._others_counts.values()
            if now - at < COUNTS_LIVE_SECONDS
            and theirs.shape == own.shape
            and bool((theirs.sum(1) <= own.sum(1)).all())
        ]
        return torch.stack(counts).sum(0) if counts else None

    @property
    def followed(self) -> Collection[int]:
        """Slots of which others' stand-ins run here. Read it where nothing is adopted or released meanwhile."""
        return self._following.running.keys()

    def owners(self) -> dict[int, Target]:
        """By slot that others own who does, as far as it is known here."""
        return {
            slot: Target(running.owner, running.epoch, running.point.seq)
            for slot, running in self._following.running.items()
            if running.owner
        }

    def restore(self, composer: Composer, saved: Mapping[int, SavedStandIns]) -> None:
        """Run what a checkpoint had of all slots, until their owners say better. Before the trainer runs.

        It counts as of no lease: whoever owns the slot now may have gone on from anything.
        """
        for slot, state in saved.items():
            self._recalled[slot] = state.epoch
            if state.layers:
                composer.set_standins(slot, state.layers)
                self._following.follow(slot, state.layers, Point(0, state.seq))

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """See `standins_to_save`."""
        own = {slot: publisher.point for slot, publisher in self._book.publishers.items()}
        return standins_to_save(self._following.running, own, self._recalled)

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch heard of; of those that somebody has, however low his is, no other."""
        heard, known = self._following.epochs(), self._leases.keys()
        recalled = {slot: epoch for slot, epoch in self._recalled.items() if slot not in known}
        return {slot: max(heard.get(slot, 0), recalled.get(slot, 0)) for slot in heard | recalled}

    def _followed(self, slot: int) -> Point | None:
        running = self._following.running.get(slot)
        return None if running is None else running.point

    def _own(self, slot: int, epoch: int, point: Point) -> SlotPublisher:
        return self._following.own(slot, epoch, point)

    def adopt(
        self,
        owner: Composer,
        slot: int,
        epoch: int,
        tensors: SlotTensors | None,
        tensors_epoch: int,
        published: StandInSnapshot | None,
    ) -> SurrogateDelta:
        if tensors is None and self._followed(slot) not in (None, SEED):
            rebuilt = self.rebuilt(owner, slot)
            assert rebuilt is not None
            tensors, tensors_epoch = rebuilt[0], rebuilt[1].point.epoch
        announcement = super().adopt(owner, slot, epoch, tensors, tensors_epoch, published)
        if owner.collector is not None:
            owner.collector.forget(slot)
        return announcement

    def release(self, owner: Composer, slot: int) -> None:
        """Follow a slot that was owned so far."""
        point = self._book.publishers[slot].point
        owner.release(slot)
        self._following.follow(slot, owner.standins(slot), point)
        self._leases.pop(slot, None)
        if owner.collector is not None:
            owner.collector.forget(slot)  # what it was trained on here is nothing that its next owner has to learn

    def followed_standins(self, slot: int) -> tuple[Point | None, list[bytes]]:
        """The stand-ins that run here for a slot of somebody else, by layer, and which they are."""
        running = self._following.running.get(slot)
        return (None, []) if running is None else (running.point, [layer.to_bytes() for layer in running.layers])

    def published(self, owner: Composer, slot: int) -> Published | None:
        own = super().published(owner, slot)
        if own is not None:
            return own
        running = self._following.running[slot]
        order = self.order.outward(slot, running.point.epoch)
        return Published(slot, running.point, tuple(running.layers[layer] for layer in order))

    async def can_seed(self, slot: int) -> bool:
        if self.fetch_first is not None:
            await self.fetch_first(slot)
        return True

    def rebuilt(self, owner: Composer, slot: int) -> tuple[SlotTensors, Published] | None:
        point = self._followed(slot)
        if point is None:
            return None
        published = self.published(owner, slot)
        assert published is not None
        seeded = point == SEED
        tensors = {}
        for layer, expert in enumerate(owner.first_experts(slot) if seeded else owner.experts_from_standins(slot)):
            tensors[f"{layer}.gate_up"], tensors[f"{layer}.down"] = expert.gate_up.clone(), expert.down.clone()
        return self.to_wire(slot, published.point.epoch, tensors), published

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _tell_counts(self, counts: ExpertCounts) -> None:
        self._links.spawn(self._links.gossip(COUNTS_TOPIC, counts))

    def on_deltas(self, sender: str, batch: DeltaBatch) -> None:
        """Deltas that came by gossip, their envelope already verified."""
        if sender != self._links.peer_id:
            self._following.receive(sender, batch)

    def on_counts(self, sender: str, message: ExpertCounts) -> None:
        """Another composer's routing counts."""
        if sender == self._links.peer_id or sender not in self._links.active_composers():
            return
        now = time.monotonic()
        live = {p: e for p, e in self._others_counts.items() if now - e[0] < COUNTS_LIVE_SECONDS}
        self._others_counts = {**live, sender: (now, torch.tensor(message.counts))}  # anew: the trainer reads the old

    def on_leases(self) -> None:
        """The directory's claims may have changed: tell the book."""
        claims = {slot: (c.owner, c.epoch) for slot, c in self._links.view().leases.items()}
        new = [(slot, *claim) for slot, claim in claims.items() if self._leases.get(slot) != claim]
        if new:
            self._leases.update({slot: (owner, epoch) for slot, owner, epoch in new})
            self._following.learn(new)

    def distrust(self, owner: str) -> None:
        """Follow a peer's deltas no more; the slots that it had wait for their next owner."""
        self._leases = {slot: claim for slot, claim in self._leases.items() if claim[0] != owner}
        self._following.disown(owner)
        self.on_leases()

    async def fetch_standin(self, slot: int, owner: str) -> bool:
        """Replace a slot's stand-ins by what its owner has published. False if that did not work."""
        try:
            got = await self._links.fetch(
                owner, resources.standin(slot), max_bytes=self._max_standin_bytes, deadline_seconds=FETCH_SECONDS
            )
            snapshot = messages.decode(got.data, StandInSnapshot)
        except (FetchFailed, PeerUnreachable, Refused) as error:
            log.info("standin.fetch_failed", slot=slot, owner=owner, error=str(error))
            return False
        return await self._following.install(owner, snapshot)

    async def _repair(self, need: Need) -> None:
        try:
            await self.fetch_standin(need.slot, need.from_peer)
        finally:
            self._repairing.discard(need)

    async def run(self) -> None:
        """Until cancelled: fetch what the book says is missing, and announce own slots while they are quiet."""
        while True:
            await asyncio.sleep(REPAIR_EVERY_SECONDS)
            self.on_leases()  # news of some came by the directory only
            for need in await self._following.needs():
                if need not in self._repairing:  # one that sends slowly must not hold up what others send
                    self._repairing.add(need)
                    self._links.spawn(self._repair(need))
            if time.monotonic() - self._last_sent > ANNOUNCE_EVERY_SECONDS:
                quiet = await asyncio.wrap_future(self._trainer.ask(self._announcements))
                if quiet:
                    await self.send(quiet)
