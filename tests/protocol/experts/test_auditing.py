"""Audits without arithmetic: claims against what the auditor knows, what was sent, and whom not to trust."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.experts.auditing import (
    ACCUSATION_SECONDS,
    FORMER_SECONDS,
    LIES,
    MAX_ACCUSED,
    MOST_REMEMBERED,
    RECORD_BYTES,
    REMEMBERED,
    REPEATED_SECONDS,
    SILENCES,
    Asked,
    Distrust,
    Finding,
    SentLog,
    check_claims,
    chosen,
    num_chosen,
)
from shoal.protocol.messages import AuditedExpert, AuditedSketch, AuditRecord

ME, OTHER, WORKER = ("12D3KooW" + letter * 44 for letter in "MNW")
SLOT, EPOCH, SEQ = 3, 2, 17
HANDLES = (b"handle-a", b"handle-b")
ROLES = {ME: "composer", OTHER: "composer", WORKER: "worker"}
ASKED = Asked(me=ME, slot=SLOT, epoch=EPOCH, seq=SEQ, handles=HANDLES, newest=9)


def rows_of(step: int, handle: bytes) -> bytes:
    return b"rows of %d for %b" % (step, handle)


def log_of(*steps: int, taken: bool = True) -> SentLog:
    log = SentLog()
    for step in steps:
        log.sent(SLOT, step, 64, [(handle, rows_of(step, handle)) for handle in HANDLES], float(step))
        if taken:
            log.taken(SLOT, step, HANDLES)
    return log


def mine(step: int, handle: bytes) -> AuditedSketch:
    return AuditedSketch(ME, step, 64, rows_of(step, handle))


def record_of(*steps: int, **changes: Any) -> AuditRecord:
    """With a sketch of another composer, and the auditor's of these steps."""
    theirs = AuditedSketch(OTHER, 7, 64, b"rows")
    experts = tuple(
        AuditedExpert(handle, b"8 bytes!", (theirs, *(mine(step, handle) for step in steps)), b"8 bytes!", b"")
        for handle in HANDLES
    )
    return msgspec.structs.replace(AuditRecord(SLOT, EPOCH, SEQ, 12, 0.1, 1.0, experts), **changes)


def with_sketches(record: AuditRecord, sketches: tuple[AuditedSketch, ...]) -> AuditRecord:
    """The first expert's."""
    first = msgspec.structs.replace(record.experts[0], sketches=sketches)
    return msgspec.structs.replace(record, experts=(first, *record.experts[1:]))


# Claims ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(10,), (10, 11), (10, 11, 12), (12,)])
def test_an_honest_record_passes(steps: tuple[int, ...]) -> None:
    assert check_claims(record_of(*steps), ASKED, log_of(8, 9, 10, 11, 12), ROLES) is Finding.PASSED


def test_what_the_owner_refused_or_never_answered_for_may_be_missing() -> None:
    log = log_of(10, 12)
    log.sent(SLOT, 11, 64, [(handle, rows_of(11, handle)) for handle in HANDLES], 11.0)
    assert check_claims(record_of(10, 12), ASKED, log, ROLES) is Finding.PASSED


def test_a_slot_may_have_been_sent_in_pieces() -> None:
    log = SentLog()
    for handle in HANDLES:
        log.sent(SLOT, 10, 64, [(handle, rows_of(10, handle))], 10.0)
        log.taken(SLOT, 10, [handle])
    assert check_claims(record_of(10), ASKED, log, ROLES) is Finding.PASSED


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"slot": SLOT + 1}, Finding.NOT_AS_ASKED),
        ({"epoch": EPOCH + 1}, Finding.NOT_AS_ASKED),
        ({"seq": SEQ - 1}, Finding.STALE_STANDIN),
        ({"seq": SEQ + 1}, Finding.PASSED),
        ({"experts": record_of(10).experts[:1]}, Finding.NOT_AS_ASKED),
    ],
)
def test_not_what_was_asked_for(changes: dict[str, Any], finding: Finding) -> None:
    assert check_claims(record_of(10, **changes), ASKED, log_of(10), ROLES) is finding


@pytest.mark.parametrize(
    "change", [{"rows": b"others"}, {"tokens": 65}, {"step": 9}, {"step": 20}], ids=lambda change: next(iter(change))
)
def test_sketches_forged_in_the_auditors_name(change: dict[str, Any]) -> None:
    forged = with_sketches(record_of(10), (msgspec.structs.replace(mine(10, HANDLES[0]), **change),))
    assert check_claims(forged, ASKED, log_of(8, 9, 10), ROLES) is Finding.FORGED_SKETCH


def test_what_an_owner_holds_of_a_composers_former_life_is_not_forged() -> None:
    """The composer was killed at step 14 and went on from 9: it takes steps 10 to 14 again, with other rows."""
    former = with_sketches(record_of(10), (mine(10, HANDLES[0]), AuditedSketch(ME, 14, 64, b"of before")))
    again = with_sketches(record_of(10), (AuditedSketch(ME, 10, 64, b"of before"),))
    log = log_of(9, 10, 11)
    assert check_claims(former, ASKED, log, ROLES, now=50.0) is Finding.FORGED_SKETCH
    log.forgot(40.0)
    both = with_sketches(record_of(10), (mine(10, HANDLES[0]), AuditedSketch(ME, 10, 64, b"of before")))
    for record in former, again, both:
        assert check_claims(record, ASKED, log, ROLES, now=50.0) is Finding.OLD_SKETCH
        assert check_claims(record, ASKED, log, ROLES, now=40.0 + FORMER_SECONDS) is Finding.FORGED_SKETCH
    twice = with_sketches(record_of(10), (mine(10, HANDLES[0]), mine(10, HANDLES[0])))
    assert check_claims(twice, ASKED, log, ROLES, now=50.0) is Finding.FORGED_SKETCH


def test_one_sketch_used_twice() -> None:
    twice = with_sketches(record_of(10), (mine(10, HANDLES[0]), mine(10, HANDLES[0])))
    assert check_claims(twice, ASKED, log_of(10), ROLES) is Finding.FORGED_SKETCH


def test_a_sketch_left_out_between_two() -> None:
    log = log_of(10, 11, 12)
    left_out = with_sketches(record_of(10, 11, 12), (mine(10, HANDLES[0]), mine(12, HANDLES[0])))
    assert check_claims(left_out, ASKED, log, ROLES) is Finding.LEFT_OUT


def test_sketches_of_those_who_have_no_text() -> None:
    strange = with_sketches(record_of(10), (AuditedSketch(WORKER, 7, 64, b"rows"),))
    assert check_claims(strange, ASKED, log_of(10), ROLES) is Finding.STRANGER
    unknown = with_sketches(record_of(10), (AuditedSketch("12D3KooW" + "X" * 44, 7, 64, b"rows"),))
    assert check_claims(unknown, ASKED, log_of(10), ROLES) is Finding.UNKNOWN_SENDER


def test_silences_are_no_lies() -> None:
    assert check_claims(with_sketches(record_of(10), ()), ASKED, log_of(10), ROLES) is Finding.EMPTY
    assert check_claims(record_of(), ASKED, log_of(8, 9, 10), ROLES) is Finding.UNHEARD
    assert check_claims(record_of(), ASKED, log_of(8, 9), ROLES) is Finding.PASSED  # nothing taken since
    assert check_claims(record_of(), ASKED, log_of(10, taken=False), ROLES) is Finding.PASSED
    full = log_of(*range(20, 20 + REMEMBERED))
    assert check_claims(record_of(10, 20), ASKED, full, ROLES) is Finding.OLD_SKETCH
    assert check_claims(record_of(10), ASKED, SentLog(), ROLES) is Finding.OLD_SKETCH  # it has just restarted
    assert not LIES & SILENCES.keys()
    assert set(Finding) == {*LIES, *SILENCES, Finding.PASSED}


def test_without_rows_sketches_do_not_matter() -> None:
    blind = Asked(me=ME, slot=SLOT, epoch=EPOCH, seq=SEQ, handles=HANDLES, newest=9, rows=False)
    assert check_claims(with_sketches(record_of(), ()), blind, SentLog(), ROLES) is Finding.PASSED
    assert check_claims(record_of(epoch=9), blind, SentLog(), ROLES) is Finding.NOT_AS_ASKED


def test_memory_of_what_was_sent_is_bounded() -> None:
    log = log_of(*range(1000))
    assert log.steps_taken(SLOT) == list(range(1000 - REMEMBERED, 1000))
    for step in range(1000, 2000):  # fifty a second: a busy owner may take seconds to use one, and to show it
        log.sent(SLOT, step, 64, [(HANDLES[0], b"")], 1000 + step / 50)
        log.taken(SLOT, step, HANDLES)
    assert log.steps_taken(SLOT) == list(range(2000 - MOST_REMEMBERED, 2000))
    assert log.steps_taken(SLOT + 1) == []


# Which experts --------------------------------------------------------------------------------------------------------


def test_the_seed_chooses_and_the_owner_cannot_know_before() -> None:
    handles = [bytes([i]) * 8 for i in range(48)]
    draws = [chosen(seed, handles, 3) for seed in range(200)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert chosen(5, reversed(handles), 3) == draws[5]
    counts = [sum(handle in draw for draw in draws) for handle in handles]
    assert min(counts) > 2
    assert max(counts) < 30  # 12.5 on average


@given(st.integers(1, 512), st.integers(1, 1 << 28))
def test_records_are_bounded(num_experts: int, weights: int) -> None:
    num = num_chosen(num_experts, weights)
    assert 1 <= num <= num_experts
    assert num == 1 or num * weights * 12 < RECORD_BYTES


# Distrust -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", sorted(LIES))
def test_one_lie_convicts_once(lie: Finding) -> None:
    distrust = Distrust(ME, audits=True)
    assert distrust.judge(WORKER, lie)
    assert not distrust.judge(WORKER, lie)
    assert not distrust.judge(WORKER, Finding.PASSED)
    assert distrust.distrusted([]) == {WORKER}


@pytest.mark.parametrize("silence", sorted(SILENCES))
def test_silences_convict_in_a_row_only(silence: Finding) -> None:
    distrust = Distrust(ME, audits=True)
    for _ in range(SILENCES[silence] - 1):
        assert not distrust.judge(WORKER, silence)
    assert not distrust.judge(WORKER, Finding.PASSED)
    for _ in range(SILENCES[silence] - 1):
        assert not distrust.judge(WORKER, silence)
    assert distrust.judge(WORKER, silence)
    assert distrust.convicted == {WORKER: Finding.SILENT}


def test_who_audits_believes_nobody_but_looks_for_itself() -> None:
    distrust = Distrust(ME, audits=True)
    active = [ME, "a", "b", "c"]
    assert distrust.hear("a", WORKER, active, 0.0)
    assert distrust.hear("b", WORKER, active, 0.0)
    assert distrust.hear("c", WORKER, active, 0.0)
    assert distrust.distrusted(active) == set()
    assert not distrust.hear("a", WORKER, active, ACCUSATION_SECONDS - 1)
    assert distrust.hear("a", WORKER, active, ACCUSATION_SECONDS)
    distrust.judge(WORKER, Finding.WRONG_UPDATE)
    assert not distrust.hear("b", WORKER, active, 1000.0)


def test_a_worker_follows_more_than_half_of_the_active_composers() -> None:
    distrust = Distrust(ME, audits=False)
    active = ["a", "b", "c", "d"]
    for accuser in ("a", "a", "b", "x", "y", WORKER):
        assert not distrust.hear(accuser, WORKER, active, 0.0)
    assert distrust.distrusted(active) == set()
    distrust.hear("c", WORKER, active, 0.0)
    assert distrust.distrusted(active) == {WORKER}
    assert distrust.distrusted(["a", "d", "e"]) == set()  # some have left, others have come


def test_accusations_of_oneself_and_of_the_hearer_are_void_and_their_number_is_bounded() -> None:
    distrust = Distrust(ME, audits=True)
    assert not distrust.hear("a", ME, ["a"], 0.0)
    assert not distrust.hear("a", "a", ["a"], 0.0)
    for number in range(2 * MAX_ACCUSED):
        distrust.hear("liar", f"peer {number}", ["liar"], 0.0)
    follower = Distrust(ME, audits=False)
    for number in range(2 * MAX_ACCUSED):
        follower.hear("liar", f"peer {number}", ["liar"], 0.0)
    assert len(follower.distrusted(["liar"])) == MAX_ACCUSED


def test_accusations_count_as_long_as_they_are_repeated_and_leave_room_for_others_then() -> None:
    follower = Distrust(ME, audits=False)
    for number in range(MAX_ACCUSED):
        follower.hear("a", f"peer {number}", ["a"], 0.0)
    follower.hear("a", WORKER, ["a"], REPEATED_SECONDS / 2)
    assert WORKER not in follower.distrusted(["a"]), "there is no room"
    follower.hear("a", "peer 0", ["a"], REPEATED_SECONDS / 2)
    follower.hear("a", WORKER, ["a"], REPEATED_SECONDS)
    assert follower.distrusted(["a"]) == {"peer 0", WORKER}


def test_accusers_that_come_and_go_leave_nothing_behind() -> None:
    distrust = Distrust(ME, audits=True)
    for number in range(100):
        assert distrust.hear(f"accuser {number}", WORKER, [f"accuser {number}"], number * REPEATED_SECONDS)
    assert len(distrust._accused) == len(distrust._acted) == 1
