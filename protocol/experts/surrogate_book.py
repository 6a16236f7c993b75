"""All slots of a run on one peer: whose stand-ins it follows, and which it publishes. See `surrogates.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic

from ..errors import Refused
from ..messages import DeltaBatch, StandInSnapshot
from .surrogates import SEED, Need, Patience, Point, S, SlotPublisher, SlotSubscriber


@dataclass
class SurrogateBook(Generic[S]):
    """All slots of a run on one peer: those it follows and those it publishes."""

    load: Callable[[bytes], S]
    patience: Patience = field(default_factory=Patience)
    subscribers: dict[int, SlotSubscriber[S]] = field(default_factory=dict)
    publishers: dict[int, SlotPublisher] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)  # by reason

    def follow(self, slot: int, layers: Sequence[S], point: Point = SEED) -> SlotSubscriber[S]:
        """Starts, or after having owned it resumes, following a slot from a state held here."""
        self.publishers.pop(slot, None)
        subscriber = SlotSubscriber(slot, layers, load=self.load, point=point, patience=self.patience)
        self.subscribers[slot] = subscriber
        return subscriber

    def own(self, slot: int, epoch: int, point: Point | None = None) -> SlotPublisher:
        """Starts publishing a slot under a new lease.

        Args:
            epoch: of the lease.
            point: of the published state that the owner goes on from, if not the one followed here until now.
        """
        followed = self.subscribers.pop(slot, None)
        start = point or (followed.point if followed else SEED)
        publisher = SlotPublisher(slot, epoch, start.seq)
        self.publishers[slot] = publisher
        return publisher

    def lease(self, slot: int, owner: str, epoch: int, now: float) -> None:
        """The directory's word on who owns a slot; for slots owned here it changes nothing."""
        if slot in self.subscribers:
            self.subscribers[slot].lease(owner, epoch, now)

    def receive(self, sender: str, batch: DeltaBatch, now: float) -> None:
        """Routes a peer's deltas. Refusals are counted and do not stop the others."""
        for delta in batch.deltas:
            if delta.slot not in self.subscribers:
                self.refusals["own-slot" if delta.slot in self.publishers else "unknown-slot"] += 1
            else:
                try:
                    self.subscribers[delta.slot].receive(sender, delta, now)
                except Refused as refused:
                    self.refusals[refused.reason] += 1

    def install(self, sender: str, snapshot: StandInSnapshot, now: float) -> bool:
        """A fetched state. False if it was refused, which is counted."""
        if snapshot.slot not in self.subscribers:
            self.refusals["unknown-slot"] += 1
            return False
        try:
            self.subscribers[snapshot.slot].install(sender, snapshot, now)
        except Refused as refused:
            self.refusals[refused.reason] += 1
            return False
        return True

    def needs(self, now: float, limit: int = 64) -> list[Need]:
        """What to fetch now, at most `limit` at once; the rest comes up at the next call."""
        needs: list[Need] = []
        for subscriber in self.subscribers.values():
            if len(needs) == limit:
                break
            need = subscriber.need(now)
            if need is not None:
                needs.append(need)
        return needs

    def epochs(self) -> dict[int, int]:
        """By slot the latest epoch known here, for `ownership.Watch.recall`."""
        followed = {slot: max(s.epoch, s.point.epoch) for slot, s in self.subscribers.items()}
        return followed | {slot: publisher.epoch for slot, publisher in self.publishers.items()}
