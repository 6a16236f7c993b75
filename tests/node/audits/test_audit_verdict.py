"""A worker's step on file: the honest one passes for whatever it learned, and each kind of lie is found."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch
from shoal.kernels.sketch import RowBuffer, RowSketch
from shoal.kernels.standin import Menu, initial_standin
from shoal.node.audits.audit_record import message_of
from shoal.node.audits.audit_verdict import Known, judge, judge_weights
from shoal.node.audits.step_record import StepRecord
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.learning.worker import Worker
from shoal.node.run.manifest import Manifest, SketchSpec
from shoal.node.storage.blobs import from_bytes, to_bytes
from shoal.protocol.errors import Refused
from shoal.protocol.experts.auditing import Finding
from shoal.protocol.messages import AuditRecord, SlotState, StandInSnapshot, decode, encode
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of

SLOT, EPOCH, SEQ, STEP = 1, 3, 5, 12
HANDLES = [b"expert-%d" % i for i in range(LAYERS)]
SENDERS = ["12D3KooW" + letter * 44 for letter in "AB"]
TOKENS = 32


def manifest(*, kind: str = "lowbit", kappa: float = -1.0, **train: Any) -> Manifest:
    base = manifest_of(train=train, standin={"kind": kind, "replay_rows": 64})
    return msgspec.structs.replace(base, sketch=SketchSpec(kappa=kappa))


def sketch_of(rows: int, seed: int, keep: int | None = None) -> RowSketch:
    generator = torch.Generator().manual_seed(seed)
    buffer = RowBuffer(HIDDEN, "int8", max_rows=64, generator=generator)
    buffer.add(torch.randn(rows, HIDDEN, generator=generator), torch.randn(rows, HIDDEN, generator=generator) / 50)
    return buffer.take(keep, generator)


@dataclass
class Case:
    """An honest record, and what its auditor knows."""

    manifest: Manifest
    worker: Worker
    record: AuditRecord
    known: Known
    menu: Menu

    def judge(self, record: AuditRecord | None = None) -> Finding:
        sent = encode(record or self.record)
        return judge(decode(sent, AuditRecord), self.manifest, self.known, self.menu)


def hear(worker: Worker, seed: int, *, keep: int | None = None) -> None:
    for number, sender in enumerate(SENDERS):
        sketches = {p: sketch_of(20, 100 * seed + 10 * number + p, keep) for p in range(LAYERS)}
        worker.hear(sender, SLOT, sketches, tokens=TOKENS, step=STEP, age=number % 2)


def case_of(
    spec: Manifest, *, seed: int = 0, steps: int = 3, keep: int | None = None, mode: ExpertMode | None = None
) -> Case:
    """A worker that has taken some steps, and one more that is on file."""
    composer = composer_of(spec, seed=seed)
    worker = Worker(spec, composers=lambda: dict.fromkeys(SENDERS, STEP), mode=mode)
    menu = composer.menu
    state = {name: value for name, value in composer.snapshot(SLOT).items() if name.count(".") == 1}
    worker.adopt(SLOT, state, composer.standins(SLOT))
    for step in range(steps):
        hear(worker, 7 * seed + step)
        worker.train_step()
    worker.publish([SLOT])
    records: list[StepRecord] = []

    def finish(record: StepRecord | None) -> None:
        assert record is not None
        records.append(record)

    worker.record_step(SLOT, tuple(range(LAYERS)), finish)
    hear(worker, 7 * seed + steps, keep=keep)
    standins = {position: standin.to_bytes() for position, standin in enumerate(worker.standins(SLOT))}
    worker.train_step()
    [record] = records
    by_handle = dict(zip(HANDLES, range(LAYERS), strict=True))
    published = {SEQ: {handle: standins[position] for handle, position in by_handle.items()}}
    known = Known(published=published, steps=[STEP])
    return Case(spec, worker, message_of(SLOT, EPOCH, by_handle, record, SEQ, standins), known, menu)


@pytest.fixture(params=["adamw", "muon"])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(manifest(optimizer=request.param))


Change = Callable[[dict[str, torch.Tensor]], object]


def changed(record: AuditRecord, part: str, change: Change, expert: int = 0) -> AuditRecord:
    """With the tensors of one expert's `before` or `after` changed."""
    tensors = from_bytes(getattr(record.experts[expert], part), what="a test")
    change(tensors)
    return with_expert(record, expert, **{part: to_bytes(tensors)})


def with_expert(record: AuditRecord, expert: int = 0, **fields: Any) -> AuditRecord:
    experts = list(record.experts)
    experts[expert] = msgspec.structs.replace(experts[expert], **fields)
    return msgspec.structs.replace(record, experts=tuple(experts))


def with_sketches(record: AuditRecord, change: Callable[[list[Any]], list[Any]], expert: int = 0) -> AuditRecord:
    return with_expert(record, expert, sketches=tuple(change(list(record.experts[expert].sketches))))


# Honest ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint64, torch.float16, torch.float8_e5m2])
def test_an_optimizers_step_in_a_type_that_cannot_be_computed_with(case: Case, dtype: torch.dtype) -> None:
    """Whoever makes the verdict raise is never convicted."""
    step = torch.ones(()).to(dtype)
    record = changed(case.record, "before", lambda tensors: tensors.update({"down.step": step}))
    assert case.judge(record) is Finding.MALFORMED


def test_low_rank_factors_that_are_no_matrices() -> None:
    spec = manifest()
    lora = case_of(spec, mode=ExpertMode(spec.train, "lora", rank=4))
    assert lora.judge(lora.record) is Finding.PASSED
    change = {"lora.gate_up_a": torch.ones(())}
    assert lora.judge(changed(lora.record, "before", lambda tensors: tensors.update(change))) is Finding.MALFORMED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "lowbit"},
        {"kind": "lowbit", "kappa": 4.0, "grad_clip": 1e-3},
        {"kind": "narrow", "expert_rate": 2.0},
        {"kind": "ternary", "expert_weights": "ternary"},
        {"kind": "ternary", "expert_weights": "ternary", "kappa": 20.0},
        {"kind": "lowbit", "optimizer": "muon", "expert_rate": 2.0},
        {"kind": "ternary", "expert_weights": "ternary", "optimizer": "muon"},
    ],
    ids=str,
)
def test_an_honest_step_passes(options: dict[str, Any], seed: int) -> None:
    case = case_of(manifest(**options), seed=seed, steps=seed, keep=5 if seed else None)
    assert len(case.record.experts[0].sketches) == len(SENDERS)
    assert case.judge() is Finding.PASSED


@pytest.mark.parametrize("rank", [1, 8])
def test_low_rank_training_can_be_audited(rank: int) -> None:
    spec = manifest()
    case = case_of(spec, mode=ExpertMode(spec.train, "lora", rank=rank))
    assert case.judge() is Finding.PASSED

    def doubled(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora.down_b"] *= 2

    def other_base(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora.codes"][0] ^= 0x11

    def other_rank(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate_up_a", "down_a"):
            tensors[f"lora.{name}"] = torch.cat([tensors[f"lora.{name}"]] * 2)
        for name in ("gate_up_b", "down_b"):
            tensors[f"lora.{name}"] = torch.cat([tensors[f"lora.{name}"]] * 2, dim=1)

    for lie in (doubled, other_base, other_rank):
        assert case.judge(changed(case.record, "after", lie)) is Finding.WRONG_UPDATE
    assert case.judge(changed(case.record, "before", lambda tensors: tensors.pop("lora.codes"))) is Finding.MALFORMED
    ternary = msgspec.structs.replace(spec, train=msgspec.structs.replace(spec.train, expert_weights="ternary"))
    assert judge(case.record, ternary, case.known, case.menu) is Finding.MALFORMED


def test_sketches_travel_as_they_came(case: Case) -> None:
    """The auditor compares digests of what it sent."""
    sent = [sketch_of(20, 100 * 3 + 10 * number).to_bytes() for number in range(len(SENDERS))]
    assert [used.rows for used in case.record.experts[0].sketches] == sent


def test_sketches_are_corrected_against_the_stand_ins_that_they_were_taken_at() -> None:
    """One of them travelled while the owner published; a record that hides it does not add up."""
    case = case_of(manifest(kappa=3000.0))
    [expert, *_] = case.record.experts
    assert [used.past for used in expert.sketches] == [0, 1]
    assert len(expert.past) == 1
    assert case.judge() is Finding.PASSED
    for past in (2, 64):
        lie = with_sketches(case.record, lambda used, past=past: [msgspec.structs.replace(used[0], past=past), used[1]])
        assert case.judge(lie) is Finding.MALFORMED
    lie = with_sketches(case.record, lambda used: [msgspec.structs.replace(each, past=0) for each in used])
    assert case.judge(lie) is Finding.WRONG_UPDATE
    other = with_expert(case.record, past=(other_standin(case),))
    assert case.judge(other) in (Finding.WRONG_UPDATE, Finding.POOR_STANDIN)


def test_another_machines_rounding_passes(case: Case) -> None:
    def round_off(tensors: dict[str, torch.Tensor]) -> None:
        for value in tensors.values():
            value.mul_(1 + 1e-7 * torch.randn(value.shape))

    assert case.judge(changed(case.record, "after", round_off)) is Finding.PASSED


def test_an_owner_that_a_deltas_way_is_ahead_passes(case: Case) -> None:
    ahead = replace(case, known=Known(published={SEQ - 1: case.known.published[SEQ]}, steps=[STEP]))
    assert ahead.judge() is Finding.PASSED


def test_runs_whose_updates_cannot_be_taken_again_are_not_judged_by_them(case: Case) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors["down"] *= 1.01

    lie = changed(case.record, "after", double)
    assert case.judge(lie) is Finding.WRONG_UPDATE
    gradient = msgspec.structs.replace(case.manifest, sketch=SketchSpec(kind="gradient"))
    assert judge(lie, gradient, case.known, case.menu) is Finding.PASSED


# Lies -----------------------------------------------------------------------------------------------------------------


def test_a_scaled_update(case: Case) -> None:
    before = from_bytes(case.record.experts[0].before, what="a test")

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("gate_up", "down"):
            tensors[name] += 0.1 * (tensors[name] - before[name])

    assert case.judge(changed(case.record, "after", scale)) is Finding.WRONG_UPDATE


def test_weights_that_were_not_trained(case: Case) -> None:
    before = case.record.experts[1].before

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value for name, value in from_bytes(before, what="a test").items() if "." not in name})

    assert case.judge(changed(case.record, "after", keep, expert=1)) is Finding.WRONG_UPDATE


def test_one_matrix_that_was_not_trained(case: Case) -> None:
    before = from_bytes(case.record.experts[0].before, what="a test")
    lie = changed(case.record, "after", lambda tensors: tensors.update(down=before["down"]))
    assert case.judge(lie) is Finding.WRONG_UPDATE


def test_a_sketch_left_out_or_made_up(case: Case) -> None:
    assert case.judge(with_sketches(case.record, lambda used: used[1:])) is Finding.WRONG_UPDATE
    made_up = sketch_of(20, 999).to_bytes()
    lie = with_sketches(case.record, lambda used: [used[0], msgspec.structs.replace(used[1], rows=made_up)])
    assert case.judge(lie) is Finding.WRONG_UPDATE


def test_tokens_that_were_not_sent(case: Case) -> None:
    lie = with_sketches(case.record, lambda used: [used[0], msgspec.structs.replace(used[1], tokens=50 * TOKENS)])
    assert case.judge(lie) is not Finding.PASSED
    few = with_sketches(case.record, lambda used: [used[0], msgspec.structs.replace(used[1], tokens=1)])
    assert case.judge(few) is Finding.MALFORMED  # fewer than rows


@pytest.mark.parametrize("rate", [0.0, 1e-9, 0.5, 1e5])
def test_another_learning_rate(case: Case, rate: float) -> None:
    assert case.judge(msgspec.structs.replace(case.record, learning_rate=rate)) is Finding.WRONG_RATE


def test_a_step_that_all_composers_have_left_behind(case: Case) -> None:
    """It keeps the high rate of the beginning, or the low one of before that."""
    spec = msgspec.structs.replace(case.manifest, train=msgspec.structs.replace(case.manifest.train, steps=100_000))
    early = msgspec.structs.replace(case.record, step=0, learning_rate=spec.train.learning_rate / 4)
    assert judge(early, spec, replace(case.known, steps=[5_000, 6_000]), case.menu) is Finding.WRONG_RATE
    assert judge(early, spec, replace(case.known, steps=[10, 6_000]), case.menu) is not Finding.WRONG_RATE


def test_a_step_after_the_last(case: Case) -> None:
    late = msgspec.structs.replace(case.record, step=case.manifest.train.steps + 1)
    worker = Worker(case.manifest, composers=dict)
    worker.step = late.step
    late = msgspec.structs.replace(late, learning_rate=worker.learning_rate())
    assert case.judge(late) is Finding.WRONG_RATE


def test_a_gradient_that_was_not_clipped() -> None:
    case = case_of(manifest(grad_clip=1e-4))
    assert case.record.clip < 0.9
    assert case.judge() is Finding.PASSED
    assert case.judge(msgspec.structs.replace(case.record, clip=1.0)) is Finding.WRONG_CLIP


def other_standin(case: Case) -> bytes:
    rng = torch.Generator().manual_seed(5)
    weights = torch.randn(2 * WIDTH, HIDDEN, generator=rng) / 50, torch.randn(HIDDEN, WIDTH, generator=rng) / 50
    return initial_standin(case.manifest.standin.kind, *weights, case.menu.forms[0].size).to_bytes()


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_published_stand_ins_of_another_expert(kind: str) -> None:
    """Of a peer that trains one thing and publishes another, or the experts in another order."""
    case = case_of(manifest(kind=kind))
    record = case.record
    assert case.judge(with_expert(record, standin=other_standin(case))) is Finding.OTHER_STANDIN
    for lie in ({HANDLES[0]: other_standin(case)}, dict(zip(HANDLES, reversed([e.standin for e in record.experts])))):  # noqa: B905
        published = {SEQ: case.known.published[SEQ] | lie}
        told = replace(case, known=replace(case.known, published=published))
        same = record
        for number, expert in enumerate(record.experts):
            same = with_expert(same, number, standin=published[SEQ][expert.handle])
        assert told.judge(same) in (Finding.POOR_STANDIN, Finding.WRONG_UPDATE)


def test_composers_publish_what_they_have() -> None:
    spec = manifest()
    composer = composer_of(spec, seed=3)
    published = [standin.to_bytes() for standin in composer.standins(SLOT)]
    snapshot = StandInSnapshot(SLOT, EPOCH, SEQ, tuple(published), bytes(16))
    state = SlotState(SLOT, EPOCH, STEP, to_bytes(composer.weights(SLOT)), snapshot)
    menu = composer.menu
    assert judge_weights(state, spec, published, menu) is Finding.PASSED
    others = [standin.to_bytes() for standin in composer.standins(SLOT + 1)]
    assert judge_weights(state, spec, others, menu) is Finding.POOR_STANDIN
    tensors = from_bytes(state.tensors, what="a test")
    for name, value in (("0.down", tensors["0.down"].half()), ("1.gate_up", torch.zeros(3)), ("0.down", None)):
        damaged = {**tensors, name: value} if value is not None else {k: v for k, v in tensors.items() if k != name}
        lie = msgspec.structs.replace(state, tensors=to_bytes(damaged))
        assert judge_weights(lie, spec, published, menu) is Finding.MALFORMED


# Nonsense -------------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, Change] = {
    "NaN": lambda tensors: tensors["down"].__setitem__((0, 0), torch.nan),
    "shape": lambda tensors: tensors.update(down=tensors["down"][:, 1:].contiguous()),
    "dtype": lambda tensors: tensors.update(gate_up=tensors["gate_up"].double()),
    "missing": lambda tensors: tensors.pop("gate_up"),
    "huge": lambda tensors: tensors["gate_up"].fill_(3e38),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["before", "after"])
def test_damaged_weights(case: Case, part: str, damage: str) -> None:
    found = case.judge(changed(case.record, part, DAMAGE[damage]))
    assert found in (Finding.MALFORMED, Finding.WRONG_UPDATE)


def test_damaged_optimizer_state(case: Case) -> None:
    adamw = (lambda tensors: tensors.pop("down.exp_avg"), lambda tensors: tensors["down.exp_avg_sq"].neg_())
    muon = (lambda tensors: tensors.pop("down.momentum"), lambda tensors: tensors["down.momentum"].fill_(math.nan))
    for change in (
        *(muon if case.manifest.train.optimizer == "muon" else adamw),
        lambda tensors: tensors.update({"down.step": torch.tensor(-1.0)}),
        lambda tensors: tensors.update({"down.more": torch.zeros(3)}),
    ):
        assert case.judge(changed(case.record, "before", change)) is Finding.MALFORMED


def test_damaged_sketches_and_stand_ins(case: Case) -> None:
    for rows in (b"", b"x" * 100, case.record.experts[0].sketches[0].rows[:-1]):
        lie = with_sketches(case.record, lambda used, rows=rows: [msgspec.structs.replace(used[0], rows=rows)])
        assert case.judge(lie) is Finding.MALFORMED
    assert case.judge(with_expert(case.record, standin=b"no stand-in")) is Finding.MALFORMED


def test_random_damage_never_raises(case: Case) -> None:
    rng = random.Random(11)
    sent = encode(case.record)
    for _ in range(60):
        data = bytearray(sent)
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cut = bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            record = decode(cut, AuditRecord)
        except Refused:
            continue
        assert isinstance(judge(record, case.manifest, case.known, case.menu), Finding)
