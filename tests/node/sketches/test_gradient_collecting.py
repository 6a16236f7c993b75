"""Sums of gradient sketches: over steps, batches and composers, in one interval."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shoal.node.learning.composer import Composer
from shoal.node.model.init import expert_shape
from shoal.node.sketches.gradient_collecting import DrainedGradients, GradientCollector, GradientForm
from tiny import BATCH, CONTEXT, HIDDEN, LAYERS, SLOTS, WIDTH, batches, composer_of, manifest_of
from torch import Tensor

FORM = GradientForm(run_id="tiny-0123456789ab", shape=expert_shape(manifest_of().model), rank=HIDDEN)
LAYER_ORDER = dict.fromkeys(range(SLOTS), tuple(range(LAYERS)))


def collecting(next_batch: Callable[[], Tensor] | None = None) -> tuple[Composer, GradientCollector]:
    """A composer that owns nothing and does not learn, so that all its steps are of the same function."""
    manifest = manifest_of(train={"balance_coef": 0.0, "z_coef": 0.0, "learning_rate": 1e-12, "weight_decay": 0.0})
    composer = composer_of(manifest, owned=(), next_batch=next_batch)
    composer.collector = collector = GradientCollector(FORM)
    return composer, collector


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_two_composers_sums_are_those_of_one_that_has_both_their_batches() -> None:
    mine, theirs = [batches()() for _ in range(3)], [torch.cat([batches()(), batches()()]) for _ in range(2)]
    (one, first), (other, second) = collecting(iter(mine).__next__), collecting(iter(theirs).__next__)
    joint, both = collecting(iter([*mine, *theirs]).__next__)
    for composer, steps in ((one, 3), (other, 2), (joint, 5)):
        for _ in range(steps):
            composer.train_step()
    summands = [collector.take(LAYER_ORDER) for collector in (first, second)]
    for slot, want in both.take(LAYER_ORDER).items():
        assert want.flat.shape == (FORM.numel,)
        assert want.flat.abs().max() > 0
        assert sum(taken[slot].tokens for taken in summands) == want.tokens == 7 * BATCH * CONTEXT
        close(summands[0][slot].flat + summands[1][slot].flat, want.flat)


def test_the_mean_over_tokens_is_the_gradient_of_the_mean_loss() -> None:
    """An owner that holds what the stand-ins stand for has the same gradient, by its own backward pass."""
    batch = batches()()
    composer, collector = collecting(lambda: batch)
    composer.compute()
    slot = 1
    owner = composer_of(composer.manifest, owned=(slot,), next_batch=lambda: batch)
    for expert, standin in zip(owner.experts_of(slot), composer.standins(slot), strict=True):
        with torch.no_grad():
            for weights, copy in zip((expert.gate_up, expert.down), standin.dense(), strict=True):
                weights.copy_(copy)
    owner.compute()
    projections = FORM.projections(0)
    taken = collector.take({slot: (1, 0)})[slot]  # in this order
    for part, layer in zip(taken.flat.view(LAYERS, -1) / taken.tokens, (1, 0), strict=True):
        expert = owner.experts_of(slot)[layer]
        for got, weights in zip(projections.rebuild(part), (expert.gate_up, expert.down), strict=True):
            assert weights.grad is not None
            close(got, weights.grad)  # at full rank nothing is lost


def rows(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(num, HIDDEN), torch.randn(num, HIDDEN), torch.randn(num, WIDTH), torch.randn(num, 2 * WIDTH)


def test_taking_begins_the_next_interval_under_other_projections() -> None:
    collector = GradientCollector(FORM)
    told = rows(5)
    flats = []
    for interval in range(2):
        assert collector.interval == interval
        collector.begin_step(10)
        collector.add(0, 2, *told)
        taken = collector.take({2: (0, 1), 3: (0, 1)})
        assert collector.steps == collector.tokens == 0
        assert not taken[2].flat[FORM.expert_numel :].any()  # nothing came to layer 1
        assert not taken[3].flat.any()
        assert taken[3].tokens == 10  # which were routed elsewhere
        flats.append(taken[2].flat)
    assert not torch.allclose(*flats)
    gradients = [FORM.projections(i).rebuild(flat[: FORM.expert_numel]) for i, flat in enumerate(flats)]
    close(gradients[0][0], gradients[1][0])
    close(gradients[0][1], 10 * told[1].t() @ told[2])
    assert not collector.take(LAYER_ORDER)  # nothing to say


def test_what_is_forgotten_counts_no_more_and_begins_anew() -> None:
    collector = GradientCollector(FORM)
    collector.begin_step(10)
    collector.add(0, 2, *rows(4))
    collector.forget(2)
    collector.begin_step(7)
    later = rows(3)
    collector.add(1, 2, *later)
    reference = GradientCollector(FORM)
    reference.begin_step(7)
    reference.add(1, 2, *later)
    taken, want = collector.take(LAYER_ORDER), reference.take(LAYER_ORDER)
    assert (taken[2].tokens, taken[1].tokens) == (7, 17)
    assert torch.equal(taken[2].flat, want[2].flat)
    collector.begin_step(5)
    collector.begin(40)
    assert (collector.interval, collector.tokens, collector.take(LAYER_ORDER)) == (40, 0, {})


def test_what_another_collector_has_summed_is_as_if_its_rows_had_come_here() -> None:
    here, elsewhere, one = (GradientCollector(FORM, 7) for _ in range(3))
    told, spoilt = rows(5), rows(4)
    spoilt[0][1, 1] = float("nan")
    for collector in (here, one):
        collector.begin_step(10)
        collector.add(0, 2, *told)
        collector.also(6)
    elsewhere.begin_step(6)
    for collector in (elsewhere, one):
        collector.add(0, 2, *spoilt)
        collector.add(1, 3, *told)
    drained = elsewhere.drain()
    here.merge(drained, torch.device("cpu"))
    assert not elsewhere.drain().flats
    mine, theirs = here.take(LAYER_ORDER), one.take(LAYER_ORDER)
    assert mine.keys() == theirs.keys()
    for slot, sums in theirs.items():
        assert mine[slot].tokens == sums.tokens
        close(mine[slot].flat, sums.flat)
    assert here.take_refused() == one.take_refused() == 1
    with pytest.raises(ValueError, match="interval 7"):
        here.merge(drained, torch.device("cpu"))  # which is at 8 by now
    with pytest.raises(ValueError, match="is not a sketch"):
        here.merge(DrainedGradients(8, {(2, 0): (torch.ones(1), 0)}), torch.device("cpu"))  # else added to every number


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_rows_that_cannot_be_summed_are_left_out_and_counted(bad: float) -> None:
    collector = GradientCollector(FORM)
    collector.begin_step(10)
    told = rows(4)
    told[1][2, 3] = bad
    collector.add(0, 0, *told)
    assert collector.take(LAYER_ORDER)[0].flat.isfinite().all()
    assert collector.take_refused() == 1
    assert collector.take_refused() == 0
