"""What owners of experts share: gradients in the units of a mean over all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from shoal.kernels.experts import DenseExpert
from shoal.kernels.sign_sketch import SignSketch
from shoal.kernels.sketch import RowSketch
from shoal.kernels.sketch_gradient import expert_gradient
from shoal.node.run.manifest import Manifest, SketchSpec
from shoal.node.sketches.sketch_sums import SETTLE_ROWS
from shoal.node.standins.past_standins import KEPT
from sketches import KINDS, OTHER, gradient, owner_of, rows, sketch_of, worker_of
from tiny import HIDDEN, WIDTH, manifest_of
from torch import Tensor

HALF = torch.finfo(torch.float16).eps  # relative error of a row's values


def plain(**train: Any) -> Manifest:
    """A run whose sketches are not corrected."""
    return msgspec.structs.replace(manifest_of(train=train), sketch=SketchSpec(kappa=0.0))


def grads(expert: DenseExpert) -> tuple[Tensor, Tensor]:
    assert expert.gate_up.grad is not None
    assert expert.down.grad is not None
    return expert.gate_up.grad, expert.down.grad


def close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Equal but for the rounding of rows to float16."""
    for a, b in zip(got, wanted, strict=True):
        assert float((a.double() - b).norm()) <= 8 * HALF * float(b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_mean_over_own_and_sketched_tokens(kind: str) -> None:
    owner = owner_of(kind, plain())
    experts = owner.experts_of(1)
    own_tokens = 40 if kind == "composer" else 0
    own = [rows(own_tokens // 2) for _ in experts]
    sent = [[rows(7), rows(16)] for _ in experts]
    tokens = (25, 60)  # of each sender, whichever way they were routed
    for position, expert in enumerate(experts):
        weights = expert.gate_up, expert.down
        if own_tokens:
            sums = gradient(*weights, *own[position])
            for weight, total in zip(weights, sums, strict=True):
                weight.grad = (total / own_tokens).float()
        for count, (x, dy) in zip(tokens, sent[position], strict=True):
            owner.hear(OTHER, 1, {position: sketch_of(x, dy)}, tokens=count, step=1)
    owner._set_gradients(own_tokens, [1])
    for position, expert in enumerate(experts):
        x, dy = (torch.cat(column) for column in zip(own[position], *sent[position], strict=True))
        joint = gradient(expert.gate_up, expert.down, x, dy)
        close(grads(expert), tuple(g / (own_tokens + sum(tokens)) for g in joint))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_sketch_counts_as_what_it_is_worth(kind: str) -> None:
    owner = owner_of(kind, plain())
    expert = owner.experts_of(0)[0]
    whole, part = sketch_of(*rows(12)), sketch_of(*rows(40), keep=10)
    assert 0.0 < part.effective < 1.0
    owner.absorb(0, 0, whole, 30)
    owner.absorb(0, 0, part, 50)
    owner._set_gradients(0, [0])
    total = 30 + part.effective * 50
    weights = expert.gate_up.detach().double(), expert.down.detach().double()
    both = [expert_gradient(*weights, sketch) for sketch in (whole, part)]
    wanted = tuple((a + part.effective * b) / total for a, b in zip(*both, strict=True))
    close(grads(expert), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_nobody_could_send_are_worth_nothing(kind: str) -> None:
    """Of a sketch with no rows of some not even the tokens count; one of none because none was routed says zero."""
    owner = owner_of(kind, plain())
    expert = owner.experts_of(0)[0]
    x, dy = rows(8)
    owner.absorb(0, 0, sketch_of(x, dy), 20)
    owner.absorb(0, 0, sketch_of(*rows(9), keep=0), 1000)
    owner.absorb(0, 0, sketch_of(*rows(0)), 20)
    owner._set_gradients(0, [0])
    close(grads(expert), tuple(g / 40 for g in gradient(expert.gate_up, expert.down, x, dy)))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_nobody_routed_to_are_left_alone(kind: str) -> None:
    """They neither decay nor go on by old momentum."""
    owner = owner_of(kind, plain(learning_rate=0.1))
    expert = owner.experts_of(0)[1]
    for weight in (expert.gate_up, expert.down):
        owner.optimizer.state[weight] = {
            "step": torch.tensor(3.0), "exp_avg": torch.ones_like(weight), "exp_avg_sq": torch.ones_like(weight)
        }  # fmt: skip
    before = owner.snapshot(0)
    owner.absorb(0, 1, sketch_of(*rows(0)), 50)
    owner.absorb(0, 0, sketch_of(*rows(5)), 50)
    owner._set_gradients(0, owner.owned)
    assert expert.gate_up.grad is None
    assert expert.down.grad is None
    owner.optimizer.step()
    after = owner.snapshot(0)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("1."))
    assert not torch.equal(after["0.down"], before["0.down"])
    assert not torch.equal(after["0.gate_up"], before["0.gate_up"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_frozen_slot_is_told_is_forgotten(kind: str) -> None:
    owner = owner_of(kind, plain())
    owner.freeze(0)
    owner.absorb(0, 0, sketch_of(*rows(5)), 50)
    owner._set_gradients(0, owner.owned)
    expert = owner.experts_of(0)[0]
    assert expert.down.grad is None
    owner.thaw(0)
    x, dy = rows(6)
    owner.absorb(0, 0, sketch_of(x, dy), 10)
    owner._set_gradients(0, owner.owned)
    close(grads(expert), tuple(g / 10 for g in gradient(expert.gate_up, expert.down, x, dy)))


def test_a_frozen_slot_publishes_only_when_asked() -> None:
    """Its next owner goes on from what travelled; a later delta would make everybody fetch."""
    worker = worker_of(plain())
    worker.freeze(1)
    assert set(worker.publish()) == {0}
    assert set(worker.publish([1])) == {1}


def rescaled(sketch: RowSketch, **changes: Any) -> RowSketch:
    fields = {name: getattr(sketch, name) for name in sketch.__dataclass_fields__}
    return RowSketch(**fields | changes)


def huge() -> tuple[RowSketch, int]:
    return sketch_of(*(1e9 * values for values in rows(8)), codec="int8"), 10


def endless() -> tuple[RowSketch, int]:
    return sketch_of(*(1e14 * values for values in rows(8)), codec="int8"), 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lie", [huge, endless])
def test_one_sketch_cannot_spoil_the_step_of_all(kind: str, lie: Callable[[], tuple[RowSketch, int]]) -> None:
    """What would end in infinity is left out, with its tokens and its rows, and counted."""
    owner = owner_of(kind, plain())
    expert = owner.experts_of(0)[0]
    honest = [rows(8), rows(9)]
    for sketch, tokens in ((sketch_of(*honest[0]), 20), lie(), (sketch_of(*honest[1]), 30)):
        owner.absorb(0, 0, sketch, tokens)
    owner._set_gradients(0, [0])
    assert owner.dropped_sketches == 1
    x, dy = (torch.cat(column) for column in zip(*honest, strict=True))
    close(grads(expert), tuple(g / 50 for g in gradient(expert.gate_up, expert.down, x, dy)))
    assert int(owner.publishers[0][0].state_dict()["replay.seen"]) == 17


@pytest.mark.parametrize("kind", KINDS)
def test_a_sketch_that_counts_as_nothing_is_refused(kind: str) -> None:
    """It would end in 0 / 0."""
    owner = owner_of(kind, plain())
    with pytest.raises(ValueError, match="counts as"):
        owner.absorb(0, 0, rescaled(sketch_of(*rows(40), keep=10), effective=1e-60), 10)
    owner._set_gradients(0, [0])
    assert owner.experts_of(0)[0].down.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_sketches_wait_within_bounds_where_no_step_is_taken(kind: str) -> None:
    owner = owner_of(kind, plain())
    sketches = [sketch_of(*rows(SETTLE_ROWS // 4 + 1)) for _ in range(9)]
    most = 0
    for sketch in sketches:
        owner.absorb(0, 0, sketch, sketch.num_rows)
        most = max(most, owner._sums[0, 0]._waiting_rows)
    assert most < SETTLE_ROWS
    owner._set_gradients(0, [0])
    expert = owner.experts_of(0)[0]
    weights = expert.gate_up.detach().double(), expert.down.detach().double()
    parts = [expert_gradient(*weights, sketch) for sketch in sketches]
    tokens = sum(sketch.num_rows for sketch in sketches)
    close(grads(expert), tuple(sum(part[i] for part in parts) / tokens for i in range(2)))  # type: ignore[arg-type]


@pytest.mark.parametrize("age", [1, 2, KEPT + 3])
def test_rows_that_were_under_way_are_corrected_against_an_earlier_standin(age: int) -> None:
    """`age` versions ago; against the oldest there is where that is too long ago."""
    manifest = msgspec.structs.replace(
        manifest_of(standin={"kind": "narrow", "width_fraction": 0.5}), sketch=SketchSpec(kappa=3.0)
    )
    worker = worker_of(manifest)
    versions = [worker.publishers[1][0].published.dense()]
    for _ in range(KEPT + 1):
        worker.publishers[1][0].observe(torch.randn(64, HIDDEN), torch.ones(64))
        worker.publish([1])
        versions.append(worker.publishers[1][0].published.dense())
    sketch = sketch_of(*rows(20))
    worker.absorb(1, 0, sketch, 64, age)
    worker.absorb(1, 0, sketch, 64)
    worker._set_gradients(0, [1])
    expert = worker.experts_of(1)[0]
    double = [w.detach().double() for w in (expert.gate_up, expert.down)]
    late, fresh = (
        expert_gradient(*double, sketch, kappa=3.0, standin=standin)
        for standin in (versions[max(-1 - age, -KEPT)], versions[-1])
    )
    close(grads(expert), tuple((a + b) / 128 for a, b in zip(late, fresh, strict=True)))
    assert float((late[1] - fresh[1]).norm()) > 0.01 * float(fresh[1].norm())


def test_rows_are_corrected_against_the_standin_that_they_were_taken_at() -> None:
    """Also if a new one is published before the step."""
    manifest = msgspec.structs.replace(
        manifest_of(standin={"kind": "narrow", "width_fraction": 0.5}), sketch=SketchSpec(kappa=3.0)
    )
    worker, sketch = worker_of(manifest), sketch_of(*rows(20))
    taken_at = worker.publishers[1][0].published.dense()
    worker.publishers[1][0].observe(torch.randn(64, HIDDEN), torch.ones(64))
    worker.absorb(1, 0, sketch, 64)
    worker.publish([1])
    assert not torch.equal(worker.publishers[1][0].published.dense()[1], taken_at[1])
    worker._set_gradients(0, [1])
    expert = worker.experts_of(1)[0]
    double = [w.detach().double() for w in (expert.gate_up, expert.down)]
    corrected = expert_gradient(*double, sketch, kappa=3.0, standin=taken_at)
    close(grads(expert), tuple(g / 64 for g in corrected))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_gradients_that_are_not_finite_are_refused_with_nothing_changed(value: float) -> None:
    worker = worker_of(plain())
    shapes = torch.zeros(2 * WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)
    for bad in range(2):
        lie = [t.clone() for t in shapes]
        lie[bad][3, 5] = value
        with pytest.raises(ValueError, match="slot 0"):
            worker.absorb_gradient(0, 0, *lie, tokens=10, rows=3)
    assert not worker._sums


def test_what_is_not_owned_takes_nothing() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="slot 3 is not owned"):
            owner_of(kind, plain()).absorb(3, 0, sketch_of(*rows(5)), 10)


# -- the correction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["isotropic", "diagonal", "full"])
def test_the_correction_is_made_against_what_is_published(curvature: Any) -> None:
    manifest = msgspec.structs.replace(
        manifest_of(standin={"kind": "narrow", "width_fraction": 0.5}),
        sketch=SketchSpec(kappa=3.0, curvature=curvature),
    )
    worker = worker_of(manifest)
    expert, published = worker.experts_of(1)[0], worker.publishers[1][0].published
    sketch = sketch_of(*rows(20))
    worker.absorb(1, 0, sketch, 64)
    worker._set_gradients(0, [1])
    double = [w.detach().double() for w in (expert.gate_up, expert.down)]
    corrected = expert_gradient(*double, sketch, kappa=3.0, standin=published.dense(), curvature=curvature)
    close(grads(expert), tuple(g / 64 for g in corrected))
    uncorrected = expert_gradient(*double, sketch)
    assert float((grads(expert)[1] - uncorrected[1] / 64).norm()) > 0.01 * float(uncorrected[1].norm() / 64)


def signs_of(pairs: int = 5) -> SignSketch:
    return SignSketch.of(torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH), pairs)


def in_intervals(every: int) -> Manifest:
    return msgspec.structs.replace(manifest_of(), sketch=SketchSpec(kind="signs", gradient_every=every))


@pytest.mark.parametrize("kind", KINDS)
def test_a_composer_shares_out_what_others_summed_and_a_worker_takes_it_at_once(kind: str) -> None:
    every, own_tokens = 4, 40 if kind == "composer" else 0
    owner = owner_of(kind, in_intervals(every))
    experts = owner.experts_of(1)
    sent = [[signs_of() for _ in experts] for _ in range(2)]
    for sender, sketches in zip("ab", sent, strict=True):
        owner.hear(sender, 1, dict(enumerate(sketches)), tokens=120, step=every)
    steps = every if own_tokens else 1
    for step in range(steps + 2):
        own = [[torch.randn_like(weights) for weights in expert.trained] for expert in experts]
        for expert, gradients in zip(experts, own, strict=True):
            for weights, mine in zip(expert.trained, gradients, strict=True):
                weights.grad = mine.clone() if own_tokens else None
        owner._set_gradients(own_tokens, [1])
        for position, expert in enumerate(experts):
            theirs = [sum(both) / steps for both in zip(*(each[position].dense() for each in sent), strict=True)]
            for weights, mine, told in zip(expert.trained, own[position], theirs, strict=True):
                if step < steps:
                    wanted = (own_tokens * mine + told) / (own_tokens + 240 / steps)
                    torch.testing.assert_close(weights.grad, wanted)
                else:
                    assert (weights.grad is None) == (not own_tokens)
                    assert weights.grad is None or torch.equal(weights.grad, mine)
    assert owner.heard_tokens[1, 0] == pytest.approx(240.0)
    assert not any(shares.of_step() for shares in owner.shares.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_out_goes_with_the_slot_and_can_be_refused(kind: str) -> None:
    owner = owner_of(kind, in_intervals(4))
    with pytest.raises(ValueError, match="slot 3"):
        owner.hear("a", 3, {0: signs_of()}, tokens=120, step=4)
    lie = SignSketch(signs_of().bits, torch.full((3 * WIDTH,), 1e14, dtype=torch.bfloat16), 5, HIDDEN)
    with pytest.raises(ValueError, match="a gradient's norm"):
        owner.hear("a", 1, {0: lie}, tokens=120, step=4)
    assert not owner.shares
    assert not owner._sums
    owner.hear("a", 1, {0: signs_of()}, tokens=120, step=4)
    owner.release(1)
    assert not owner.shares
    assert not owner._sums
