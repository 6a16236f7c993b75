"""A composer whose losses are not finite learns nothing: what the others learn must not shrink for it."""

from __future__ import annotations

import math

import pytest
import torch
from shoal.kernels.sign_sketch import SignSketch
from shoal.node.learning.composer import Composer, Computed
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector
from shoal.protocol.averaging.merging import Facts, shares, weights
from tiny import LAYERS, SLOTS, composer_of, manifest_of, train


def broken() -> Composer:
    """Its own expert gives NaN, as a bit that has flipped may."""
    composer = composer_of(manifest_of(), owned=[0], seed=2)
    with torch.no_grad():
        composer.experts_of(0)[0].gate_up.fill_(float("nan"))
    return composer


def test_it_weighs_nothing_in_a_round() -> None:
    good, bad = composer_of(manifest_of(), seed=1), broken()
    train(good, 8)
    for _ in range(8):
        report = bad.train_step()
        assert report.skipped
        assert report.tokens > 0, "it has read them"
    entries = {"good": good.begin_round(0), "bad": bad.begin_round(0)}
    facts = [Facts(peer, max(1, entry.tokens), entry.steps) for peer, entry in entries.items()]
    share = shares(weights(facts))
    average = sum(entries[peer].vector * share[peer] for peer in entries) / sum(share.values())
    assert float((average - entries["good"].vector).norm()) < 0.01 * float(entries["good"].vector.norm())


@pytest.mark.parametrize("kind", ["rows", "signs"])
def test_its_tokens_count_in_no_sketch(kind: str) -> None:
    composer = broken()
    spec = composer.manifest.sketch
    collector = (
        SketchCollector(spec, composer.shape, seed=1) if kind == "rows" else SignCollector(composer.shape, seed=1)
    )
    composer.collector = collector
    others = dict.fromkeys(range(1, SLOTS), 1.0)
    assert composer.train_step().skipped
    assert {(taken.tokens, taken.steps) for taken in collector.take(others).values()} == {(0, 0)}

    with torch.no_grad():
        composer.experts_of(0)[0].gate_up.normal_(0.0, 0.02)
    report = composer.train_step()
    assert not report.skipped
    taken = collector.take(others)
    assert {(each.tokens, each.steps) for each in taken.values()} == {(report.tokens, 1)}
    sketches = [sketch for each in taken.values() for sketch in each.layers]
    assert any(sketch.num_rows if not isinstance(sketch, SignSketch) else True for sketch in sketches)


def test_of_one_batch_that_several_processes_computed_one_step_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an island's stages do; what several had a batch each of counts as so many."""
    composer = composer_of(manifest_of(), owned=[0])
    collector = composer.collector = SketchCollector(composer.manifest.sketch, composer.shape, seed=1)
    counts = composer.compute_alone().counts
    collector.take(dict.fromkeys(range(1, SLOTS), 1.0))
    for batches in (1, 4):
        computed = Computed(math.nan, 96 * batches, counts, processes=4, batches=batches)
        collector.begin_step(computed.tokens, batches)
        monkeypatch.setattr(composer, "compute_alone", lambda computed=computed: computed)
        composer.compute()
        assert {(each.tokens, each.steps) for each in collector.take({1: 1.0}).values()} == {(0, 0)}


def test_its_tokens_count_in_no_gradient_sketch() -> None:
    composer = broken()
    collector = composer.collector = GradientCollector(GradientForm(run_id="run", shape=composer.shape, rank=2))
    assert composer.train_step().skipped
    assert not collector.take({slot: range(LAYERS) for slot in range(1, SLOTS)})
