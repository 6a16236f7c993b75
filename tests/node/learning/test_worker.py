"""The worker's step: when it is due, at which learning rate, and that it is AdamW on the mean of the sketches."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from shoal.kernels.sketch_gradient import expert_gradient
from shoal.kernels.ternary import TernaryExpert, ternarise
from shoal.node.learning.worker import Worker
from shoal.node.run.manifest import Manifest, SketchSpec
from sketches import OTHER, Clock, rows, sketch_of, weights_of, worker_of
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of

FIRST, SECOND, THIRD = "12D3KooWfirst", "12D3KooWsecond", "12D3KooWthird"
PATIENCE = 5.0


def manifest(**train: Any) -> Manifest:
    standin = {"kind": "ternary"} if train.get("expert_weights") == "ternary" else {}
    base = manifest_of(train=train, standin=standin)
    return msgspec.structs.replace(base, sketch=SketchSpec(kappa=0.0, patience_seconds=PATIENCE))


def tell(worker: Worker, sender: str, slot: int = 0, *, step: int = 1, num: int = 6) -> None:
    worker.hear(sender, slot, {p: sketch_of(*rows(num)) for p in range(LAYERS)}, tokens=32, step=step)


# -- when --------------------------------------------------------------------------------------------------------------


def test_a_slot_is_due_once_all_composers_were_heard() -> None:
    worker = worker_of(manifest(), composers={FIRST: 0, SECOND: 0})
    assert not worker.has_work()
    tell(worker, FIRST)
    tell(worker, FIRST, step=2)
    assert worker.ready() == []
    tell(worker, SECOND)
    assert worker.ready() == [0]
    report = worker.train_step()
    assert (report.slots, report.tokens, report.rows, report.skipped) == ((0,), 96, 36, False)
    assert not worker.has_work()


def test_who_stays_away_is_waited_for_so_long_and_no_longer() -> None:
    clock = Clock()
    worker = worker_of(manifest(), composers={FIRST: 0, SECOND: 0}, clock=clock)
    tell(worker, FIRST)
    clock.now += PATIENCE
    tell(worker, FIRST, step=2)  # does not begin the wait anew
    assert not worker.has_work()
    clock.now += 0.001
    assert worker.ready() == [0]
    worker.train_step()
    tell(worker, FIRST, step=3)
    assert not worker.has_work()


def test_nobody_waits_for_who_is_done_or_gone() -> None:
    composers = {FIRST: 0, SECOND: 0}
    worker = worker_of(manifest(steps=100), composers=composers)
    tell(worker, FIRST)
    assert not worker.has_work()
    composers[SECOND] = 100
    assert worker.ready() == [0]
    composers[SECOND] = 0
    assert not worker.has_work()
    del composers[SECOND]
    assert worker.ready() == [0]
    worker.train_step()
    composers[SECOND] = 0
    tell(worker, SECOND, step=100)  # its last
    assert not worker.has_work()
    tell(worker, FIRST, step=2)
    worker.train_step()
    tell(worker, FIRST, step=3)
    assert worker.ready() == [0]


def test_slots_are_due_apart_and_frozen_ones_never() -> None:
    worker = worker_of(manifest(), slots=(0, 1, 2))
    for slot in (0, 2):
        tell(worker, OTHER, slot)
    worker.freeze(0)
    assert worker.ready() == [2]
    frozen, trained, quiet = (weights_of(worker, slot) for slot in (0, 2, 1))
    assert worker.train_step().slots == (2,)
    assert all(map(torch.equal, frozen, weights_of(worker, 0)))
    assert all(map(torch.equal, quiet, weights_of(worker, 1)))
    assert not any(map(torch.equal, trained, weights_of(worker, 2)))
    worker.thaw(0)
    assert worker.train_step().slots == (0,)
    assert not any(map(torch.equal, frozen, weights_of(worker, 0)))


def test_a_released_slot_is_not_due() -> None:
    worker = worker_of(manifest())
    tell(worker, OTHER)
    worker.release(0)
    assert not worker.has_work()
    assert worker.train_step().slots == ()  # it may be let go between the look and the step


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_composers_step() -> None:
    spec = manifest(steps=50, warmup_steps=10, learning_rate=1e-2)
    worker, composer = worker_of(spec, composers={OTHER: 0}), composer_of(spec, owned=())
    for step in (1, 4, 10, 25, 49, 50):
        tell(worker, OTHER, step=step)
        composer.step = step
        worker.train_step()
        assert {group["lr"] for group in worker.optimizer.param_groups} == {composer.learning_rate()}
        assert worker.slot_steps == {0: step}


def test_one_composer_that_lies_about_its_step_moves_nothing() -> None:
    """Neither by sketches nor by its record; a majority moves it."""
    composers = {FIRST: 4, SECOND: 5, THIRD: 99}
    worker = worker_of(manifest(steps=100), composers=composers)
    tell(worker, THIRD, step=99)
    assert worker.step == 5
    composers[THIRD] = 0
    tell(worker, THIRD, step=0)
    assert worker.step == 5
    tell(worker, FIRST, step=7)
    tell(worker, SECOND, step=8)
    assert worker.step == 7
    two = worker_of(manifest(steps=100), composers={FIRST: 3, SECOND: 0})
    tell(two, SECOND, step=99)
    assert two.step == 3


def test_strangers_have_no_say_and_steps_never_fall() -> None:
    composers = {FIRST: 20}
    worker = worker_of(manifest(steps=100), composers=composers)
    tell(worker, OTHER, step=77)
    assert worker.step == 20
    composers[FIRST] = 3
    tell(worker, OTHER, step=78)
    assert worker.step == 20
    assert set(worker._told) <= {FIRST}
    composers.clear()
    tell(worker, FIRST, step=90)
    assert worker.step == 20


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "ternary"])
def test_steps_equal_a_reference_adamw(kind: str) -> None:
    """In float64 but for the clip and the rounding of rows: three steps, two senders, weight decay."""
    spec = manifest(
        learning_rate=1e-2, expert_rate=1.5, warmup_steps=0, grad_clip=0.5, weight_decay=0.3, expert_weights=kind
    )
    worker = worker_of(spec, composers={FIRST: 0, SECOND: 0})
    masters = [w.double().requires_grad_() for w in weights_of(worker, 0)]
    optimizer = torch.optim.AdamW(masters, betas=(spec.train.beta1, spec.train.beta2), weight_decay=0.3)
    for step in range(3):
        told = [[sketch_of(*rows(num)) for _ in range(LAYERS)] for num in (9, 14)]
        for sender, sketches, tokens in zip((FIRST, SECOND), told, (20, 40), strict=True):
            worker.hear(sender, 0, dict(enumerate(sketches)), tokens=tokens, step=step)
        for position in range(LAYERS):
            pair = masters[2 * position : 2 * position + 2]
            used = [ternarise(w.float()).dense().double() if kind == "ternary" else w.detach() for w in pair]
            both = [expert_gradient(used[0], used[1], sketches[position]) for sketches in told]
            for weight, *grads in zip(pair, *both, strict=True):
                weight.grad = sum(grads, torch.zeros(())) / 60
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        optimizer.param_groups[0]["lr"] = 1.5 * worker.learning_rate()
        optimizer.step()
        worker.train_step()
        for got, wanted in zip(weights_of(worker, 0), masters, strict=True):
            off = (got.double() - wanted.detach()).abs()
            assert off.median() < 5e-5
            # Adam shows the rounding of gradients that are almost nothing; a ternary weight may round the other way.
            assert off.max() < 0.03  # two steps
    assert isinstance(worker.experts_of(0)[0], TernaryExpert) == (kind == "ternary")


def test_ternary_experts_publish_what_they_compute() -> None:
    spec = msgspec.structs.replace(
        manifest_of(train={"expert_weights": "ternary", "learning_rate": 0.05}, standin={"kind": "ternary"}),
        sketch=SketchSpec(),
    )
    worker = worker_of(spec, composers={OTHER: 0})
    before = weights_of(worker, 0)
    tell(worker, OTHER)
    worker.train_step()
    worker.publish([0])
    assert not any(map(torch.equal, before, weights_of(worker, 0)))
    weights = worker.weights(0)
    for position, standin in enumerate(worker.standins(0)):
        gate_up, down = standin.dense()
        assert torch.equal(gate_up, weights[f"{position}.gate_up"])
        assert torch.equal(down, weights[f"{position}.down"])
    pairs = zip(worker.publishers[0], worker.experts_of(0), strict=True)
    assert [publisher.fidelity(expert) for publisher, expert in pairs] == [1.0] * LAYERS


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight(value: float) -> None:
    """It cannot come from a peer; nor may a fault here poison what others will run."""
    worker = worker_of(manifest(learning_rate=0.1))
    tell(worker, OTHER)
    worker.train_step()
    before, state = weights_of(worker, 0), worker.snapshot(0)
    tell(worker, OTHER, step=2)
    fault = worker._settle(0, 1)
    assert fault is not None
    assert fault.gradients is not None
    fault.gradients[1][3, 4] = value
    assert worker.train_step().skipped
    assert all(map(torch.equal, before, weights_of(worker, 0)))
    assert all(torch.equal(value, state[name]) for name, value in worker.snapshot(0).items())
    tell(worker, OTHER, step=3)
    assert not worker.train_step().skipped
    assert not any(map(torch.equal, before, weights_of(worker, 0)))


def test_a_slot_of_which_only_rows_without_news_came_stays_as_it_is() -> None:
    worker = worker_of(manifest(learning_rate=0.1, weight_decay=0.5))
    tell(worker, OTHER)
    worker.train_step()
    before = worker.snapshot(0)
    tell(worker, OTHER, step=2, num=0)
    assert worker.ready() == [0]
    assert not worker.train_step().skipped
    assert all(torch.equal(before[name], value) for name, value in worker.snapshot(0).items())


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("standin", ["lowbit", "narrow", "ternary"])
def test_experts_live_on_their_device_and_travel_on_the_cpu(device: str, standin: str) -> None:
    spec = manifest_of(standin={"kind": standin})
    home = worker_of(spec)
    worker = Worker(spec, composers=lambda: {OTHER: 0}, device=device)
    worker.adopt(0, home.snapshot(0), home.standins(0))
    tell(worker, OTHER)
    worker.train_step()
    for expert in worker.experts_of(0):
        for weight, shape in ((expert.gate_up, (2 * WIDTH, HIDDEN)), (expert.down, (HIDDEN, WIDTH))):
            assert (weight.device.type, weight.dtype, tuple(weight.shape)) == (device, torch.float32, shape)
            moments = worker.optimizer.state[weight]
            assert {moments[name].device.type for name in ("exp_avg", "exp_avg_sq")} == {device}
    deltas = worker.publish()
    followed = home.standins(0)
    for follower, delta, ours in zip(followed, deltas[0], worker.standins(0), strict=True):
        follower.apply(delta)
        assert follower.to_bytes() == ours.to_bytes()
    tensors = worker.snapshot(0)
    assert {value.device.type for value in tensors.values()} == {"cpu"}
    again = Worker(spec, composers=dict, device=device)
    again.adopt(0, tensors, worker.standins(0))
    assert all(torch.equal(again.snapshot(0)[name], value) for name, value in tensors.items())
    assert {value.device.type for value in worker.weights(0).values()} == {"cpu"}
