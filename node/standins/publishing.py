"""Owned slots towards the outside: publishing their stand-ins, giving them away, taking them over.

The same for composers and workers; what only composers do, following the stand-ins of others, is in `exchange.py`.
Everything here that touches an owner runs on the training thread; the loop's side sends. Publications that take long
are made on a thread of their own (`fitting.py`), one at a time; between two steps, or after the last one, the training
thread puts what was made in place, numbers it and has it sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from typing import Generic

from torch import Tensor

from ...kernels.standin import Menu, StandIn
from ...protocol import messages
from ...protocol.errors import ShoalError
from ...protocol.experts.surrogate_book import SurrogateBook
from ...protocol.experts.surrogates import SEED, Point, SlotPublisher, state_digest
from ...protocol.messages import StandInSnapshot, SurrogateDelta
from ..learning.owning import Owner
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import DELTA_TOPIC, Links
from ..slots.slot_formats import unpacked
from ..slots.slot_order import SlotOrder, inverse, moved, renamed
from ..slots.slot_state import SlotTensors
from ..watching.state import Count
from .publication import Publication

log = get_logger(__name__)


# Times that slots may fall due again before the fits that they wait for have begun; then training waits too. Else a
# machine without a core to spare would go on with stand-ins of any age, and so would everybody who runs them.
MOST_SKIPPED = 1
ANNOUNCE_EVERY_SECONDS = 4.0  # while no deltas flow: so that a lost last one is noticed


class ExpertDiverged(ShoalError):
    """An owned expert's weights are not finite, or far too large: nothing can be published of it."""

    code = "SHOAL-235"


@dataclass(frozen=True)
class Published:
    """What stands in for a slot's experts at one moment. Its bytes are made by whoever wants them, on any thread."""

    slot: int
    point: Point
    layers: tuple[StandIn, ...]  # in the wire's order; nobody changes them

    def snapshot(self) -> StandInSnapshot:
        """As it travels."""
        layers = tuple(layer.to_bytes() for layer in self.layers)
        return StandInSnapshot(self.slot, self.point.epoch, self.point.seq, layers, state_digest(self.layers))


class Publishing(Generic[Owner]):
    """One owner's slots.

    Args:
        menu: of the run's stand-ins. A peer's of another form is as good as malformed.
    """

    def __init__(self, links: Links, trainer: Trainer[Owner], order: SlotOrder, menu: Menu) -> None:
        self._links, self._trainer, self.order = links, trainer, order
        self._load = menu.load
        self._book: SurrogateBook[StandIn] = SurrogateBook(self._load)
        self.updates: Mapping[int, int] = {}  # by slot, `ExpertOwner.updates` as of late; never changed
        self._making: Future[float] | None = None  # the publication that is being made
        self._late: set[int] = set()  # slots that have fallen due meanwhile
        self._skipped = 0  # times that some of them did again
        self._last_sent = -math.inf

    # -- training thread -------------------------------------------------------------------------------------------

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch heard of."""
        return self._book.epochs()

    def point(self, slot: int) -> Point | None:
        """What has been published of a slot that is owned here; None if it is not."""
        publisher = self._book.publishers.get(slot)
        return None if publisher is None else publisher.point

    def publish(self, owner: Owner, slots: Collection[int] | None = None) -> None:
        """Publish all owned slots, or these: here and now, or beside training if that takes long.

        What falls due while a publication is being made is published when that is done, once; training waits for it
        where it has fallen due `MOST_SKIPPED` times too often.
        """
        due = set(owner.published_by_default() if slots is None else slots)
        if not due:
            return
        if not owner.publishes_beside:
            self.publish_now(owner, due)
        elif self._making is not None:
            again = due & self._late
            self._links.state.count(Count.FITS_SKIPPED, by=len(again))
            self._skipped += bool(again)
            self._trainer.held = self._skipped >= MOST_SKIPPED
            self._late |= due
        else:
            publication = self._begin(owner, due)
            self._making = self._trainer.fits.begin(publication, owner)
            self._making.add_done_callback(
                lambda made: self._trainer.require(lambda owner: self._made(owner, publication, made))
            )

    def publish_now(self, owner: Owner, slots: Collection[int]) -> None:
        """Publish these before the next step. What is being made of them is not published any more."""
        publication = self._begin(owner, slots)
        with _diverging():
            publication.make()
        self._finish(owner, publication)

    def _begin(self, owner: Owner, slots: Collection[int]) -> Publication:
        self.updates = {slot: owner.updates(slot) for slot in owner.owned}
        return owner.begin_publication(slots)

    def _made(self, owner: Owner, publication: Publication, made: Future[float]) -> None:
        """On the training thread, between steps. An error in what was made ends the training, as one in a step does."""
        self._making, self._skipped, self._trainer.held = None, 0, False
        with _diverging():
            self._links.state.count(Count.FIT_SECONDS, by=made.result())
        self._finish(owner, publication)
        late, self._late = self._late & set(owner.published_by_default()), set()
        self.publish(owner, late)

    def _finish(self, owner: Owner, publication: Publication) -> None:
        deltas = []
        for slot, made in owner.finish_publication(publication).items():
            publisher = self._book.publishers[slot]
            if not made.deltas:  # a stand-in has another form now
                deltas.append(publisher.replace(publication.step, owner.standins(slot)))
                continue
            outward = self.order.outward(slot, publisher.epoch)
            deltas.append(
                publisher.publish(
                    publication.step,
                    [made.deltas[position] for position in outward],
                    owner.standins(slot),
                    [made.fidelity[position] for position in outward] if made.fidelity else (),
                )
            )
        self._links.state.set_fidelity({i: f for i, f in enumerate(owner.fidelity()) if math.isfinite(f)})
        self._links.loop.call_soon_threadsafe(self._send_soon, deltas)

    def adopt(
        self,
        owner: Owner,
        slot: int,
        epoch: int,
        tensors: SlotTensors | None,
        tensors_epoch: int,
        published: StandInSnapshot | None,
    ) -> SurrogateDelta:
        """Own a slot from now on; returns the announcement to send.

        What others hold is the newer of what was followed here and what the former owner says it had published.

        Args:
            tensors: the slot's state, in the wire's order of `tensors_epoch`; None restarts it.

        Raises:
            ValueError: see `ExpertOwner.adopt`; nothing has changed then.
            Refused: the order of `tensors_epoch` is not known here.
        """
        if slot in self._book.publishers:
            raise ValueError(f"slot {slot} is owned already")
        followed = self._followed(slot)
        point, layers = SEED if followed is None else followed, None
        if published is not None and (followed is None or Point(published.epoch, published.seq) > point):
            point = Point(published.epoch, published.seq)
            positions = self.order.positions(slot, published.epoch, epoch)
            layers = moved([self._load(data) for data in published.layers], positions)
        if tensors is not None:
            positions = self.order.positions(slot, tensors_epoch, epoch)
            standins = owner.standins(slot) if layers is None else layers
            tensors = unpacked(renamed(tensors, positions), owner, standins)
        owner.adopt(slot, tensors, layers)
        self.updates = {**self.updates, slot: owner.updates(slot)}
        publisher = self._own(slot, epoch, point)
        return publisher.announce(owner.step, owner.standins(slot))

    def _followed(self, slot: int) -> Point | None:
        """Which stand-ins run here for a slot of somebody else; None if there are none."""
        return None

    def _own(self, slot: int, epoch: int, point: Point) -> SlotPublisher:
        return self._book.own(slot, epoch, point)

    def release(self, owner: Owner, slot: int) -> None:
        """Stop owning a slot."""
        del self._book.publishers[slot]
        owner.release(slot)

    def snapshot(self, owner: Owner, slot: int, epoch: int) -> SlotTensors:
        """An owned slot in full, in the wire's order."""
        return self.to_wire(slot, epoch, owner.snapshot(slot))

    def weights(self, owner: Owner, slot: int, epoch: int) -> SlotTensors:
        """What an owned slot computes with, in the wire's order."""
        return self.to_wire(slot, epoch, owner.weights(slot))

    def to_wire(self, slot: int, epoch: int, tensors: dict[str, Tensor]) -> SlotTensors:
        """Tensors by position, in the wire's order of an epoch."""
        return renamed(tensors, inverse(self.order.outward(slot, epoch)))

    def published(self, owner: Owner, slot: int) -> Published | None:
        """What this peer holds of a slot's stand-ins; None if it holds nothing."""
        publisher = self._book.publishers.get(slot)
        if publisher is None:
            return None
        standins, point = owner.standins(slot), publisher.point
        order = self.order.outward(slot, point.epoch)
        return Published(slot, point, tuple(copy(standins[position]) for position in order))

    def _announcements(self, owner: Owner) -> list[SurrogateDelta]:
        return [p.announce(owner.step, owner.standins(slot)) for slot, p in self._book.publishers.items()]

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    async def settle(self, seconds: float) -> float:
        """Wait until all that was due is published, for so long at most; returns the seconds that it took.

        Nothing else may fall due meanwhile: training is paused.
        """
        began = time.monotonic()
        while (making := await asyncio.wrap_future(self._trainer.ask(lambda _: self._making))) is not None:
            left = began + seconds - time.monotonic()
            done, _ = await asyncio.wait([asyncio.wrap_future(making)], timeout=left)
            if not done:
                log.warning("standin.not_published", waited_seconds=seconds)
                break
        return time.monotonic() - began

    def rebuilt(self, owner: Owner, slot: int) -> tuple[SlotTensors, Published] | None:
        """A state for a slot that nobody holds, in the wire's order of what is published; None if there is none."""
        return None

    async def can_seed(self, slot: int) -> bool:
        """Whether `adopt` can do without a state; whatever it needs for that is here then."""
        return False

    async def prepare(self, slot: int, epoch: int, from_epochs: Collection[int]) -> None:
        """Learn what `adopt` will need to know. Refused or FetchFailed if that cannot be had."""

    def _send_soon(self, deltas: list[SurrogateDelta]) -> None:
        self._links.spawn(self.send(deltas))

    async def send(self, deltas: Sequence[SurrogateDelta]) -> None:
        """Gossip deltas or announcements, in as few messages as hold them."""
        self._last_sent = time.monotonic()
        for batch in messages.batches(deltas):
            await self._links.gossip(DELTA_TOPIC, batch)


@contextlib.contextmanager
def _diverging() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ExpertDiverged(
            f"an expert's weights are of no use any more: {error}",
            fix="start this peer again, it goes on from its last checkpoint; if it happens again, the run's learning "
            "rate is too high",
        ) from error
