"""What a composer collects for owners: within the budget, counted since each slot's last take, bounded in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.kernels.sketch import row_bytes
from shoal.node.model.init import expert_shape
from shoal.node.run.manifest import SketchSpec
from shoal.node.sketches import row_memory
from shoal.node.sketches.sketching import Collected, SketchCollector
from sketches import rows
from tiny import BATCH, CONTEXT, HIDDEN, LAYERS, SLOTS, WIDTH, composer_of, manifest_of
from torch import Tensor

SHAPE = expert_shape(manifest_of().model)
ROW = row_bytes(HIDDEN, "int8")


def collector_of(seed: int = 0, **spec: object) -> SketchCollector:
    return SketchCollector(SketchSpec(**spec), SHAPE, seed=seed)  # type: ignore[arg-type]


def add(collector: SketchCollector, layer: int, slot: int, num: int, tokens: int = 10) -> tuple[Tensor, Tensor]:
    """Rows as the tap brings them: dy of a mean loss. Returns x, and dy of the tokens' own losses."""
    x, dy = rows(num)
    collector.add(layer, slot, x, dy / tokens, torch.empty(num, WIDTH), torch.empty(num, 2 * WIDTH))
    return x, dy


def num_rows(taken: dict[int, Collected]) -> int:
    return sum(layer.num_rows for collected in taken.values() for layer in collected.layers)


def test_rows_are_in_units_of_a_tokens_own_loss_whatever_the_batch() -> None:
    collector = collector_of(codec="float16")
    collector.begin_step(10)
    first = add(collector, 1, 2, 5, tokens=10)
    collector.begin_step(30)
    second = add(collector, 1, 2, 7, tokens=30)
    taken = collector.take({2: 1.0})[2]
    assert (taken.tokens, taken.steps, [layer.num_rows for layer in taken.layers]) == (40, 2, [0, 12])
    x, dy = (torch.cat(pair) for pair in zip(first, second, strict=True))
    torch.testing.assert_close(taken.layers[1].x.dense(), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(taken.layers[1].dy.dense(), dy, rtol=1e-3, atol=1e-3)


def test_tokens_and_steps_count_since_each_slots_last_take() -> None:
    collector = collector_of()
    for step in range(1, 7):
        collector.begin_step(10)
        add(collector, 0, 0, 3)
        if step in (2, 5):
            taken = collector.take({0: 1.0})[0]
            assert (taken.tokens, taken.steps, taken.layers[0].num_rows) == {2: (20, 2, 6), 5: (30, 3, 9)}[step]
    both = collector.take({0: 1.0, 1: 1.0})
    assert (both[0].tokens, both[0].steps) == (10, 1)
    assert (both[1].tokens, both[1].steps, num_rows({1: both[1]})) == (60, 6, 0)
    assert all(layer.effective == 1.0 for layer in both[1].layers)
    assert (collector.take({0: 1.0})[0].tokens, collector.take({})) == (0, {})


def test_what_is_forgotten_counts_for_nothing() -> None:
    """Neither rows nor tokens: an owned slot's composer trains it itself."""
    collector = collector_of()
    collector.begin_step(10)
    add(collector, 0, 0, 3)
    add(collector, 0, 1, 3)
    collector.forget(0)
    collector.begin_step(7)
    add(collector, 1, 0, 2)
    taken = collector.take({0: 1.0, 1: 1.0})
    assert (taken[0].tokens, taken[0].steps, [layer.num_rows for layer in taken[0].layers]) == (7, 1, [0, 2])
    assert (taken[1].tokens, taken[1].layers[0].num_rows) == (17, 3)


counts = st.dictionaries(st.integers(0, SLOTS - 1), st.lists(st.integers(0, 30), min_size=LAYERS, max_size=LAYERS))


@settings(max_examples=60)
@given(counts, st.integers(1, 60 * ROW), st.floats(0.01, 1.0), st.integers(0, 1 << 30))
def test_all_slots_together_keep_to_the_budget(num: dict[int, list[int]], budget: int, rate: float, seed: int) -> None:
    """However many buffers there are, and however few rows are in each."""
    collector = collector_of(seed, budget_bytes=budget)
    collector.begin_step(100)
    for slot, layers in num.items():
        for layer, each in enumerate(layers):
            add(collector, layer, slot, each)
    rates = {slot: rate if slot % 2 else 1.0 for slot in num}
    taken = collector.take(rates)
    total = sum(map(sum, num.values()))
    assert num_rows(taken) * ROW <= max(budget, ROW)
    for slot, layers in num.items():
        got = [layer.num_rows for layer in taken[slot].layers]
        assert all(kept <= -(-each * rates[slot] // 1) for kept, each in zip(got, layers, strict=True))
        for layer, each in zip(taken[slot].layers, layers, strict=True):
            assert layer.pairs == each
            type(layer).from_bytes(layer.to_bytes(), hidden=HIDDEN, max_rows=1000)  # a receiver takes it
    if total * ROW <= budget and all(r == 1.0 for r in rates.values()):
        assert num_rows(taken) == total
    elif num:
        wanted = sum(rates[slot] * sum(layers) for slot, layers in num.items())
        assert num_rows(taken) >= min(max(1, budget // ROW), wanted) - 1
    assert num_rows(collector.take(rates)) == 0


def test_a_slow_owner_gets_its_share_and_leaves_the_budget_to_others() -> None:
    collector = collector_of(budget_bytes=60 * ROW)
    collector.begin_step(100)
    for slot in (0, 1):
        for layer in range(LAYERS):
            add(collector, layer, slot, 50)
    taken = collector.take({0: 1.0, 1: 0.2})
    slow, fast = (num_rows({slot: taken[slot]}) for slot in (1, 0))
    assert fast + slow == 60
    assert slow == pytest.approx(10, abs=1)
    assert all(0 < layer.effective < 1 for layer in taken[1].layers)


def test_where_not_all_experts_can_have_a_row_each_has_its_turn() -> None:
    """A budget of two rows for eight experts. One without says that its tokens are worth nothing here."""
    collector = collector_of(budget_bytes=2 * ROW)
    times = torch.zeros(SLOTS, LAYERS)
    for _ in range(200):
        collector.begin_step(10)
        for slot in range(SLOTS):
            for layer in range(LAYERS):
                add(collector, layer, slot, 3)
        for slot, collected in collector.take(dict.fromkeys(range(SLOTS), 1.0)).items():
            for layer, sketch in enumerate(collected.layers):
                times[slot, layer] += sketch.num_rows
                assert (sketch.num_rows > 0) == (sketch.effective > 0)
    assert int(times.sum()) == 400
    assert bool((times > 20).all())  # 50 each; below 20 once in 10^6


def test_rows_that_cannot_leave_stay_bounded_and_right_on_average() -> None:
    collector = SketchCollector(SketchSpec(), SHAPE, seed=0, max_rows=16)
    for _ in range(40):
        collector.begin_step(10)
        add(collector, 0, 0, 5)
    collector._encode()
    assert len(collector._buffers[0, 0]) == 16
    taken = collector.take({0: 1.0})[0]
    sketch = taken.layers[0]
    assert (taken.tokens, sketch.pairs, sketch.num_rows) == (400, 200, 16)
    assert sketch.weights_N is not None
    assert float(sketch.weights_N.sum()) == pytest.approx(200, rel=0.5)
    assert 0.0 < sketch.effective < 0.5


def test_a_full_buffer_fits_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of rows: one expert's sketch is not cut."""
    limit = 20 * row_bytes(HIDDEN, "float16")
    monkeypatch.setattr(row_memory, "MAX_BYTES", limit)
    collector = collector_of(codec="float16")
    collector.begin_step(10)
    add(collector, 0, 0, 500)
    sketch = collector.take({0: 1.0})[0].layers[0]
    assert sketch.num_rows == 20
    assert sketch.nbytes <= limit + 64


def test_the_same_seed_takes_the_same_rows_and_another_does_not() -> None:
    def bits(seed: int) -> list[bytes]:
        torch.manual_seed(5)
        collector = collector_of(seed, budget_bytes=20 * ROW)
        collector.begin_step(10)
        for layer in range(LAYERS):
            add(collector, layer, 0, 100)
        return [layer.to_bytes() for layer in collector.take({0: 1.0})[0].layers]

    with torch.random.fork_rng():
        assert bits(1) == bits(1)
        assert bits(1) != bits(2)


def test_a_composer_collects_for_slots_of_others_only() -> None:
    manifest = manifest_of()
    composer = composer_of(manifest, owned=(0, 1))
    composer.collector = collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
    for _ in range(3):
        composer.train_step()
    assert {slot for slot, _ in collector._buffers} == {2, 3}
    taken = collector.take({2: 1.0, 3: 1.0})
    assert {(c.tokens, c.steps) for c in taken.values()} == {(3 * BATCH * CONTEXT, 3)}
    pairs = sum(layer.pairs for collected in taken.values() for layer in collected.layers)
    assert 0 < pairs <= 3 * 2 * BATCH * CONTEXT * LAYERS
