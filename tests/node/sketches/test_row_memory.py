"""Rows that nobody takes fill what was planned for, and that is bounded however many experts there are."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from shoal.benchmarks.costs import held_bytes
from shoal.node.model.init import expert_shape
from shoal.node.run.manifest import ExpertShape, Manifest, SketchSpec
from shoal.node.sketches import row_memory
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.row_memory import MAX_ROWS, MAX_TOTAL_BYTES, collected_bytes, rows_held
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector
from sketches import rows
from tiny import LAYERS, SLOTS, WIDTH, manifest_of

LARGE = ExpertShape(num_layers=48, num_experts=128, hidden=2048, width=768, act="silu", std=0.02)


def large(**sketch: Any) -> Manifest:
    """4096 tokens a step, as the sizes of Qwen3-30B-A3B have it."""
    one = manifest_of()
    return msgspec.structs.replace(
        one,
        model=msgspec.structs.replace(one.model, experts=LARGE, config=one.model.config | {"num_experts_per_tok": 8}),
        data=msgspec.structs.replace(one.data, context_length=1024),
        train=msgspec.structs.replace(one.train, batch_size=4),
        sketch=SketchSpec(**sketch),
    )


@pytest.mark.parametrize("codec", ["int8", "int4", "float16"])
def test_rows_that_nobody_takes_fill_what_was_planned(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "MAX_ROWS", 64)
    manifest = msgspec.structs.replace(manifest_of(), sketch=SketchSpec(codec=codec))
    shape = expert_shape(manifest.model)
    collector = SketchCollector(manifest.sketch, shape, seed=0, max_rows=rows_held(manifest))
    collector.begin_step(10)
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            collector.add(layer, slot, *rows(100), torch.empty(100, WIDTH), torch.empty(100, 2 * WIDTH))
    buffers = collector.drain().values()
    held = sum(column.nbytes for buffer in buffers for column in buffer._columns)
    assert 0.9 * held <= collected_bytes(manifest) <= 1.1 * held
    assert len(buffers) == LAYERS * SLOTS


def test_sums_of_gradients_take_what_was_planned() -> None:
    manifest = msgspec.structs.replace(manifest_of(), sketch=SketchSpec(kind="gradient", rank=4))
    collector = GradientCollector(GradientForm(run_id="r", shape=expert_shape(manifest.model), rank=4))
    collector.begin_step(10)
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            collector.add(layer, slot, *rows(10), torch.randn(10, WIDTH), torch.randn(10, 2 * WIDTH))
    held = sum(taken.flat.nbytes for taken in collector.take({slot: range(LAYERS) for slot in range(SLOTS)}).values())
    assert held == collected_bytes(manifest)
    signs = SignCollector(expert_shape(manifest.model), seed=0)
    signs.begin_step(10)
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            signs.add(layer, slot, *rows(10), torch.randn(10, WIDTH), torch.randn(10, 2 * WIDTH))
    held = held_bytes(signs.drain())
    assert held == collected_bytes(msgspec.structs.replace(manifest, sketch=SketchSpec(kind="signs")))
    assert collected_bytes(msgspec.structs.replace(manifest, sketch=SketchSpec(kind="none"))) == 0


def test_thousands_of_large_experts_are_bounded_together_and_a_step_with_owners_loses_nothing() -> None:
    assert rows_held(manifest_of()) == MAX_ROWS
    mean = 4096 * 8 / 128  # rows of an expert and step
    assert rows_held(large()) == pytest.approx(4 * mean, abs=1)
    budget = large(budget_bytes=1 << 26)
    assert 1 < rows_held(budget) < mean
    assert 0.95 * MAX_TOTAL_BYTES < collected_bytes(budget) <= MAX_TOTAL_BYTES


def test_an_expert_holds_no_more_than_a_message_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_memory, "MAX_BYTES", 10)
    assert rows_held(manifest_of()) == 1
