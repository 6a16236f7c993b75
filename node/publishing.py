"""Owned slots towards the outside: publishing their stand-ins, giving them away, taking them over.

The same for composers and workers; what only composers do, following the stand-ins of others, is in `exchange.py`.
Everything here that touches an owner runs on the training thread; the loop's side sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from ..kernels.standin import StandIn, standin_from_bytes
from ..protocol import messages
from ..protocol.messages import StandInSnapshot, SurrogateDelta
from ..protocol.surrogates import SEED, Point, SurrogateBook
from .links import DELTA_TOPIC, Links
from .owning import ExpertOwner, SlotTensors
from .slot_formats import unpacked
from .slot_order import SlotOrder, inverse, moved, renamed
from .trainer import Trainer

O = TypeVar("O", bound=ExpertOwner)  # noqa: E741 - the owner's type

FIDELITY_EVERY = 4  # publications; measuring costs about as much as publishing
FIRST_FIDELITY = 1
ANNOUNCE_EVERY_SECONDS = 4.0  # while no deltas flow: so that a lost last one is noticed


class Publishing(Generic[O]):
    """One owner's slots.

    Args:
        like: any stand-in of the run. A peer's of another kind or size is as good as malformed.
    """

    def __init__(self, links: Links, trainer: Trainer[O], order: SlotOrder, like: StandIn) -> None:
        self._links, self._trainer, self.order = links, trainer, order
        self._load = partial(standin_from_bytes, like=like)
        self._book: SurrogateBook[StandIn] = SurrogateBook(self._load)
        self._published = 0
        self._last_sent = -math.inf

    # -- training thread -------------------------------------------------------------------------------------------

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch heard of."""
        return self._book.epochs()

    def point(self, slot: int) -> Point | None:
        """What has been published of a slot that is owned here; None if it is not."""
        publisher = self._book.publishers.get(slot)
        return None if publisher is None else publisher.point

    def publish(self, owner: O, slots: Collection[int] | None = None) -> None:
        """Send deltas of all owned slots, or of these. Costs the refit and the deltas; sending is the loop's."""
        if not owner.owned:
            return
        self._published += 1
        measured = self._published % FIDELITY_EVERY == FIRST_FIDELITY
        if measured:
            self._links.state.set_fidelity({i: f for i, f in enumerate(owner.fidelity()) if math.isfinite(f)})
        deltas = []
        for slot, layers in owner.publish(slots).items():
            publisher = self._book.publishers[slot]
            outward = self.order.outward(slot, publisher.epoch)
            fidelity = owner.fidelity_of(slot) if measured else ()
            deltas.append(
                publisher.publish(
                    owner.step,
                    [layers[position] for position in outward],
                    owner.standins(slot),
                    [fidelity[position] for position in outward] if fidelity else (),
                )
            )
        self._links.loop.call_soon_threadsafe(self._send_soon, deltas)

    def adopt(
        self,
        owner: O,
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
        followed = self._book.subscribers.get(slot)
        point, layers = SEED if followed is None else followed.point, None
        if published is not None and (followed is None or Point(published.epoch, published.seq) > point):
            point = Point(published.epoch, published.seq)
            positions = self.order.positions(slot, published.epoch, epoch)
            layers = moved([self._load(data) for data in published.layers], positions)
        if tensors is not None:
            positions = self.order.positions(slot, tensors_epoch, epoch)
            standins = owner.standins(slot) if layers is None else layers
            tensors = unpacked(renamed(tensors, positions), owner, standins)
        owner.adopt(slot, tensors, layers)
        publisher = self._book.own(slot, epoch, point)
        return publisher.announce(owner.step, owner.standins(slot))

    def release(self, owner: O, slot: int) -> None:
        """Stop owning a slot."""
        del self._book.publishers[slot]
        owner.release(slot)

    def snapshot(self, owner: O, slot: int, epoch: int) -> SlotTensors:
        """An owned slot in full, in the wire's order."""
        return self.to_wire(slot, epoch, owner.snapshot(slot))

    def weights(self, owner: O, slot: int, epoch: int) -> SlotTensors:
        """What an owned slot computes with, in the wire's order."""
        return self.to_wire(slot, epoch, owner.weights(slot))

    def to_wire(self, slot: int, epoch: int, tensors: dict[str, Tensor]) -> SlotTensors:
        """Tensors by position, in the wire's order of an epoch."""
        return renamed(tensors, inverse(self.order.outward(slot, epoch)))

    def published(self, owner: O, slot: int) -> StandInSnapshot | None:
        """What this peer holds of a slot's stand-ins, in the wire's order; None if it holds nothing."""
        publisher = self._book.publishers.get(slot)
        if publisher is None:
            return None
        standins = owner.standins(slot)
        return publisher.snapshot([standins[position] for position in self.order.outward(slot, publisher.epoch)])

    def _announcements(self, owner: O) -> list[SurrogateDelta]:
        return [p.announce(owner.step, owner.standins(slot)) for slot, p in self._book.publishers.items()]

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def rebuilt(self, owner: O, slot: int) -> tuple[SlotTensors, StandInSnapshot] | None:
        """A state for a slot that nobody holds, in the wire's order of the snapshot's epoch; None if there is none."""
        return None

    @property
    def can_seed(self) -> bool:
        """Whether `adopt` can do without a state."""
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
