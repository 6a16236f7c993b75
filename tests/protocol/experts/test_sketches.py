"""Sketches at their owner's door: what is refused and why, what waits, and how senders follow."""

from __future__ import annotations

import math
import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch
from shoal.kernels.rows import Float16Rows
from shoal.kernels.sketch import RowSketch
from shoal.protocol.errors import Refused
from shoal.protocol.experts.handles import Handles, new_key
from shoal.protocol.experts.sketches import (
    ACTIVE_SECONDS,
    ITEM_BYTES,
    LONGEST_PAUSE_SECONDS,
    MAX_SEEN,
    MIN_SHARE,
    Admitted,
    Held,
    Rules,
    SenderRate,
    SketchInbox,
    SketchQueue,
    admit,
    check_batch,
    check_current,
    split,
)
from shoal.protocol.messages import ExpertSketch, SketchBatch, SketchReply, SlotSketch, decode, encode

LAYERS = 3
HIDDEN = 4
SLOT, EPOCH, SEQ = 5, 4, 100
HANDLES = Handles(new_key())
HELD = {
    SLOT: Held(epoch=EPOCH, seq=SEQ, positions={h: p for p, h in enumerate(HANDLES.sorted_handles(SLOT, EPOCH, 3))})
}
RULES = Rules(max_age=32, max_tokens_per_step=512, max_steps=64)
MEMBERS = {"ann", "bob"}


@pytest.fixture
def rng() -> random.Random:
    seed = secrets.randbits(48)
    print(f"{seed=}")
    return random.Random(seed)


def load(data: bytes) -> RowSketch:
    return RowSketch.from_bytes(data, hidden=HIDDEN, max_rows=2000)


def rows(pairs: int, value: float = 1.0) -> bytes:
    """A sketch of random rows, with one value of its first gradient as given."""
    sketch = Float16Rows(torch.randn(pairs, HIDDEN).half()), Float16Rows(torch.randn(pairs, HIDDEN).half())
    sketch[1].values[:1, 0] = value
    return RowSketch(*sketch, None, 1.0, pairs, "float16").to_bytes()


def slot_sketch(data: bytes = rows(7), slot: int = SLOT, epoch: int = EPOCH, seq: int = SEQ) -> SlotSketch:
    experts = tuple(ExpertSketch(HANDLES.of(slot, layer, epoch), data) for layer in range(LAYERS))
    return SlotSketch(slot, epoch, seq, experts)


def batch_of(*slots: SlotSketch, step: int = 8, tokens: int = 1000, steps: int = 4) -> SketchBatch:
    return decode(encode(SketchBatch(step, tokens, steps, slots)), SketchBatch)


def reason(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as refused:
        call()
    return refused.value.reason


# Admission ------------------------------------------------------------------------------------------------------------


def test_a_good_sketch_reaches_its_experts() -> None:
    sketch = SlotSketch(
        SLOT,
        EPOCH,
        SEQ - RULES.max_age,
        tuple(ExpertSketch(HANDLES.of(SLOT, layer, EPOCH), rows(layer)) for layer in (2, 0)),
    )
    batch = batch_of(sketch)
    check_batch("ann", batch, MEMBERS, RULES)
    admitted = admit("ann", batch, sketch, HELD, RULES, load)
    order = HANDLES.order(SLOT, EPOCH, LAYERS)
    assert {order[position]: rows.num_rows for position, rows in admitted.sketches} == {2: 2, 0: 0}
    assert (admitted.sender, admitted.slot, admitted.step, admitted.tokens, admitted.steps) == ("ann", SLOT, 8, 1000, 4)


@pytest.mark.parametrize(
    ("sender", "tokens", "steps", "expected"),
    [
        ("mallory", 1, 1, "not-a-member"),
        ("ann", 4 * 512 + 1, 4, "too-many-tokens"),
        ("ann", 65, 65, "too-many-steps"),
        ("ann", (1 << 48) - 1, (1 << 48) - 1, "too-many-steps"),
    ],
)
def test_batches_that_claim_too_much_are_refused(sender: str, tokens: int, steps: int, expected: str) -> None:
    inbox = SketchInbox(1 << 20, RULES, load)
    batch = batch_of(slot_sketch(), tokens=tokens, steps=steps)
    assert reason(lambda: check_batch(sender, batch, MEMBERS, RULES)) == expected
    assert reason(lambda: inbox.receive(sender, batch, MEMBERS, HELD, 0.0)) == expected
    assert inbox.refusals == {expected: 1}
    assert not len(inbox.queue)


@pytest.mark.parametrize(
    ("sketch", "expected"),
    [
        (slot_sketch(slot=SLOT + 1), "not-owner"),
        (slot_sketch(epoch=EPOCH - 1), "stale-epoch"),
        (slot_sketch(epoch=EPOCH + 1), "early-epoch"),
        (slot_sketch(seq=SEQ - RULES.max_age - 1), "stale-version"),
        (slot_sketch(seq=SEQ + 1), "early-version"),
        (SlotSketch(SLOT, EPOCH, SEQ, (ExpertSketch(b"whatever", rows(1)),)), "unknown-handle"),
        (SlotSketch(SLOT, EPOCH, SEQ, (ExpertSketch(HANDLES.of(SLOT, 0, EPOCH - 1), rows(1)),)), "unknown-handle"),
        (SlotSketch(SLOT, EPOCH, SEQ, (ExpertSketch(HANDLES.of(SLOT, 0, EPOCH), b""),)), "malformed"),
        (slot_sketch(rows(5)[:-1]), "malformed"),
        (slot_sketch(rows(5, value=math.nan)), "malformed"),
        (slot_sketch(rows(5, value=-math.inf)), "malformed"),
        (slot_sketch(rows(1001)), "implausible"),
    ],
)
def test_bad_sketches_are_refused_with_a_reason_and_leave_nothing(sketch: SlotSketch, expected: str) -> None:
    inbox = SketchInbox(1 << 20, RULES, load)
    batch = batch_of(sketch)
    assert reason(lambda: admit("ann", batch, sketch, HELD, RULES, load)) == expected
    assert inbox.receive("ann", batch, MEMBERS, HELD, 0.0) == SketchReply(1.0, 0, ((sketch.slot, expected),))
    assert inbox.refusals == {expected: 1}
    assert not len(inbox.queue)
    assert not inbox.queue.nbytes
    # what was refused once may be sent again, put right
    assert inbox.receive("ann", batch_of(slot_sketch()), MEMBERS, HELD, 0.0).accepted == 1


def test_one_bad_expert_keeps_out_its_slot_but_not_the_others() -> None:
    other = SLOT + 1
    positions = {HANDLES.of(other, layer, 1): layer for layer in range(LAYERS)}
    held = HELD | {other: Held(epoch=1, seq=3, positions=positions)}
    bad = slot_sketch()
    bad = msgspec.structs.replace(bad, experts=(*bad.experts[:-1], ExpertSketch(bad.experts[-1].handle, b"?")))
    inbox = SketchInbox(1 << 20, RULES, load)
    reply = inbox.receive("ann", batch_of(bad, slot_sketch(slot=other, epoch=1, seq=3)), MEMBERS, held, 0.0)
    assert (reply.accepted, reply.refused) == (1, ((SLOT, "malformed"),))
    assert [(item.slot, len(item.sketches)) for item in inbox.take(held)] == [(other, LAYERS)]


def test_what_is_refused_cheaply_is_not_decoded() -> None:
    def never(data: bytes) -> RowSketch:
        raise AssertionError("decoded")

    inbox = SketchInbox(LAYERS * (ITEM_BYTES + 50), RULES, never)
    for sketch, expected in [
        (slot_sketch(epoch=1), "stale-epoch"),
        (slot_sketch(slot=9), "not-owner"),
        (slot_sketch(bytes(60)), "oversized"),
    ]:
        assert inbox.receive("ann", batch_of(sketch), MEMBERS, HELD, 0.0).refused == ((sketch.slot, expected),)


def test_a_batch_sent_again_is_taken_once() -> None:
    inbox = SketchInbox(1 << 20, RULES, load)
    batch = batch_of(slot_sketch())
    assert inbox.receive("ann", batch, MEMBERS, HELD, 0.0).accepted == 1
    assert inbox.receive("ann", batch, MEMBERS, HELD, 0.0).refused == ((SLOT, "repeated"),)
    assert inbox.receive("bob", batch, MEMBERS, HELD, 0.0).accepted == 1
    assert inbox.receive("ann", msgspec.structs.replace(batch, step=9), MEMBERS, HELD, 0.0).accepted == 1
    # a composer that starts again from an earlier checkpoint is heard
    assert inbox.receive("ann", msgspec.structs.replace(batch, step=2), MEMBERS, HELD, 0.0).accepted == 1


def test_memory_of_steps_is_bounded() -> None:
    inbox = SketchInbox(1 << 20, RULES, load)
    inbox._seen.update(((str(n), b"whatever"), n) for n in range(MAX_SEEN))
    assert inbox.receive("ann", batch_of(slot_sketch()), MEMBERS, HELD, 0.0).accepted == 1
    assert len(inbox._seen) == MAX_SEEN


def test_what_grew_old_in_the_queue_is_dropped_and_counted() -> None:
    inbox = SketchInbox(1 << 20, RULES, load)
    for step, seq in enumerate((SEQ - 30, SEQ)):
        inbox.receive("ann", batch_of(slot_sketch(seq=seq), step=step), MEMBERS, HELD, 0.0)
    later = {SLOT: replace(HELD[SLOT], seq=SEQ + 10)}
    assert [item.seq for item in inbox.take(later)] == [SEQ]
    assert inbox.outdated == {"stale-version": 1}
    inbox.receive("ann", batch_of(slot_sketch(), step=9), MEMBERS, HELD, 0.0)
    assert not inbox.take({})
    assert inbox.outdated == {"stale-version": 1, "not-owner": 1}
    assert not inbox.refusals


def test_admitted_sketches_can_be_checked_again() -> None:
    batch = batch_of(slot_sketch())
    admitted: Admitted[RowSketch] = admit("ann", batch, batch.slots[0], HELD, RULES, load)
    assert check_current(admitted, HELD, RULES) is HELD[SLOT]
    newer = {SLOT: replace(HELD[SLOT], epoch=EPOCH + 1)}
    assert reason(lambda: check_current(admitted, newer, RULES)) == "stale-epoch"


# Queue ----------------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_says_how_full_it_is() -> None:
    queue: SketchQueue[int] = SketchQueue(100)
    assert queue.rate() == 1.0
    assert queue.offer("ann", 1, 50, 0.0)
    assert queue.rate() == 1.0
    assert queue.offer("ann", 2, 30, 0.0)
    assert queue.rate() == pytest.approx(0.4)
    assert not queue.offer("ann", 3, 21, 0.0)
    assert queue.offer("ann", 4, 20, 0.0)
    assert queue.rate() == 0.0
    assert not queue.offer("bob", 5, 1, 0.0)
    assert (len(queue), queue.nbytes) == (3, 100)
    assert queue.take(10) == [1]
    assert queue.take() == [2, 4]
    assert queue.take() == []
    assert (len(queue), queue.nbytes, queue.rate()) == (0, 0, 1.0)


def test_above_half_nobody_gets_more_than_a_fair_share() -> None:
    queue: SketchQueue[str] = SketchQueue(100)
    assert not queue.offer("bob", "too much", 101, 0.0)  # but bob is there
    assert all(queue.offer("ann", "a", 10, 1.0) for _ in range(5))
    assert not queue.offer("ann", "a", 10, 1.0)
    assert queue.offer("bob", "b", 40, 1.0)
    assert not queue.offer("bob", "b", 11, 1.0)
    assert queue.offer("eve", "e", 10, 1.0)  # the first of a third one
    queue.take()
    # who has not offered for long does not count any more
    later = 1.0 + ACTIVE_SECONDS
    assert all(queue.offer("ann", "a", 10, later) for _ in range(10))


def test_sketches_without_rows_fill_the_queue_too() -> None:
    inbox = SketchInbox(10 * LAYERS * ITEM_BYTES, RULES, load)
    replies = [inbox.receive("ann", batch_of(slot_sketch(rows(0)), step=n), MEMBERS, HELD, 0.0) for n in range(1000)]
    assert sum(reply.accepted for reply in replies) == 9  # and their headers
    assert replies[-1].refused == ((SLOT, "busy"),)
    assert inbox.refusals == {"busy": 991}


def test_any_sequence_keeps_the_bounds(rng: random.Random) -> None:
    queue: SketchQueue[tuple[str, int]] = SketchQueue(1000)
    waiting: list[tuple[str, int]] = []
    for turn in range(3000):
        item = (rng.choice("abcd"), rng.choice([1, 40, 300, 900]))
        if queue.offer(item[0], item, item[1], turn * 0.1):
            waiting.append(item)
        if rng.random() < 0.2:
            taken = queue.take(rng.choice([None, 1, 500]))
            assert taken == waiting[: len(taken)]
            del waiting[: len(taken)]
        assert queue.nbytes == sum(size for _, size in waiting) <= 1000
        assert len(queue) == len(waiting)
        assert 0.0 <= queue.rate() <= 1.0


def test_two_threads_lose_nothing() -> None:
    queue: SketchQueue[int] = SketchQueue(1 << 30)
    got: list[int] = []
    done = threading.Event()

    def drain() -> None:
        while not done.is_set() or len(queue):
            got.extend(queue.take(64))

    taker = threading.Thread(target=drain)
    taker.start()
    try:
        assert all(queue.offer(str(n % 3), n, n % 7, 0.0) for n in range(5000))
    finally:
        done.set()
        taker.join(30)
    assert not taker.is_alive()
    assert got == list(range(5000))
    assert queue.nbytes == 0


# Senders --------------------------------------------------------------------------------------------------------------


def test_a_sender_follows_what_the_owner_says(rng: random.Random) -> None:
    rate = SenderRate(rng)
    assert rate.share == pytest.approx(1)
    rate.replied(SketchReply(0.8, 1), 0.0)
    assert rate.share == pytest.approx(0.8)
    rate.replied(SketchReply(0.0, 1), 0.0)
    assert rate.share == pytest.approx(0.4)  # by half at most
    rate.replied(SketchReply(0.42, 1), 0.0)
    assert rate.share == pytest.approx(0.42)  # not beyond it
    rate.replied(SketchReply(1.0, 1, ((3, "stale-epoch"),)), 0.0)
    assert rate.share == pytest.approx(0.42 + 1 / 16)
    rate.replied(SketchReply(1.0, 1, ((3, "busy"),)), 0.0)
    assert rate.share < 0.25
    for _ in range(100):
        rate.replied(SketchReply(0.0, 1), 0.0)
    assert rate.share == MIN_SHARE
    for _ in range(16):
        rate.replied(SketchReply(1.0, 1), 0.0)
    assert rate.share == 1.0


def test_a_sender_leaves_an_owner_alone_that_does_not_answer(rng: random.Random) -> None:
    rate = SenderRate(rng)
    now = 100.0
    assert rate.ready(now)
    for n in range(40):
        rate.failed(now) if n % 2 else rate.replied(SketchReply(0.0, 0, ((3, "busy"),)), now)
        pause = min(LONGEST_PAUSE_SECONDS, 2.0**n)
        assert not rate.ready(now + 0.49 * pause)
        assert rate.ready(now + pause)
        now += pause
    assert rate.share == MIN_SHARE
    rate.replied(SketchReply(1.0, 1), now)
    assert rate.ready(now)
    rate.failed(now)
    assert rate.ready(now + 1.0)  # patience starts anew


def test_senders_share_a_slow_owner_fairly_and_use_it(rng: random.Random) -> None:
    """Six composers, an owner that can do a third of their rows, then all: bounded, used, fair, and back to all."""
    names = [f"composer {n}" for n in range(6)]
    rates = {name: SenderRate(rng) for name in names}
    wanted, capacity = 200, 400  # rows per composer and turn; rows per turn
    queue: SketchQueue[tuple[str, int]] = SketchQueue(4 * capacity)
    served = dict.fromkeys(names, 0)
    for turn in range(1000):
        now = float(turn)
        for name in rng.sample(names, len(names)):
            if not rates[name].ready(now):
                continue
            count = math.ceil(wanted * rates[name].share)
            taken = queue.offer(name, (name, count), count, now)
            rates[name].replied(SketchReply(queue.rate(), int(taken), () if taken else ((3, "busy"),)), now)
        for name, count in queue.take(capacity):
            if turn >= 100:
                served[name] += count
    total = sum(served.values())
    assert total > 0.8 * 900 * capacity
    fairness = total**2 / (len(names) * sum(count**2 for count in served.values()))  # Jain's index, 1 is equal
    assert fairness > 0.98
    queue.take()
    for turn in range(1000, 1100):
        for name in names:
            if rates[name].ready(float(turn)):
                queue.offer(name, (name, 1), math.ceil(wanted * rates[name].share), float(turn))
                rates[name].replied(SketchReply(queue.rate(), 1), float(turn))
                queue.take()
    assert all(rate.share == 1.0 for rate in rates.values())


# Splitting ------------------------------------------------------------------------------------------------------------


def test_batches_fit_and_keep_everything(rng: random.Random) -> None:
    slots = [
        SlotSketch(
            slot,
            rng.randrange(1 << 48),
            rng.randrange(1 << 48),
            tuple(
                ExpertSketch(rng.randbytes(8), rng.randbytes(rng.choice([0, 5, 300, 800])))
                for _ in range(rng.randrange(1, 6))
            ),
        )
        for slot in range(60)
    ]
    step, tokens = (1 << 48) - 1, (1 << 48) - 1
    made = list(split(step, tokens, tokens, slots, max_bytes=1000))
    assert all(len(encode(batch)) <= 1000 for batch in made)
    assert {(batch.step, batch.tokens, batch.steps) for batch in made} == {(step, tokens, tokens)}
    assert [decode(encode(batch), SketchBatch) for batch in made] == made  # none names a slot twice
    pieces = [piece for batch in made for piece in batch.slots]
    assert [(p.slot, p.epoch, p.seq, e) for p in pieces for e in p.experts] == [
        (s.slot, s.epoch, s.seq, e) for s in slots for e in s.experts
    ]
    (whole,) = split(8, 100, 1, slots)
    assert whole.slots == tuple(slots)


def test_one_expert_too_long_for_any_batch() -> None:
    with pytest.raises(ValueError, match="one expert"):
        list(split(8, 100, 1, [slot_sketch(bytes(1000))], max_bytes=1000))
    assert list(split(8, 100, 1, [])) == []
