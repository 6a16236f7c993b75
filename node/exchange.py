"""Stand-ins as a peer lives them: publishing its own, applying everybody else's, repairing what gossip lost.

The order of deltas is `protocol/surrogates.py`'s business, their content the kernels'. Both change what the composer
computes with, so every touch of the book happens on the training thread, between two steps; this file carries messages
there and back. It also passes on routing counts, which the load-balance loss wants from the whole swarm.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels.standin import StandIn, standin_from_bytes
from ..protocol import messages, resources
from ..protocol.errors import FetchFailed, PeerUnreachable, Refused
from ..protocol.messages import DeltaBatch, ExpertCounts, StandInSnapshot, SurrogateDelta
from ..protocol.surrogates import SEED, Point, SurrogateBook
from .composer import Composer, SlotTensors
from .links import DELTA_TOPIC, NEWS_TOPIC, Links
from .logs import get_logger
from .state import Count
from .trainer import Trainer

log = get_logger(__name__)

REPAIR_EVERY_SECONDS = 1.0
ANNOUNCE_EVERY_SECONDS = 4.0  # while no deltas flow: so that a lost last one is noticed
FETCH_SECONDS = 30.0
FIDELITY_EVERY = 4  # publications; measuring costs about as much as publishing
# Messages that wait while a step runs; when more come the oldest is dropped, and its gap repaired by a fetch.
MAX_INBOX = 256
COUNTS_LIVE_SECONDS = 60.0  # a composer that reported nothing for longer does not weigh on the balance loss


class Exchange:
    """Built before the trainer runs, with the composer's stand-ins at their seeded state."""

    def __init__(self, links: Links, trainer: Trainer, composer: Composer, *, max_standin_bytes: int) -> None:
        self._links, self._trainer = links, trainer
        self._max_standin_bytes = max_standin_bytes
        # A peer's stand-in of another kind or size is as good as malformed: the model could not run it.
        self._load = partial(standin_from_bytes, like=composer.standins(0)[0])
        self._book: SurrogateBook[StandIn] = SurrogateBook(self._load)
        for slot in range(composer.num_slots):
            self._book.follow(slot, composer.standins(slot), SEED)
        self._versions = dict.fromkeys(range(composer.num_slots), 0)  # of the stand-ins that the model runs
        self._published = 0
        self._last_sent = -math.inf
        self._leases: dict[int, tuple[str, int]] = {}
        self._inbox: deque[tuple[str, DeltaBatch]] = deque(maxlen=MAX_INBOX)
        self._asked_to_take = False
        self._others_counts: dict[str, tuple[float, Tensor]] = {}
        self._absorbed: dict[str, int] = {}

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Publish what is due. Costs the refit and the deltas; sending is the loop's."""
        if composer.step % self._links.manifest.standin.publish_every:
            return
        if composer.owned:
            self._published += 1
            fidelity: Sequence[float] = ()
            if self._published % FIDELITY_EVERY == 0:
                fidelity = composer.fidelity()
                self._links.state.set_fidelity({i: f for i, f in enumerate(fidelity) if math.isfinite(f)})
                fidelity = fidelity if all(map(math.isfinite, fidelity)) else ()
            deltas = [
                self._book.publishers[slot].publish(composer.step, layers, composer.standins(slot), fidelity)
                for slot, layers in composer.publish().items()
            ]
            self._links.loop.call_soon_threadsafe(self._send_soon, deltas)
        if composer.last_counts is not None:
            composer.swarm_counts = self._counts_of_others(composer.last_counts)
            counts = tuple(tuple(row) for row in composer.last_counts.tolist())
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
        return self._book.subscribers.keys()

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch heard of."""
        return self._book.epochs()

    def adopt(
        self,
        composer: Composer,
        slot: int,
        epoch: int,
        tensors: SlotTensors | None,
        published: StandInSnapshot | None,
    ) -> SurrogateDelta:
        """Own a slot from now on; returns the announcement to send.

        What others hold is the newer of what was followed here and what the former owner says it had published.

        Raises:
            ValueError: see `Composer.adopt`; the slot is followed as before.
        """
        if slot not in self._book.subscribers:
            raise ValueError(f"slot {slot} is owned already")
        followed = self._book.subscribers[slot]
        point, layers = followed.point, None
        if published is not None and Point(published.epoch, published.seq) > point:
            point = Point(published.epoch, published.seq)
            layers = [self._load(data) for data in published.layers]
        composer.adopt(slot, tensors, layers)
        publisher = self._book.own(slot, epoch, point)
        return publisher.announce(composer.step, composer.standins(slot))

    def release(self, composer: Composer, slot: int) -> None:
        """Follow a slot that was owned so far."""
        point = self._book.publishers[slot].point
        composer.release(slot)
        self._book.follow(slot, composer.standins(slot), point)
        self._versions[slot] = 0
        self._leases.pop(slot, None)

    def published(self, composer: Composer, slot: int) -> StandInSnapshot:
        """What this peer holds of a slot's stand-ins."""
        if slot in self._book.publishers:
            return self._book.publishers[slot].snapshot(composer.standins(slot))
        return self._book.subscribers[slot].snapshot()

    def _take_inbox(self, composer: Composer) -> None:
        self._asked_to_take = False  # first, so that what comes from now on asks again
        while self._inbox:
            sender, batch = self._inbox.popleft()
            self._book.receive(sender, batch, time.monotonic())
        self._run_changed(composer)

    def _install(self, composer: Composer, sender: str, snapshot: StandInSnapshot) -> bool:
        installed = self._book.install(sender, snapshot, time.monotonic())
        self._run_changed(composer)
        return installed

    def _learn_leases(self, composer: Composer, leases: list[tuple[int, str, int]]) -> None:
        for slot, owner, epoch in leases:
            self._book.lease(slot, owner, epoch, time.monotonic())
        self._run_changed(composer)

    def _run_changed(self, composer: Composer) -> None:
        """Let the model run the stand-ins that the book holds now, and report what it refused."""
        for slot, subscriber in self._book.subscribers.items():
            if subscriber.version != self._versions[slot]:
                composer.set_standins(slot, subscriber.layers)
                self._versions[slot] = subscriber.version
        for reason, total in self._book.refusals.items():
            new = total - self._absorbed.get(reason, 0)
            if new:
                self._links.state.count(Count.REFUSALS, f"delta-{reason}", by=new)
                self._absorbed[reason] = total

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _send_soon(self, deltas: list[SurrogateDelta]) -> None:
        self._links.spawn(self.send(deltas))

    async def send(self, deltas: Sequence[SurrogateDelta]) -> None:
        """Gossip deltas or announcements, in as few messages as hold them."""
        self._last_sent = time.monotonic()
        for batch in messages.batches(deltas):
            await self._links.gossip(DELTA_TOPIC, batch)

    def _tell_counts(self, counts: ExpertCounts) -> None:
        self._links.spawn(self._links.gossip(NEWS_TOPIC, counts))

    def on_deltas(self, sender: str, batch: DeltaBatch) -> None:
        """Deltas that came by gossip, their envelope already verified."""
        if sender == self._links.peer_id:
            return
        if len(self._inbox) == MAX_INBOX:
            self._links.state.count(Count.GOSSIP_DROPPED, "inbox")
        self._inbox.append((sender, batch))
        if not self._asked_to_take:
            self._asked_to_take = True
            self._trainer.ask(self._take_inbox)

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
            self._trainer.ask(lambda composer: self._learn_leases(composer, new))

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
        return await asyncio.wrap_future(self._trainer.ask(lambda c: self._install(c, owner, snapshot)))

    async def run(self) -> None:
        """Until cancelled: fetch what the book says is missing, and announce own slots while they are quiet."""
        while True:
            await asyncio.sleep(REPAIR_EVERY_SECONDS)
            self.on_leases()  # news of some came by the directory only
            needs = await asyncio.wrap_future(self._trainer.ask(lambda _: self._book.needs(time.monotonic())))
            await asyncio.gather(*(self.fetch_standin(need.slot, need.from_peer) for need in needs))
            if time.monotonic() - self._last_sent > ANNOUNCE_EVERY_SECONDS:
                quiet = await asyncio.wrap_future(self._trainer.ask(self._announcements))
                if quiet:
                    await self.send(quiet)

    def _announcements(self, composer: Composer) -> list[SurrogateDelta]:
        return [p.announce(composer.step, composer.standins(slot)) for slot, p in self._book.publishers.items()]
