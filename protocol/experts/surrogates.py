"""Publishing stand-ins and keeping everybody's copies equal to the bit, over gossip that loses, repeats and reorders.

A slot's published state is a point in a sequence, named (epoch, seq). `seq` counts the owner's deltas and goes on
over a change of owner: the new owner continues from whatever published state it holds, at its seq + 1 under the new
epoch. That state need not be the last its predecessor sent. So a subscriber applies a delta of a later epoch only if
it comes next and its digest comes out right; otherwise it fetches the owner's state. Points are ordered by epoch,
then seq.

- A delta is applied when it is next, in all layers or none, and only kept if the digest agrees.
- Duplicates and older ones are ignored; later ones wait, `max_waiting` at most, for what is missing.
- A gap that stays for `patience`, a wrong digest or a delta too large for gossip become a `Need`: fetch
  `standin/<slot>` from the owner and `install` it. Announcements make a lost last delta show up as a gap.
- The lease decides whom to believe: lower epochs and other senders are refused; of deltas of an owner whose lease is
  not known here yet it is noted how far they go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from ..errors import Refused
from ..messages import StandInSnapshot, SurrogateDelta


class StandIn(Protocol):
    """What this module needs of `shoal.kernels.standin.StandIn`."""

    def apply(self, delta: bytes) -> None:
        """Moves to the next state; ValueError, with the state unchanged, if it cannot. A `copy()` stays where it is."""

    def to_bytes(self) -> bytes: ...

    def digest(self) -> bytes: ...


S = TypeVar("S", bound=StandIn)

MAX_EARLY = 4  # senders whose delta of a lease not known yet is noted, per slot


def state_digest(layers: Sequence[StandIn]) -> bytes:
    """16 bytes that identify a slot's stand-ins in all layers, in whatever order: see `handles.Handles`."""
    return hashlib.sha256(b"".join(sorted(layer.digest() for layer in layers))).digest()[:16]


@dataclass(frozen=True, order=True)
class Point:
    """A published state of one slot."""

    epoch: int
    seq: int


SEED = Point(0, 0)  # the initial stand-ins, which everybody makes from the run's seed


@dataclass(frozen=True)
class Need:
    """Fetch `standin/<slot>` from `from_peer` and install it."""

    slot: int
    from_peer: str


@dataclass(frozen=True)
class Patience:
    """How long a subscriber waits. In seconds."""

    gap: float = 3.0  # for a missing delta, before it fetches the owner's state
    retry: float = 10.0  # for that fetch, before it asks again
    max_waiting: int = 16  # deltas held per slot while an earlier one is missing


class SlotPublisher:
    """The owner's side of one slot: numbers its deltas.

    The stand-ins themselves belong to the caller; pass the published ones of all layers, in order, each time.

    Args:
        epoch: of the owner's lease.
        seq: of the published state that it goes on from.
    """

    def __init__(self, slot: int, epoch: int, seq: int) -> None:
        self.slot = slot
        self.epoch = epoch
        self.seq = seq

    @property
    def point(self) -> Point:
        return Point(self.epoch, self.seq)

    def publish(
        self, step: int, deltas: Sequence[bytes], published: Sequence[StandIn], fidelity: Sequence[float] = ()
    ) -> SurrogateDelta:
        """The next delta. Call once `deltas`, one per layer, have been applied to `published`."""
        if not deltas or len(deltas) != len(published):
            raise ValueError(f"{len(deltas)} deltas for {len(published)} layers")
        self.seq += 1
        state = state_digest(published)
        return SurrogateDelta(self.slot, self.epoch, self.seq, step, tuple(deltas), state, tuple(fidelity))

    def replace(self, step: int, published: Sequence[StandIn]) -> SurrogateDelta:
        """The next state, where no delta leads to it: an announcement, upon which followers fetch it."""
        self.seq += 1
        return self.announce(step, published)

    def announce(self, step: int, published: Sequence[StandIn]) -> SurrogateDelta:
        """Where the slot stands, without a delta. Send after taking over and when no delta is due for long."""
        return SurrogateDelta(self.slot, self.epoch, self.seq, step, (), state_digest(published))


class SlotSubscriber(Generic[S]):
    """One slot's stand-ins on a peer that does not own it.

    `layers` may hold other objects after `receive`, `lease` or `install`: read it again when `version` has changed.

    Args:
        layers: its stand-ins, one per MoE layer; taken over.
        load: StandIn.from_bytes; raises ValueError.
        point: where they stand.
        patience: how long to wait for what is missing.
    """

    def __init__(
        self,
        slot: int,
        layers: Sequence[S],
        *,
        load: Callable[[bytes], S],
        point: Point = SEED,
        patience: Patience | None = None,
    ) -> None:
        self.slot = slot
        self.layers = list(layers)
        self.point = point
        self.version = 0  # goes up whenever `layers` or their state has changed
        self.fidelity: tuple[float, ...] = ()  # per layer, as the owner measured it
        self.owner = ""  # by the lease; "" before one is known
        self.epoch = point.epoch  # by the lease
        self._load = load
        self._patience = patience or Patience()
        self._waiting: dict[int, SurrogateDelta] = {}  # by seq, of the lease's epoch
        self._early: dict[str, SurrogateDelta] = {}  # by sender: where it stands by a lease not known yet
        self._target = point  # the owner is known to stand here, at least
        self._must_fetch = False  # waiting for deltas will not help
        self._behind_since: float | None = None
        self._asked_at: float | None = None

    @property
    def behind(self) -> bool:
        """Whether the owner is known to have another state than this."""
        return self._must_fetch or self.point < self._target

    def lease(self, owner: str, epoch: int, now: float) -> None:
        """The directory's word on who owns the slot. Call whenever it changes; lower epochs are ignored."""
        if (epoch, owner) == (self.epoch, self.owner) or epoch < self.epoch:
            return
        self.owner, self.epoch = owner, epoch
        self._waiting.clear()  # what the former owner sent last may never come, and need not
        self._target, self._must_fetch = self.point, False
        early, self._early = self._early, {}
        for sender, delta in early.items():
            if delta.epoch > epoch:
                self._early[sender] = delta
            elif sender == owner and delta.epoch == epoch:
                self.receive(sender, delta, now)
        self._note(now)

    def disown(self) -> None:
        """The owner is not believed any more, whatever epoch it named: any lease may follow. The stand-ins stay."""
        self.owner, self.epoch, self._must_fetch = "", 0, False
        self.point = self._target = Point(0, self.point.seq)
        self._waiting = {}
        self._note(0.0)

    def receive(self, sender: str, delta: SurrogateDelta, now: float) -> None:
        """Takes in a delta or an announcement.

        Args:
            sender: peer id of the envelope.
            delta: of this slot.
            now: monotonic seconds.

        Raises:
            Refused: `stale-epoch`, `not-owner`, `early-epoch` (noted until the lease shows up), `wrong-layers`, or
                `overflow` (dropped for lack of room). What was in it will be fetched.
        """
        if delta.layers and len(delta.layers) != len(self.layers):
            raise Refused("wrong-layers", f"slot {self.slot}: {len(delta.layers)} layers, not {len(self.layers)}")
        if delta.epoch < self.epoch:
            raise Refused("stale-epoch", f"slot {self.slot}: epoch {delta.epoch} is over, {self.epoch} is current")
        if delta.epoch > self.epoch:
            if sender in self._early or len(self._early) < MAX_EARLY:
                # Where its sender stands, and no more: anybody may send one of a megabyte for every slot there is.
                self._early[sender] = msgspec.structs.replace(delta, layers=(), fidelity=())
            raise Refused("early-epoch", f"slot {self.slot}: no lease of epoch {delta.epoch} is known yet")
        if sender != self.owner:
            raise Refused("not-owner", f"slot {self.slot}: {sender} sent a delta, {self.owner or 'nobody'} owns it")
        point = Point(delta.epoch, delta.seq)
        before = self.point
        try:
            if delta.is_announcement:
                self._compare(point, delta.digest)
            elif point > self.point:
                self._wait_for_turn(point, delta)
        finally:
            self._note(now, progress=self.point != before)

    def need(self, now: float) -> Need | None:
        """What to fetch now, if anything. Asks again after `retry` as long as the slot is behind."""
        if self._behind_since is None or not self.owner:
            return None
        if not self._must_fetch and now < self._behind_since + self._patience.gap:
            return None
        if self._asked_at is not None and now < self._asked_at + self._patience.retry:
            return None
        self._asked_at = now
        return Need(self.slot, self.owner)

    def install(self, sender: str, snapshot: StandInSnapshot, now: float) -> None:
        """Replaces the state by one fetched from the owner, and goes on with the deltas that wait.

        Raises:
            Refused: `wrong-slot`, `not-owner`, `wrong-epoch` (not the lease's), `old-snapshot`, `wrong-layers`,
                `malformed` or `wrong-digest`; the state is unchanged.
        """
        point = Point(snapshot.epoch, snapshot.seq)
        if snapshot.slot != self.slot:
            raise Refused("wrong-slot", f"a snapshot of slot {snapshot.slot} instead of {self.slot}")
        if sender != self.owner:
            raise Refused("not-owner", f"slot {self.slot}: a snapshot from {sender}, {self.owner or 'nobody'} owns it")
        if snapshot.epoch != self.epoch:
            raise Refused("wrong-epoch", f"slot {self.slot}: a snapshot of epoch {snapshot.epoch}, not {self.epoch}")
        if point < self.point:
            raise Refused("old-snapshot", f"slot {self.slot}: {point} is before {self.point}")
        if len(snapshot.layers) != len(self.layers):
            raise Refused("wrong-layers", f"slot {self.slot}: {len(snapshot.layers)} layers, not {len(self.layers)}")
        try:
            layers = [self._load(data) for data in snapshot.layers]
        except ValueError as error:
            raise Refused("malformed", f"slot {self.slot}: {error}") from error
        if state_digest(layers) != snapshot.digest:
            raise Refused("wrong-digest", f"slot {self.slot}: the snapshot does not match its digest")
        self.layers = layers
        self._must_fetch = False
        self._arrive(point)
        self._target = max([point, *(Point(self.epoch, seq) for seq in self._waiting)])
        self._asked_at = None
        self._advance()
        self._note(now, progress=True)

    def _wait_for_turn(self, point: Point, delta: SurrogateDelta) -> None:
        self._target = max(self._target, point)
        # Of a new epoch but not past the seq here: the new owner went on from an earlier state than this one.
        if delta.seq <= self.point.seq:
            self._must_fetch = True
        if len(self._waiting) >= self._patience.max_waiting and delta.seq not in self._waiting:
            self._must_fetch = True
            raise Refused("overflow", f"slot {self.slot}: {len(self._waiting)} deltas wait already")
        self._waiting[delta.seq] = delta
        self._advance()

    def _advance(self) -> None:
        """Applies the waiting deltas that come next."""
        while (delta := self._waiting.pop(self.point.seq + 1, None)) is not None:
            if not self._apply(delta):
                self._must_fetch = True  # another base, or other bits: only the owner's state helps
                return
            self._arrive(Point(delta.epoch, delta.seq))
            self.fidelity = delta.fidelity

    def _apply(self, delta: SurrogateDelta) -> bool:
        """All layers and the digest, or nothing."""
        before = [copy(layer) for layer in self.layers]
        try:
            for layer, change in zip(self.layers, delta.layers, strict=True):
                layer.apply(change)
        except ValueError:
            applied = False
        else:
            applied = state_digest(self.layers) == delta.digest
        if not applied:
            self.layers = before
            self.version += 1
        return applied

    def _compare(self, point: Point, digest: bytes) -> None:
        """An announcement: the owner stands at `point`, or stood there when it sent this."""
        if point < self.point:
            return
        if digest == state_digest(self.layers):
            self._arrive(point)  # perhaps a new owner that goes on from just this state
            self._advance()
            return
        self._target = max(self._target, point)
        # Deltas that are on their way may still lead there, but not back and not to another state of the same name.
        self._must_fetch = self._must_fetch or point.seq <= self.point.seq

    def _arrive(self, point: Point) -> None:
        self.point = point
        self._target = max(self._target, point)
        self._waiting = {seq: delta for seq, delta in self._waiting.items() if seq > point.seq}
        self.version += 1

    def _note(self, now: float, *, progress: bool = False) -> None:
        """Keeps the time since which the slot is behind; progress starts the patience anew."""
        if not self.behind:
            self._behind_since = self._asked_at = None
        elif self._behind_since is None or progress:
            self._behind_since = now
