"""The stand-ins of slots that others own, brought up to date beside training.

Inflating, hashing and checking deltas takes time, so the book lives on a thread of its own and moves states that
nothing runs. A finished state never changes again. The training thread puts it in place of the last one, between two
steps, and that is all that a step waits for. So the model may run an older state than the book has: `running` says
which.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec

from ...kernels.standin import StandIn
from ...protocol.experts.surrogate_book import SurrogateBook
from ...protocol.experts.surrogates import SEED, Need, Point, SlotPublisher, SlotSubscriber
from ...protocol.messages import DeltaBatch, StandInSnapshot, SurrogateDelta
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..peer.links import Links
from ..slots.slot_order import LayerOrder, moved
from ..watching.state import Count

T = TypeVar("T")

# Messages that wait for the book; when more come the oldest is dropped, and its gap repaired by a fetch.
MAX_INBOX = 256


@dataclass(frozen=True)
class Running:
    """What the model runs for a slot of somebody else, and what was known of that slot then."""

    subscriber: SlotSubscriber[StandIn]  # the one that it came from: a slot that was owned meanwhile has another
    version: int  # of the subscriber
    layers: tuple[StandIn, ...]  # nobody changes them
    point: Point
    owner: str  # by the lease; "" before one is known
    epoch: int  # by the lease


class Following:
    """Takes over the subscribers of `book`; its publishers remain the training thread's.

    Built before the trainer runs, with the composer's stand-ins at their seeded state.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Composer],
        book: SurrogateBook[StandIn],
        order: LayerOrder,
        composer: Composer,
    ) -> None:
        self._links, self._trainer, self._book, self._order = links, trainer, book, order
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stand-ins")
        self._turn = threading.Lock()  # of whoever changes the book
        self._inbox: deque[tuple[str, DeltaBatch]] = deque(maxlen=MAX_INBOX)
        self._asked_to_take = False
        self._told: dict[int, tuple[object, int, str, int]] = {}  # by slot, what the training thread was last told
        self._absorbed: dict[str, int] = {}
        self.running: dict[int, Running] = {}  # by slot; changed on the training thread
        for slot in range(composer.num_slots):
            self.follow(slot, composer.standins(slot), SEED)

    # -- training thread -------------------------------------------------------------------------------------------

    def follow(self, slot: int, layers: Sequence[StandIn], point: Point) -> None:
        """From now on, from the state that runs here, which is not to change any more."""
        with self._turn:
            subscriber = self._book.follow(slot, [copy(layer) for layer in layers], point)
            self.running[slot] = _state_of(subscriber, tuple(layers))

    def own(self, slot: int, epoch: int, point: Point) -> SlotPublisher:
        """No more; the slot is published from now on. See `SurrogateBook.own`."""
        with self._turn:
            publisher = self._book.own(slot, epoch, point)
        self.running.pop(slot, None)
        return publisher

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch heard of."""
        with self._turn:
            return self._book.epochs()

    def _run(self, changed: Mapping[int, Running], composer: Composer) -> None:
        for slot, state in changed.items():
            if self._book.subscribers.get(slot) is state.subscriber:  # else it has come or gone meanwhile
                if self.running[slot].version != state.version:
                    composer.set_standins(slot, state.layers)
                self.running[slot] = state

    # -- the book's thread -----------------------------------------------------------------------------------------

    def _take_inbox(self) -> None:
        self._asked_to_take = False  # first, so that what comes from now on asks again
        while self._inbox:
            sender, batch = self._inbox.popleft()
            self._book.receive(sender, DeltaBatch(tuple(map(self._by_layer, batch.deltas))), time.monotonic())

    def _by_layer(self, delta: SurrogateDelta) -> SurrogateDelta:
        """From the wire's order; what has the wrong number of layers stays as it is, to be refused.

        An order takes a hash for each layer: none is worked out for what does not need it. One message holds tens of
        thousands of announcements, and anybody may send it.
        """
        if delta.slot not in self._book.subscribers or len(delta.layers) != self._order.num_layers:
            return delta
        order = self._order.outward(delta.slot, delta.epoch)
        fidelity = tuple(moved(delta.fidelity, order)) if delta.fidelity else ()
        return msgspec.structs.replace(delta, layers=tuple(moved(delta.layers, order)), fidelity=fidelity)

    def _install(self, sender: str, snapshot: StandInSnapshot) -> bool:
        if len(snapshot.layers) == self._order.num_layers:
            order = self._order.outward(snapshot.slot, snapshot.epoch)
            snapshot = msgspec.structs.replace(snapshot, layers=tuple(moved(snapshot.layers, order)))
        return self._book.install(sender, snapshot, time.monotonic())

    def _learn_leases(self, leases: Iterable[tuple[int, str, int]]) -> None:
        for slot, owner, epoch in leases:
            self._book.lease(slot, owner, epoch, time.monotonic())

    def _disown(self, owner: str) -> None:
        for subscriber in self._book.subscribers.values():
            if subscriber.owner == owner:
                subscriber.disown()

    def _hand_over(self) -> None:
        """Let the model run the stand-ins that the book holds now, and report what it refused."""
        changed = {}
        for slot, subscriber in self._book.subscribers.items():
            known = (subscriber, subscriber.version, subscriber.owner, subscriber.epoch)
            if self._told.get(slot) != known:
                self._told[slot] = known
                changed[slot] = _state_of(subscriber, tuple(copy(layer) for layer in subscriber.layers))
        if changed:
            self._trainer.ask(partial(self._run, changed))
        for reason, total in self._book.refusals.items():
            new = total - self._absorbed.get(reason, 0)
            if new:
                self._links.state.count(Count.REFUSALS, f"delta-{reason}", by=new)
                self._absorbed[reason] = total

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    async def _on_book(self, work: Callable[[], T]) -> T:
        """Run `work` on the book's thread, after what came before it."""

        def turn() -> T:
            with self._turn:
                result = work()
                self._hand_over()
                return result

        return await self._links.loop.run_in_executor(self._thread, turn)

    def receive(self, sender: str, batch: DeltaBatch) -> None:
        """Deltas that came by gossip, their envelope already verified."""
        if len(self._inbox) == MAX_INBOX:
            self._links.state.count(Count.GOSSIP_DROPPED, "inbox")
        self._inbox.append((sender, batch))
        if not self._asked_to_take:
            self._asked_to_take = True
            self._links.spawn(self._on_book(self._take_inbox))

    def learn(self, leases: Sequence[tuple[int, str, int]]) -> None:
        """By (slot, owner, epoch) who has which lease now."""
        self._links.spawn(self._on_book(lambda: self._learn_leases(leases)))

    def disown(self, owner: str) -> None:
        """Believe nothing more of what `owner` publishes."""
        self._links.spawn(self._on_book(lambda: self._disown(owner)))

    async def install(self, sender: str, snapshot: StandInSnapshot) -> bool:
        """Take a state that was fetched from a slot's owner; the model runs it on return. False if it was refused."""
        installed = await self._on_book(lambda: self._install(sender, snapshot))
        await asyncio.wrap_future(self._trainer.ask(lambda _: None))  # behind the state itself
        return installed

    async def needs(self) -> list[Need]:
        """What to fetch now."""
        return await self._on_book(lambda: self._book.needs(time.monotonic()))


def _state_of(subscriber: SlotSubscriber[StandIn], layers: tuple[StandIn, ...]) -> Running:
    return Running(subscriber, subscriber.version, layers, subscriber.point, subscriber.owner, subscriber.epoch)
