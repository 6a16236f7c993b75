"""Slots move between owners of experts to the bit, whole or not at all, and leave nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from shoal.node.learning.optimizer import experts_group
from shoal.node.learning.owning import ExpertOwner
from shoal.node.run.manifest import Manifest
from shoal.node.slots.slot_state import SlotTensors
from sketches import KINDS, OTHER, owner_of, rows, sketch_of, state_of, worker_of
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of, train


def stepped(kind: str, manifest: Manifest) -> ExpertOwner:
    """An owner whose experts of slot 1 have trained and published."""
    owner = owner_of(kind, manifest)
    for step in range(3):
        sketches = {position: sketch_of(*rows(12)) for position in range(LAYERS)}
        owner.hear(OTHER, 1, sketches, tokens=32, step=step)
        owner.train_step()
        owner.publish([1])
    return owner


def same(a: SlotTensors, b: SlotTensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("standin", ["lowbit", "narrow", "ternary"])
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_slot_moves_to_the_bit(source: str, target: str, standin: str) -> None:
    """Between composers and workers alike: weights, moments, what was published, and what is made of them next."""
    manifest = manifest_of(standin={"kind": standin})
    first = stepped(source, manifest)
    second = worker_of(manifest, slots=()) if target == "worker" else composer_of(manifest, owned=())
    tensors, published = first.snapshot(1), first.standins(1)
    assert any(name.endswith("exp_avg_sq") for name in tensors)
    second.adopt(1, tensors, published)
    assert same(second.snapshot(1), tensors)
    shapes = {id(t) for expert in second.experts_of(1) for t in (expert.gate_up, expert.down)}
    assert shapes <= {id(t) for t in experts_group(second.optimizer)["params"]}
    second.step = first.step
    sketches = {position: sketch_of(*rows(9)) for position in range(LAYERS)}
    for owner in (first, second):
        owner.hear(OTHER, 1, sketches, tokens=20, step=4)
        owner._set_gradients(0, [1])
        for group in owner.optimizer.param_groups:
            group["lr"] = 1e-2
            for parameter in group["params"]:  # a composer has others
                if id(parameter) not in {id(t) for e in owner.experts_of(1) for t in (e.gate_up, e.down)}:
                    parameter.grad = None
        owner.optimizer.step()
    assert same(first.weights(1), second.weights(1))
    assert not same(first.weights(1), {name: tensors[name] for name in first.weights(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_shares_no_memory_with_the_owner(kind: str) -> None:
    manifest = manifest_of()
    owner = stepped(kind, manifest)
    tensors = owner.snapshot(1)
    kept = {name: value.clone() for name, value in tensors.items()}
    owner.hear(OTHER, 1, {p: sketch_of(*rows(12)) for p in range(LAYERS)}, tokens=32, step=9)
    owner.train_step()
    owner.publish([1])
    assert same(tensors, kept)
    other = worker_of(manifest, slots=())
    other.adopt(1, tensors, [s.to("cpu") for s in owner.standins(1)])
    other.hear(OTHER, 1, {p: sketch_of(*rows(12)) for p in range(LAYERS)}, tokens=32, step=9)
    other.train_step()
    assert same(tensors, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_slot_leaves_nothing_behind(kind: str) -> None:
    owner = stepped(kind, manifest_of())
    owner.publish()
    assert set(owner._fidelity) == {0, 1}
    owner.absorb(1, 0, sketch_of(*rows(5)), 10)
    gone = [t for expert in owner.experts_of(1) for t in (expert.gate_up, expert.down)]
    owner.freeze(1)
    owner.release(1)
    assert owner.owned == {0}
    assert not any(t is p for group in owner.optimizer.param_groups for p in group["params"] for t in gone)
    assert not any(t in owner.optimizer.state for t in gone)
    assert not any(slot == 1 for slot, _ in owner._sums)
    assert 1 not in owner._fidelity
    assert 1 not in owner._frozen
    with pytest.raises(ValueError, match="slot 1"):
        owner.snapshot(1)


DAMAGE: dict[str, Callable[[SlotTensors], object]] = {
    "a weight is missing": lambda t: t.pop("1.down"),
    "a weight is NaN": lambda t: t["0.gate_up"].view(-1)[7].fill_(math.nan),
    "a weight is of another size": lambda t: t.update({"0.down": torch.zeros(HIDDEN, WIDTH + 1)}),
    "a weight is float64": lambda t: t.update({"0.down": t["0.down"].double()}),
    "a moment is missing": lambda t: t.pop("1.down.exp_avg"),
    "a moment is infinite": lambda t: t["1.down.exp_avg"].view(-1)[0].fill_(math.inf),
    "a second moment is negative": lambda t: t["1.gate_up.exp_avg_sq"].view(-1)[0].fill_(-1.0),
    "the publisher's state is missing": lambda t: [t.pop(n) for n in list(t) if n.startswith("1.publisher")],
    "the publisher's state is damaged": lambda t: t.update(
        {n: v[:1] for n, v in t.items() if n.startswith("1.publisher") and v.dim()}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_snapshot_changes_nothing(name: str, kind: str) -> None:
    manifest = manifest_of()
    source = stepped("worker", manifest)
    tensors, published = source.snapshot(1), source.standins(1)
    DAMAGE[name](tensors)
    owner: ExpertOwner = worker_of(manifest, slots=(0,)) if kind == "worker" else composer_of(manifest, owned=(0,))
    before, groups = owner.snapshot(0), [list(map(id, g["params"])) for g in owner.optimizer.param_groups]
    with pytest.raises(ValueError, match=r"."):
        owner.adopt(1, tensors, published)
    assert owner.owned == {0}
    assert same(owner.snapshot(0), before)
    assert groups == [list(map(id, g["params"])) for g in owner.optimizer.param_groups]
    owner.adopt(1, *state_of(manifest))
    if kind == "composer":
        assert math.isfinite(train(owner, 1)[0])  # type: ignore[arg-type]


def test_weights_alone_start_the_optimizer_anew() -> None:
    """As they come out of a wire format."""
    worker = stepped("worker", manifest_of())
    weights, published = worker.weights(1), worker.standins(1)
    other = worker_of(slots=())
    other.adopt(1, weights, published)
    assert same(other.weights(1), weights)
    assert not other.optimizer.state
    with pytest.raises(ValueError, match="slot 1 is owned already"):
        other.adopt(1, weights, published)


def test_a_worker_cannot_make_up_a_slot() -> None:
    worker = worker_of(slots=())
    tensors, published = state_of(worker.manifest)
    with pytest.raises(ValueError, match="cannot seed"):
        worker.adopt(0, None, published)
    with pytest.raises(ValueError, match="runs no stand-ins"):
        worker.adopt(0, tensors, None)
    with pytest.raises(ValueError, match="1 published stand-ins"):
        worker.adopt(0, tensors, published[:1])
    assert not worker.owned
