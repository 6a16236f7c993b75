"""Real processes that each train by themselves and average their weights: what comes out is what the algorithm says."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from comparing import same, same_gradient_sketches, same_rows, same_signs
from shoal.node.island import leader
from shoal.node.island.leader import Island
from shoal.node.island.learners import Learners, shares
from shoal.node.island.merging import trained_of
from shoal.node.learning.composer import Composer
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.run.manifest import Manifest
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector
from torch import Tensor

pytestmark = pytest.mark.timeout(240)

BATCH_TOKENS = tiny.BATCH * tiny.CONTEXT


class Simulated:
    """The same algorithm in this process: composers that each take a block's steps, and their weighted average."""

    def __init__(self, manifest: Manifest, size: int, every: int, text: Callable[[], Tensor], **more: Any) -> None:
        self._every, self._text = every, text
        self._batches: list[list[Tensor]] = [[] for _ in range(size)]
        self.learners = [
            Composer(manifest, next_batch=lambda own=own: own.pop(0), **more) for own in self._batches
        ]  # fmt: skip

    @property
    def first(self) -> Composer:
        return self.learners[0]

    def all(self, change: Callable[[Composer], object]) -> None:
        """What a swarm does to the leader between two blocks, and so to all."""
        for learner in self.learners:
            change(learner)

    def block(self) -> float:
        steps = min(self._every, self.first.train.steps - self.first.step)
        for own in [*self._batches[1:], self._batches[0]]:  # the leader takes its own one by one
            own += [self._text() for _ in range(steps)]
        losses = []
        for learner in self.learners:
            learner.heard_tokens.clear()
            losses += [learner.train_step().loss for _ in range(steps)]
        self._average(steps)
        return sum(losses) / len(losses)

    @torch.no_grad()
    def _average(self, steps: int) -> None:
        counted = shares(self.first, steps * BATCH_TOKENS)
        weights = [trained_of(learner.model, learner.owned) for learner in self.learners]
        for share, *of_learners in zip(counted, *weights, strict=True):
            mean = (share * of_learners[0] + sum(of_learners[1:])) / (share + len(of_learners) - 1)
            for parameter in of_learners:
                parameter.copy_(mean)


def island_of(
    manifest: Manifest, size: int, every: int, text: Callable[[], Tensor], islands: list[Island], **more: Any
) -> Composer:
    composer = Composer(manifest, next_batch=text, **more)
    composer.island = Learners(size, ["cpu"] * size, 1, every=every)
    islands.append(composer.island)
    return composer


def pair(
    size: int, every: int, islands: list[Island], manifest: Manifest | None = None, **more: Any
) -> tuple[Simulated, Composer]:
    seed, manifest = random.randrange(1 << 30), manifest or tiny.manifest_of()
    return (
        Simulated(manifest, size, every, tiny.batches(seed), **more),
        island_of(manifest, size, every, tiny.batches(seed), islands, **more),
    )


def block_alike(simulated: Simulated, island: Composer, steps: int) -> None:
    before = island.step
    loss, report = simulated.block(), island.train_step()
    assert island.island is not None
    assert island.island.together
    assert (report.steps, island.step - before) == (steps, steps)
    assert (report.processes, report.tokens) == (
        len(simulated.learners),
        len(simulated.learners) * steps * BATCH_TOKENS,
    )
    assert report.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_learners_do_what_their_algorithm_says(size: int, islands: list[Island]) -> None:
    simulated, island = pair(size, 3, islands, tiny.manifest_of(train={"steps": 11}), owned={0, 2})
    block_alike(simulated, island, 3)
    same(simulated.first, island)
    # What the network's side does between two blocks.
    assert simulated.first.publish().keys() == island.publish().keys()
    simulated.all(lambda learner: learner.release(2))
    island.release(2)
    standin = island.standins(2)
    simulated.all(lambda learner: learner.set_standins(2, standin))
    for composer in (*simulated.learners, island):
        composer.adopt(1, None)
    block_alike(simulated, island, 3)
    same(simulated.first, island)
    snapshots = [composer.snapshot(1) for composer in (simulated.first, island)]  # with the leader's moments
    simulated.all(lambda learner: (learner.release(1), learner.adopt(1, snapshots[0])))
    island.release(1)
    island.adopt(1, snapshots[1])
    entry = island.begin_round(0)
    assert entry.tokens == size * simulated.first.tokens, "a round counts all of the island's"
    island.abandon_round(0)
    simulated.all(lambda learner: learner.freeze(0))
    island.freeze(0)
    simulated.all(lambda learner: learner._write(learner.fragments[0], simulated.first.common[0]))
    island._write(island.fragments[0], island.common[0])
    block_alike(simulated, island, 3)
    same(simulated.first, island)
    simulated.all(lambda learner: learner.thaw(0))
    island.thaw(0)
    block_alike(simulated, island, 2)  # the run ends
    same(simulated.first, island)
    assert not island.has_work()


def test_what_a_learner_skips_counts_for_no_tokens_and_is_said(islands: list[Island]) -> None:
    every, poison, made = 3, 7, 0
    text = tiny.batches()

    def next_batch() -> Tensor:
        """The member's come first: the second of them is poisoned."""
        nonlocal made
        made += 1
        batch = text()
        batch[batch == poison] = 0
        if made == 2:
            batch[0, 0] = poison
        return batch

    island = island_of(tiny.manifest_of(), 2, every, next_batch, islands, owned={0})
    embedding = next(p for name, p in island.backbone.items() if "embed_tokens" in name)
    with torch.no_grad():
        embedding[poison] = torch.inf
    report = island.train_step()
    assert (report.processes, report.steps, report.skipped) == (2, every, True)
    assert report.tokens == island.tokens == (2 * every - 1) * BATCH_TOKENS
    embedding.data[poison] = 0.0
    assert all(bool(parameter.isfinite().all()) for parameter in island.backbone.values()), "nothing else was spoiled"


def test_learners_of_one_text_are_one_learner(islands: list[Island]) -> None:
    """Averages of equal weights are those weights: to the bit what one process makes of the same batches."""
    seed, manifest, every = random.randrange(1 << 30), tiny.manifest_of(), 3
    text = tiny.batches(seed)
    drawn = [text() for _ in range(2 * every)]
    twice = [batch for start in (0, every) for batch in 2 * drawn[start : start + every]]
    one = Composer(manifest, next_batch=iter(drawn).__next__, owned={0})
    many = island_of(manifest, 2, every, iter(twice).__next__, islands, owned={0})
    for _ in range(2):
        for _ in range(every):
            one.train_step()
        many.train_step()
        assert many.island is not None
        assert many.island.together
    assert tiny.backbone_bits(one) == tiny.backbone_bits(many)
    assert tiny.expert_bits(one, 0) == tiny.expert_bits(many, 0)


def test_what_sketches_teach_the_leader_counts_for_their_tokens(islands: list[Island]) -> None:
    simulated, island = pair(2, 2, islands, owned={0})
    for _ in range(2):
        experts = island.experts_of(0)
        gradient = [0.1 * BATCH_TOKENS * torch.randn(weights.shape) for weights in experts[1].trained]
        for composer in (simulated.first, island):
            composer.absorb_gradient(0, 1, *gradient, tokens=3.0 * BATCH_TOKENS, rows=5)
        block_alike(simulated, island, 2)
    same(simulated.first, island)


def test_the_average_of_plain_gradient_steps_is_the_step_of_all_tokens() -> None:
    """So sketches that only the leader hears weigh in an island as they would in one process with all its batches."""
    seed = random.randrange(1 << 30)
    manifest = tiny.manifest_of(train={"balance_coef": 0.0, "grad_clip": 1e9, "learning_rate": 0.5})
    more: dict[str, Any] = {"owned": {0}}
    simulated = Simulated(manifest, 2, 1, tiny.batches(seed), **more)
    text = tiny.batches(seed)
    joint = Composer(manifest, next_batch=lambda: torch.cat([text(), text()]), **more)
    for composer in (joint, *simulated.learners):
        composer.optimizer = torch.optim.SGD(composer.optimizer.param_groups, lr=1.0)
    gradient = [BATCH_TOKENS * torch.randn(weights.shape) for weights in joint.experts_of(0)[0].trained]
    for composer in (joint, simulated.first):
        composer.absorb_gradient(0, 0, *gradient, tokens=5.0 * BATCH_TOKENS, rows=7)
    before = joint.experts_of(0)[0].gate_up.detach().clone()
    joint.train_step()
    simulated.block()
    assert float((before - joint.experts_of(0)[0].gate_up.detach()).abs().mean()) > 1e-2
    same(joint, simulated.first, 1e-5)


def test_low_rank_experts(islands: list[Island]) -> None:
    manifest = tiny.manifest_of()
    simulated, island = pair(2, 2, islands, manifest, owned=set(), mode=ExpertMode(manifest.train, "lora", rank=2))
    start, seed = island.standins(3), random.randrange(1 << 30)
    for composer in (*simulated.learners, island):
        torch.manual_seed(seed)
        composer.adopt(3, None, start)
    for _ in range(2):
        block_alike(simulated, island, 2)
    same(simulated.first, island)


def test_rows_for_others_come_from_all_learners(islands: list[Island]) -> None:
    manifest = tiny.manifest_of()
    simulated, island = pair(2, 3, islands, manifest, owned={0})
    collector = SketchCollector(manifest.sketch, island.shape, seed=0)
    simulated.all(lambda learner: setattr(learner, "collector", collector))
    island.collector = SketchCollector(manifest.sketch, island.shape, seed=0)
    block_alike(simulated, island, 3)
    same_rows(simulated.first, island)


def test_they_have_come_before_the_last_step_of_a_block_is_taken(islands: list[Island]) -> None:
    """So they leave while the stand-ins that they were made under are still the newest that run here."""
    _, island = pair(2, 3, islands, owned={0})
    collector = island.collector = SketchCollector(tiny.manifest_of().sketch, island.shape, seed=0)
    seen: list[tuple[int, int]] = []

    def between(composer: Composer) -> None:
        taken = collector.take(dict.fromkeys(range(1, composer.num_slots), 1.0))
        seen.append((composer.step, taken[1].tokens))

    island.on_computed = between
    island.train_step()
    assert seen == [(0, BATCH_TOKENS), (1, BATCH_TOKENS), (2, 4 * BATCH_TOKENS)]


def test_sketches_of_gradients_come_from_all_learners(islands: list[Island]) -> None:
    simulated, island = pair(2, 2, islands, owned={0})
    form = GradientForm(run_id="r", shape=island.shape, rank=4)
    collector = GradientCollector(form)
    simulated.all(lambda learner: setattr(learner, "collector", collector))
    island.collector = GradientCollector(form)
    block_alike(simulated, island, 2)
    assert island.collector.steps == 2, "of the swarm's, however many take them"
    same_gradient_sketches(simulated.first, island)


def test_signs_come_from_all_learners(islands: list[Island]) -> None:
    simulated, island = pair(2, 2, islands, owned={0})
    collector = SignCollector(island.shape, seed=1)
    simulated.all(lambda learner: setattr(learner, "collector", collector))
    island.collector = SignCollector(island.shape, seed=2)
    block_alike(simulated, island, 2)
    same_signs(simulated.first, island)


def test_sketches_of_gradients_do_not_grow_with_the_steps_of_a_block(islands: list[Island]) -> None:
    """They exist so that memory does not: members send sums, not rows."""
    sizes = []
    for every in (2, 8):
        _, island = pair(2, every, islands, owned={0})
        form = GradientForm(run_id="r", shape=island.shape, rank=4)
        collector = island.collector = GradientCollector(form)
        collector.begin(3)
        island.train_step()
        assert isinstance(island.island, Learners)
        (answer,) = island.island._answers
        sizes.append(len(pickle.dumps(answer.rows)))
        island.island.close()
    sketches = (tiny.SLOTS - 1) * form.numel * 4
    assert max(sizes) < 1.2 * sketches
    assert max(sizes) - min(sizes) < 0.1 * sketches


def test_an_interval_that_ends_within_a_block_loses_what_members_summed(islands: list[Island]) -> None:
    """Their sums are under its projections, and their tokens would dilute the mean of the next one."""
    simulated, island = pair(2, 3, islands, owned={0})
    form = GradientForm(run_id="r", shape=island.shape, rank=4)
    for composer in (simulated.first, island):
        collector = composer.collector = GradientCollector(form)

        def between(composer: Composer, collector: GradientCollector = collector) -> None:
            if composer.step == 1:
                collector.begin(5)

        composer.on_computed = between
    block_alike(simulated, island, 3)
    assert isinstance(island.collector, GradientCollector)
    assert (island.collector.interval, island.collector.tokens) == (5, BATCH_TOKENS)
    same_gradient_sketches(simulated.first, island)


@pytest.mark.parametrize("at", [None, 0, 1])
def test_a_lost_member_takes_only_its_own_work(
    at: int | None, islands: list[Island], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a block begins, or in one of its steps."""
    monkeypatch.setattr(leader, "FIRST_PAUSE_SECONDS", 0.0)
    seed, every = random.randrange(1 << 30), 2
    island = island_of(tiny.manifest_of(), 2, every, tiny.batches(seed), islands, owned={0})
    assert isinstance(island.island, Learners)
    island.island._pause = 0.0
    assert island.train_step().processes == 2

    def kill() -> None:
        assert island.island is not None
        for member in island.island.members:
            os.kill(member.process.pid, signal.SIGKILL)
            member.process.wait()

    taken: list[Sequence[float]] = []

    def between(composer: Composer) -> None:
        if composer.step == every + (at or 0) and not taken:
            taken.append(())
            kill()

    if at is None:
        kill()
    else:
        island.on_computed = between
    before = island.tokens
    report = island.train_step()
    steps = 1 if at is None else every
    assert (report.processes, report.steps, report.skipped) == (1, steps, False)
    assert island.tokens - before == report.tokens == steps * BATCH_TOKENS
    assert not island.island.together
    report = island.train_step()
    assert (report.processes, report.steps) == (2, every), "it was replaced"
    assert all(bool(parameter.isfinite().all()) for parameter in island.backbone.values())
