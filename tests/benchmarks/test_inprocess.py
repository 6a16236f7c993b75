"""The swarm in one process: it learns, and what must be equal everywhere is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoal.benchmarks.inprocess import InProcessSwarm
from shoal.node.learning.composer import Composer
from shoal.node.learning.data import Batches, load_corpus
from shoal.node.learning.evaluate import HELDOUT_SEED, heldout_loss
from shoal.node.model.presets import preset
from shoal.node.run.manifest import DataSpec, Manifest, OuterSpec, SketchSpec, StandInSpec, TrainSpec
from torch import Tensor

CONTEXT, SLOTS = 64, 16


def tiny(**parts: Any) -> Manifest:
    chosen = preset("tiny")
    fields: dict[str, Any] = {
        "data": DataSpec(context_length=CONTEXT),
        "train": TrainSpec(steps=60, batch_size=4, learning_rate=1e-2, warmup_steps=5),
        "outer": OuterSpec(every_steps=8, fragments=2),
        "standin": StandInSpec(publish_every=4),
    }
    return Manifest(name="tiny", founder="12D3KooWtiny", created_at=0, model=chosen.model, **(fields | parts))


def swarm_of(manifest: Manifest, owned: list[list[int]], *, frozen: bool = False) -> InProcessSwarm:
    corpus = load_corpus("stdlib")
    batches = [
        Batches(corpus.shard(i, len(owned)), manifest.train.batch_size, CONTEXT, seed=i) for i in range(len(owned))
    ]
    return InProcessSwarm(manifest, [b.next for b in batches], owned, frozen=frozen)


def split(composers: int) -> list[list[int]]:
    return [list(range(i, SLOTS, composers)) for i in range(composers)]


def loss_of(composer: Composer) -> float:
    composer.model.set_tap(None)
    return heldout_loss(composer.model, load_corpus("stdlib").heldout(8, CONTEXT, seed=HELDOUT_SEED))


def assert_copies_are_equal(swarm: InProcessSwarm) -> None:
    for owner in swarm.composers:
        for slot in owner.owned:
            published = [standin.digest() for standin in owner.standins(slot)]
            for other in swarm.composers:
                assert [standin.digest() for standin in other.standins(slot)] == published


def test_a_swarm_of_three_learns() -> None:
    manifest = tiny()
    swarm = swarm_of(manifest, split(3))
    untrained = loss_of(swarm.merged())
    for _ in swarm.run(manifest.train.steps):
        pass
    assert loss_of(swarm.merged()) < untrained - 1.5
    assert_copies_are_equal(swarm)
    assert swarm.bytes.deltas > 0
    assert swarm.bytes.outer > 0


def test_frozen_copies_are_taken_from_owners_with_each_merge() -> None:
    manifest = tiny(outer=OuterSpec(every_steps=4, fragments=1, overlap_steps=0), sketch=SketchSpec(kind="none"))
    swarm = swarm_of(manifest, split(2), frozen=True)

    def fresh() -> bool:
        return all(
            torch.equal(expert.gate_up, copy.dense()[0]) and torch.equal(expert.down, copy.dense()[1])
            for owner, other in (swarm.composers, swarm.composers[::-1])
            for slot in owner.owned
            for expert, copy in zip(owner.experts_of(slot), other.standins(slot), strict=True)
        )

    assert [fresh() for _ in swarm.run(9)] == [False, False, False, True, False, False, False, True, False]
    one = sum(2 * (e.gate_up.numel() + e.down.numel()) for e in swarm.composers[0].experts_of(0))
    assert swarm.bytes.deltas == 4 * SLOTS * one, "at the start, twice on the way, and at the end"
    assert swarm.bytes.sketches == 0


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_copies_and_backbones_stay_equal(kind: str) -> None:
    manifest = tiny(standin=StandInSpec(kind=kind, publish_every=2, replay_rows=64, refit_steps=2))
    swarm = swarm_of(manifest, split(2))
    for step, _ in enumerate(swarm.run(8), 1):
        if step % 2 == 0:
            assert_copies_are_equal(swarm)
    first, second = swarm.composers
    for index in range(2):
        assert torch.equal(first.common[index], second.common[index])
        assert torch.equal(first.local_fragment(index), second.local_fragment(index))
        assert torch.equal(first.local_fragment(index), first.common[index])
        assert first.steps_since_commit(index) == 0


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_however_many_steps_all_are_merged(steps: int) -> None:
    swarm = swarm_of(tiny(), split(2))
    assert len(list(swarm.run(steps))) == steps
    assert all(c.steps_since_commit(index) == 0 for c in swarm.composers for index in range(2))


@pytest.mark.parametrize("merge", ["mean", "radial"])
def test_full_replicas_stay_equal_everywhere(merge: Any) -> None:
    manifest = tiny(outer=OuterSpec(every_steps=4, fragments=1, merge=merge))
    swarm = swarm_of(manifest, [list(range(SLOTS))] * 2)
    for _ in swarm.run(4):
        pass
    first, second = swarm.composers
    assert torch.equal(first.local_fragment(0), second.local_fragment(0))
    for slot in range(SLOTS):
        for ours, theirs in zip(first.model.experts_of(slot), second.model.experts_of(slot), strict=True):
            assert torch.equal(ours.gate_up, theirs.gate_up)
            assert torch.equal(ours.down, theirs.down)
    assert swarm.bytes.deltas == 0


def test_experts_of_replicas_are_merged_as_the_backbone_is() -> None:
    """What two learn from the same batches is its own merge, of either kind; from others a radial step is longer."""

    def moved(merge: Any, seeds: tuple[int, int]) -> Tensor:
        manifest = tiny(outer=OuterSpec(every_steps=2, fragments=1, merge=merge, codec="float32"))
        corpus = load_corpus("stdlib")
        batches = [Batches(corpus.shard(seed, 2), 4, CONTEXT, seed=seed).next for seed in seeds]
        swarm = InProcessSwarm(manifest, batches, [list(range(SLOTS))] * 2)
        before = swarm.composers[0].experts_of(0)[0].gate_up.detach().clone()
        assert len(list(swarm.run(2))) == 2
        return swarm.composers[0].experts_of(0)[0].gate_up.detach() - before

    torch.testing.assert_close(moved("radial", (0, 0)), moved("mean", (0, 0)), rtol=1e-4, atol=1e-7)
    assert moved("radial", (0, 1)).norm() > 1.05 * moved("mean", (0, 1)).norm()


def test_the_merged_model_is_backbone_and_owners() -> None:
    swarm = swarm_of(tiny(), split(2))
    for _ in swarm.run(4):
        pass
    whole = swarm.merged()
    assert whole.owned == set(range(SLOTS))
    for composer in swarm.composers:
        for slot in composer.owned:
            for ours, theirs in zip(whole.model.experts_of(slot), composer.model.experts_of(slot), strict=True):
                assert torch.equal(ours.gate_up, theirs.gate_up)
    assert all(map(torch.equal, whole.common, swarm.composers[0].common))
