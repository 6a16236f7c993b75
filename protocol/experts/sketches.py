"""What an owner takes of the sketches sent to it, and how fast composers send. Pure: clock and rng are passed in.

**Admission.** A sketch counts if its sender is a member, the slot is owned here under the lease that it names, its rows
were made under a stand-in that is at most `max_age` published versions old, its handles are known, and its rows decode.
A slot's sketches are taken all or none. A sender's claim of how many tokens its rows stand for weighs the mean over all
composers, so it is bounded, and no expert can have seen more pairs than there were tokens. Cheap checks come first.

**Back-pressure.** What is admitted waits for the owner's next step in a queue bounded in bytes, and for each sender in
its steps: what waited for many teaches what has been learned since. Over half full the owner asks for less, down to
nothing when it is full; so it does when steps wait, else one that is slower than composers would spend its time on
their sketches. What does not fit is refused as `busy`. Above half, a sender with more than its fair share of
the bytes is refused first. Per owner a composer follows by additive increase and multiplicative
decrease (AIMD, Chiu and Jain 1989): such senders converge to equal shares of an owner that none of them knows the speed
of. It always sends a little, else it would not hear that there is room again. Fewer rows are a smaller sample, not a
wrong one (kernels/sketch.py).

Rejected: a fixed rate in the manifest (owners differ a hundredfold in speed), credits handed out by the owner (they
must be taken back from composers that die), and dropping the oldest in a full queue (then it is paid for in vain).
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import Generic, Protocol, TypeVar

from ..errors import Refused
from ..messages import MAX_REFUSALS, MAX_SKETCH_BYTES, ExpertSketch, SketchBatch, SketchReply, SlotSketch

ITEM_BYTES = 1024  # charged per expert on top of its rows: sketches of no rows take memory too
# Steps of one sender that wait: an owner keeps up, wants no more rows, refuses. Auditors remember more (auditing.py).
EASE_STEPS, LATE_STEPS, MOST_STEPS = 2, 8, 16
ACTIVE_SECONDS = 30.0  # a sender counts for fair shares for so long after its last offer
MAX_SEEN = 1 << 16  # (sender, handle) pairs whose last step is remembered

MIN_SHARE = 1 / 64  # of its rows, that a sender goes on sending
INCREASE = 1 / 16  # of all rows, per good reply
DECREASE = 0.5
FIRST_PAUSE_SECONDS = 1.0  # after a send that failed; doubles up to the longest
LONGEST_PAUSE_SECONDS = 30.0

_BATCH_OVERHEAD = 64  # bytes of MessagePack around slots, experts and rows, at most
_SLOT_OVERHEAD = 32
_EXPERT_OVERHEAD = 16


class Sketch(Protocol):
    """What this module needs of `RowSketch` and `SignSketch` of `shoal.kernels`."""

    @property
    def pairs(self) -> int:
        """Routed (token, expert) pairs that it stands for."""
        ...


S = TypeVar("S", bound=Sketch)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The run's bounds on sketches."""

    max_age: int  # published versions of a stand-in
    max_tokens_per_step: int  # of one composer
    max_steps: int = 4096  # inner steps in one sketch; a composer may have waited long for an owner


@dataclass(frozen=True, kw_only=True)
class Held:
    """An owned slot, as those who send sketches for it should see it."""

    epoch: int  # of the lease
    seq: int  # published last
    positions: Mapping[bytes, int]  # of experts, by handle


@dataclass(frozen=True, kw_only=True)
class Admitted(Generic[S]):
    """Sketches of one slot that passed all checks."""

    sender: str
    slot: int
    epoch: int
    seq: int
    step: int  # of the sender
    tokens: int
    steps: int
    sketches: tuple[tuple[int, S], ...]  # by position


def check_batch(sender: str, batch: SketchBatch, members: Collection[str], rules: Rules) -> None:
    """What concerns all slots of a batch. Raises Refused: `not-a-member`, `too-many-steps`, `too-many-tokens`."""
    if sender not in members:
        raise Refused("not-a-member", f"{sender} sent sketches and is no composer of this run")
    if batch.steps > rules.max_steps:
        raise Refused("too-many-steps", f"sketches over {batch.steps} steps, at most {rules.max_steps} are taken")
    if batch.tokens > batch.steps * rules.max_tokens_per_step:
        raise Refused("too-many-tokens", f"{batch.tokens} tokens in {batch.steps} steps")


def check_current(sketch: SlotSketch | Admitted[S], held: Mapping[int, Held], rules: Rules) -> Held:
    """Whether a slot's sketches still, or already, mean anything here.

    Raises:
        Refused: `not-owner`, `stale-epoch`, `early-epoch`, `stale-version` or `early-version`.
    """
    slot = held.get(sketch.slot)
    if slot is None:
        raise Refused("not-owner", f"slot {sketch.slot} is not owned here")
    if sketch.epoch != slot.epoch:
        reason = "stale-epoch" if sketch.epoch < slot.epoch else "early-epoch"
        raise Refused(reason, f"slot {sketch.slot}: a sketch of epoch {sketch.epoch}, not {slot.epoch}")
    # Ahead of its owner is who holds a state that a former owner published and this one never had.
    if sketch.seq > slot.seq:
        raise Refused("early-version", f"slot {sketch.slot}: version {sketch.seq} is not published, {slot.seq} is")
    if slot.seq - sketch.seq > rules.max_age:
        raise Refused("stale-version", f"slot {sketch.slot}: version {sketch.seq} is too old, {slot.seq} is published")
    return slot


def admit(
    sender: str,
    batch: SketchBatch,
    sketch: SlotSketch,
    held: Mapping[int, Held],
    rules: Rules,
    load: Callable[[bytes], S],
) -> Admitted[S]:
    """One slot of a batch that passed `check_batch`.

    Args:
        sketch: of `batch.slots`.
        held: owned slots.
        load: their `from_bytes`; raises ValueError, also for what is not finite.

    Raises:
        Refused: those of `check_current`, `unknown-handle`, `malformed` or `implausible`.
    """
    positions = check_current(sketch, held, rules).positions
    if any(expert.handle not in positions for expert in sketch.experts):
        raise Refused("unknown-handle", f"slot {sketch.slot}: no expert is called so at epoch {sketch.epoch}")
    sketches = []
    for expert in sketch.experts:
        try:
            rows = load(expert.rows)
        except ValueError as error:
            raise Refused("malformed", f"slot {sketch.slot}: {error}") from error
        if rows.pairs > batch.tokens:
            raise Refused("implausible", f"slot {sketch.slot}: {rows.pairs} rows of {batch.tokens} tokens")
        sketches.append((positions[expert.handle], rows))
    return Admitted(
        sender=sender,
        slot=sketch.slot,
        epoch=sketch.epoch,
        seq=sketch.seq,
        step=batch.step,
        tokens=batch.tokens,
        steps=batch.steps,
        sketches=tuple(sketches),
    )


class SketchQueue(Generic[T]):
    """What waits for the owner's next step, at most `max_bytes` of it. May be filled and emptied by two threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._items: deque[tuple[T, str, int, int]] = deque()
        self._held: Counter[str] = Counter()  # bytes by sender
        self._steps: dict[str, Counter[int]] = {}  # items by sender and its step
        self._total = 0
        self._offered: dict[str, float] = {}  # when each sender last did

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        return self._total

    def rate(self, sender: str = "") -> float:
        """The share of its rows that a composer should send: 1 up to half full and while the owner keeps up with it,
        falling to 0."""
        by_bytes = 2.0 * (1.0 - self._total / self.max_bytes)
        by_steps = (LATE_STEPS - len(self._steps.get(sender, ()))) / (LATE_STEPS - EASE_STEPS)
        return min(1.0, max(0.0, min(by_bytes, by_steps)))

    def has_room(self, sender: str, nbytes: int, now: float, step: int = 0) -> bool:
        """Whether `offer` would take it."""
        with self._lock:
            return self._has_room(sender, nbytes, now, step)

    def offer(self, sender: str, item: T, nbytes: int, now: float, step: int = 0) -> bool:
        """Append, unless the queue is full or the sender has its share of it.

        Args:
            nbytes: memory that it takes.
            now: monotonic seconds.
            step: of the sender.
        """
        with self._lock:
            if not self._has_room(sender, nbytes, now, step):
                return False
            self._items.append((item, sender, nbytes, step))
            self._steps.setdefault(sender, Counter())[step] += 1
            self._held[sender] += nbytes
            self._total += nbytes
            return True

    def take(self, max_bytes: int | None = None) -> list[T]:
        """Remove and return what waits, the oldest first; at most `max_bytes` of it, but at least one item."""
        taken: list[T] = []
        size = 0
        with self._lock:
            while self._items and (max_bytes is None or not taken or size + self._items[0][2] <= max_bytes):
                item, sender, nbytes, step = self._items.popleft()
                taken.append(item)
                size += nbytes
                steps = self._steps[sender]
                steps[step] -= 1
                if not steps[step]:
                    del steps[step]
                if not steps:
                    del self._steps[sender]
                self._held[sender] -= nbytes
                if not self._held[sender]:
                    del self._held[sender]
            self._total -= size
        return taken

    def _has_room(self, sender: str, nbytes: int, now: float, step: int) -> bool:
        self._offered[sender] = now
        self._offered = {peer: at for peer, at in self._offered.items() if at > now - ACTIVE_SECONDS}
        total, mine = self._total + nbytes, self._held[sender] + nbytes
        steps = self._steps.get(sender, ())
        if total > self.max_bytes or (step not in steps and len(steps) >= MOST_STEPS):
            return False
        # A sender that has nothing waiting gets in even if what it offers is more than its share.
        return 2 * total <= self.max_bytes or mine == nbytes or mine * len(self._offered) <= self.max_bytes


class SketchInbox(Generic[S]):
    """An owner's side: admission, queue and counts in one. `receive` belongs to one thread, `take` to another.

    Args:
        max_bytes: of waiting sketches.
        load: as in `admit`.
    """

    def __init__(self, max_bytes: int, rules: Rules, load: Callable[[bytes], S]) -> None:
        self.queue: SketchQueue[Admitted[S]] = SketchQueue(max_bytes)
        self.refusals: Counter[str] = Counter()  # slots by reason, and whole batches
        self.outdated: Counter[str] = Counter()  # accepted, but worth nothing any more when taken; slots by reason
        self._rules, self._load = rules, load
        self._seen: OrderedDict[tuple[str, bytes], int] = OrderedDict()  # last step, by sender and handle

    def receive(
        self, sender: str, batch: SketchBatch, members: Collection[str], held: Mapping[int, Held], now: float
    ) -> SketchReply:
        """Take in a composer's batch, slot by slot.

        Args:
            sender: authenticated peer id.
            members: peers that may send sketches.
            held: owned slots.
            now: monotonic seconds.

        Raises:
            Refused: the whole batch, by `check_batch`.
        """
        try:
            check_batch(sender, batch, members, self._rules)
        except Refused as refused:
            self.refusals[refused.reason] += 1
            raise
        refusals: list[tuple[int, str]] = []
        for sketch in batch.slots:
            try:
                self._receive_slot(sender, batch, sketch, held, now)
            except Refused as refused:
                self.refusals[refused.reason] += 1
                refusals.append((sketch.slot, refused.reason))
        accepted = len(batch.slots) - len(refusals)
        return SketchReply(self.queue.rate(sender), accepted, tuple(refusals[:MAX_REFUSALS]))

    def take(self, held: Mapping[int, Held], max_bytes: int | None = None) -> list[Admitted[S]]:
        """What the owner's next step may use: without what became too old, or of a lost slot, while it waited."""
        current = []
        for item in self.queue.take(max_bytes):
            try:
                check_current(item, held, self._rules)
            except Refused as refused:
                self.outdated[refused.reason] += 1
            else:
                current.append(item)
        return current

    def _receive_slot(
        self, sender: str, batch: SketchBatch, sketch: SlotSketch, held: Mapping[int, Held], now: float
    ) -> None:
        # A sender that lost our reply may send again; counted twice, its tokens would weigh double.
        keys = [(sender, expert.handle) for expert in sketch.experts]
        if any(self._seen.get(key) == batch.step for key in keys):
            raise Refused("repeated", f"slot {sketch.slot}: step {batch.step} of {sender} was taken already")
        check_current(sketch, held, self._rules)
        nbytes = sum(len(expert.rows) + ITEM_BYTES for expert in sketch.experts)
        if nbytes > self.queue.max_bytes:
            raise Refused("oversized", f"slot {sketch.slot}: {nbytes} bytes, the queue has {self.queue.max_bytes}")
        if not self.queue.has_room(sender, nbytes, now, batch.step):
            raise Refused("busy", f"slot {sketch.slot}: too much waits already")
        admitted = admit(sender, batch, sketch, held, self._rules, self._load)
        if not self.queue.offer(sender, admitted, nbytes, now, batch.step):
            raise Refused("busy", f"slot {sketch.slot}: too much waits already")
        for key in keys:
            self._seen[key] = batch.step
            self._seen.move_to_end(key)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)


class SenderRate:
    """A composer's side, one per owner: which share of its rows to send, and when to leave the owner alone.

    Args:
        rng: spreads the pauses, so that composers do not all come back at once.
    """

    def __init__(self, rng: Random) -> None:
        self.share = 1.0
        self._rng = rng
        self._failures = 0  # in a row
        self._paused_until = -math.inf

    def ready(self, now: float) -> bool:
        """Whether to send at all. Rows go on being collected while not."""
        return now >= self._paused_until

    def replied(self, reply: SketchReply, now: float) -> None:
        """The owner answered. A batch of which nothing fitted counts as failed."""
        busy = any(reason == "busy" for _, reason in reply.refused)
        if busy and not reply.accepted:
            self.failed(now)
            return
        self._failures, self._paused_until = 0, -math.inf
        if busy or reply.rate < self.share:  # one reply tells little: by half at most
            floor = self.share * DECREASE
            self.share = max(MIN_SHARE, floor if busy else max(floor, reply.rate))
        else:
            self.share = min(reply.rate, self.share + INCREASE)

    def failed(self, now: float) -> None:
        """The owner did not answer, or refused the call."""
        self.share = max(MIN_SHARE, self.share * DECREASE)
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 16)
        self._paused_until = now + pause * self._rng.uniform(0.5, 1.0)


def split(
    step: int, tokens: int, steps: int, slots: Iterable[SlotSketch], max_bytes: int = MAX_SKETCH_BYTES
) -> Iterator[SketchBatch]:
    """Batches of at most `max_bytes` with these sketches, in order. A slot too long by itself is cut between experts.

    Raises ValueError for one expert's sketch that is too long for any batch.
    """
    taken: list[SlotSketch] = []
    size = _BATCH_OVERHEAD
    for piece, length in (cut for sketch in slots for cut in _pieces(sketch, max_bytes - _BATCH_OVERHEAD)):
        # Two pieces of one slot never share a batch: a batch names each slot once.
        if taken and (size + length > max_bytes or taken[-1].slot == piece.slot):
            yield SketchBatch(step, tokens, steps, tuple(taken))
            taken, size = [], _BATCH_OVERHEAD
        taken.append(piece)
        size += length
    if taken:
        yield SketchBatch(step, tokens, steps, tuple(taken))


def _pieces(sketch: SlotSketch, max_bytes: int) -> Iterator[tuple[SlotSketch, int]]:
    """The slot in pieces of at most `max_bytes`, with an upper bound of their encoded lengths."""
    taken: list[ExpertSketch] = []
    size = _SLOT_OVERHEAD
    for expert in sketch.experts:
        length = len(expert.rows) + _EXPERT_OVERHEAD
        if _SLOT_OVERHEAD + length > max_bytes:
            raise ValueError(f"slot {sketch.slot}: {length} bytes for one expert, at most {max_bytes} fit")
        if taken and size + length > max_bytes:
            yield SlotSketch(sketch.slot, sketch.epoch, sketch.seq, tuple(taken)), size
            taken, size = [], _SLOT_OVERHEAD
        taken.append(expert)
        size += length
    yield SlotSketch(sketch.slot, sketch.epoch, sketch.seq, tuple(taken)), size
