"""Rows or gradients, by the bytes that a composer may send."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from shoal.kernels.gradient_sketch import Projections, sketch_numel
from shoal.kernels.sign_sketch import sign_sketch_nbytes
from shoal.kernels.sketch import row_bytes
from shoal.node.run.manifest import SketchSpec
from shoal.node.sketches.sketch_choice import (
    LEAST_ROWS,
    LONGEST_INTERVAL,
    Traffic,
    choose_sketches,
    traffic_of,
    within_budget,
)
from tiny import BATCH, CONTEXT, HIDDEN, LAYERS, SLOTS, WIDTH, manifest_of

# The large model of the design; the composer owns an eighth of the slots, and takes 4096 tokens in a step of 10 s.
LARGE = Traffic(hidden=2048, width=768, num_layers=48, num_slots=128, top_k=8, tokens=4096, owned_share=1 / 8)
MBIT_PER_STEP = 10 * 1e6 / 8


def chosen(budget: float, traffic: Traffic = LARGE, *, gradients: bool = True, **spec: int) -> SketchSpec:
    return choose_sketches(SketchSpec(**spec), traffic, budget_bytes=int(budget), gradients=gradients)


def test_the_large_model_costs_what_the_design_says() -> None:
    assert LARGE.row_bytes(SketchSpec()) / LARGE.tokens == pytest.approx(1.4e6, rel=0.02)
    assert sketch_numel(2048, 768, 16) == pytest.approx(150e3, rel=0.1)
    assert sketch_numel(2048, 768, 16) == pytest.approx(3 * 16 * (2048 + 768), rel=0.05)
    assert sign_sketch_nbytes(2048, 768) == pytest.approx(594e3, rel=0.001)
    assert sign_sketch_nbytes(2048, 768) == pytest.approx(273 * row_bytes(2048, "int4", weighted=False), rel=0.01)


def test_the_large_model_takes_rows_on_a_local_network_and_gradients_on_an_uplink() -> None:
    local = chosen(10_000 * MBIT_PER_STEP)
    assert (local.kind, local.codec, local.budget_bytes) == ("rows", "int8", 10_000 * MBIT_PER_STEP)
    assert chosen(3_000 * MBIT_PER_STEP).codec == "int4"
    assert chosen(100 * MBIT_PER_STEP).kind == "rows"  # 4.1% of them
    uplink = chosen(20 * MBIT_PER_STEP)
    assert (uplink.kind, uplink.gradient_every) == ("gradient", 24)
    assert uplink.rank == 5  # 600 MB in the 240 s of an interval
    slow = chosen(10 * MBIT_PER_STEP)
    assert (slow.kind, slow.rank, slow.gradient_every) == ("gradient", 4, 33)
    with pytest.raises(ValueError, match=r"rank 4 need \d+ bytes a step"):
        chosen(MBIT_PER_STEP)


def test_rows_are_chosen_down_to_the_stated_share() -> None:
    least = LEAST_ROWS * LARGE.row_bytes(SketchSpec(codec="int4"))
    assert chosen(least + 1).kind == "rows"
    assert chosen(least - 1).kind == "gradient"
    assert chosen(least - 1, gradients=False).kind == "rows"
    assert chosen(least + 1, every=4).budget_bytes == 4 * int(least + 1)  # the manifest's is of an interval


@pytest.mark.parametrize("_", range(50))
def test_what_is_chosen_fits_and_no_more_would(_: int) -> None:
    traffic = replace(
        LARGE,
        hidden=random.randint(8, 4096),
        width=random.randint(8, 2048),
        tokens=random.randint(1, 1 << 16),
        owned_share=random.choice((0.0, 0.1, 0.5)),
    )
    budget = random.randint(1, int(traffic.row_bytes(SketchSpec())))
    every = random.randint(1, 200)
    try:
        spec = chosen(budget, traffic, gradient_every=every)
    except ValueError:
        assert traffic.gradient_bytes(4) > max(every, LONGEST_INTERVAL) * budget
        return
    if spec.kind == "rows":
        assert spec.budget_bytes == budget >= LEAST_ROWS * traffic.row_bytes(spec)
        coarser = traffic.row_bytes(SketchSpec(codec="int4")) < traffic.row_bytes(SketchSpec())
        assert spec.codec == ("int4" if coarser else "int8")  # rows of few values are smaller in int8
        return
    assert traffic.gradient_bytes(spec.rank) <= spec.gradient_every * budget
    assert spec.gradient_every >= every
    if spec.gradient_every > every:
        assert traffic.gradient_bytes(4) > (spec.gradient_every - 1) * budget
    elif spec.rank < min(traffic.hidden, 2 * traffic.width):
        assert traffic.gradient_bytes(spec.rank + 1) > spec.gradient_every * budget
    Projections(traffic.hidden, traffic.width, spec.rank, seed=0)


def test_a_run_is_kept_within_its_budget_whoever_owns_the_experts() -> None:
    manifest = manifest_of()
    traffic = traffic_of(manifest)
    assert (traffic.hidden, traffic.width, traffic.num_layers, traffic.num_slots) == (HIDDEN, WIDTH, LAYERS, SLOTS)
    assert (traffic.top_k, traffic.tokens, traffic.owned_share) == (2, BATCH * CONTEXT, 0.0)
    rows = BATCH * CONTEXT * 2 * LAYERS * row_bytes(HIDDEN, "int8")
    assert traffic.row_bytes(manifest.sketch) == rows
    assert within_budget(manifest, rows // 2).sketch.budget_bytes == rows // 2
    many, few = {"batch_size": 64 * BATCH}, 64 * rows // 201
    assert within_budget(manifest_of(train=many), few).sketch.kind == "gradient"
    assert within_budget(manifest_of(train=many, standin={"kind": "narrow"}), few).sketch.kind == "rows"
