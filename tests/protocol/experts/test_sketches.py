"""Sketches at their owner's door: what is refused and why, and how they are cut into batches."""

from __future__ import annotations

import math
import random
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
    ITEM_BYTES,
    MAX_SEEN,
    Admitted,
    Held,
    Rules,
    SketchInbox,
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


def test_sketches_without_rows_fill_the_queue_too() -> None:
    inbox = SketchInbox(10 * LAYERS * ITEM_BYTES, RULES, load)
    replies = [inbox.receive("ann", batch_of(slot_sketch(rows(0)), step=n), MEMBERS, HELD, 0.0) for n in range(1000)]
    assert sum(reply.accepted for reply in replies) == 9  # and their headers
    assert replies[-1].refused == ((SLOT, "busy"),)
    assert inbox.refusals == {"busy": 991}


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
