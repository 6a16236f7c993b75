"""Sampling rows to a budget: right on average, as noisy as it says, and never more than was asked for.

Statistical tests compare a mean over independent draws with the exact value, in standard errors. A limit of 6 of them
fails by chance about once in 5e8 comparisons where means are normal; with the few hundred draws here and weights that
are bounded, once in 1e6 is a safe statement. Each also shows that it would see a bias.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from shoal.kernels.sampling import inclusion_probabilities, systematic
from shoal.kernels.sketch import RowBuffer, RowSketch
from shoal.kernels.sketch_gradient import expert_gradient
from torch import Tensor

LIMIT = 6.0  # standard errors


def standard_errors(draws_RK: Tensor, want_K: Tensor) -> float:
    """How far the means over R draws are from what they should be, the worst of K."""
    spread = draws_RK.std(0) / math.sqrt(len(draws_RK))
    return float(((draws_RK.mean(0) - want_K).abs() / spread).max())


@pytest.mark.parametrize("_", range(20))
def test_probabilities_sum_to_the_number_and_follow_the_sizes(_: int) -> None:
    sizes = torch.randn(random.randint(2, 200)).exp().pow(random.choice([0.1, 1, 5]))
    num = random.randint(0, len(sizes) - 1)
    p = inclusion_probabilities(sizes, num)
    assert float(p.sum()) == pytest.approx(num)
    assert bool(((p >= 0) & (p <= 1)).all())
    below, capped = p < 1, p == 1
    if num and bool(below.any()):
        ratio = sizes.double()[below] / p[below]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio))  # one threshold for all that are not certain ...
        assert bool((sizes.double()[capped] >= ratio[0] * (1 - 1e-9)).all())  # ... which the certain ones reach


def test_probabilities_at_the_edges() -> None:
    def p(sizes: list[float], num: int) -> list[float]:
        return inclusion_probabilities(torch.tensor(sizes, dtype=torch.float64), num).tolist()

    assert p([], 0) == p([], 3) == []
    assert p([1.0, 2.0], 2) == p([0.0, 1.0], 7) == [1.0, 1.0]
    assert p([3.0, 3.0, 3.0, 3.0], 1) == [0.25] * 4
    assert p([0.0, 0.0], 1) == [0.5, 0.5]
    assert p([0.0, 5.0, 0.0], 2) == [0.5, 1.0, 0.5]
    assert p([1e300, 1e300, 1e-300], 1) == pytest.approx([0.5, 0.5, 0.0])
    assert p([1.0, 1.0, 1e30], 2) == pytest.approx([0.5, 0.5, 1.0])
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="size"):
            p([1.0, wrong], 1)
    with pytest.raises(ValueError, match="cannot take"):
        p([1.0], -1)


@pytest.mark.parametrize("_", range(20))
def test_exactly_that_many_are_taken_and_none_twice(_: int) -> None:
    sizes = torch.randn(random.randint(1, 500)).exp().pow(random.choice([0.0, 1, 8]))
    num = random.randint(0, len(sizes))
    p = inclusion_probabilities(sizes, num)
    index = systematic(p, num)
    assert len(index) == num
    assert bool((index[1:] > index[:-1]).all())
    assert set(torch.nonzero(p == 1)[:, 0].tolist()) <= set(index.tolist())
    if num:
        assert 0 <= int(index[0]) <= int(index[-1]) < len(sizes)


def test_none_is_taken_twice_where_rounding_puts_two_points_into_one_row() -> None:
    p = torch.tensor([0.2, 1.0 + 1e-3, 0.7989, 0.0001])  # as if by very bad rounding
    for _ in range(3000):
        index = systematic(p, 2).tolist()
        assert len(set(index)) == 2
        assert max(index) < 4


def test_rows_are_taken_as_often_as_their_probabilities_say() -> None:
    p = inclusion_probabilities(torch.randn(40).exp(), 9)
    draws = torch.zeros(4000, 40, dtype=torch.float64)
    for draw in draws:
        draw[systematic(p, 9)] = 1
    sure = p == 1
    assert bool((draws[:, sure] == 1).all())
    often = (p > 0.01) & ~sure
    assert standard_errors(draws[:, often], p[often]) < LIMIT
    assert standard_errors(draws[:, often], p[often] * 1.5) > LIMIT


def test_noisy_rows_vary_as_much_as_those_of_the_effective_share() -> None:
    """E||Σ w g||² over independent signs of g, times the effective share, is Σ ||g||²."""
    x, dy = torch.randn(60, 6), torch.randn(60, 1).exp() * torch.randn(60, 6)
    draws, effective = [], set()
    for _ in range(1500):
        sketch = take(x, dy * (torch.randint(2, (60, 1)) * 2 - 1), 12)
        assert sketch.weights_N is not None
        total = torch.einsum("n,nd,ne->de", sketch.weights_N, sketch.x.dense(), sketch.dy.dense())
        draws.append(total.double().square().sum())
        effective.add(round(sketch.effective, 9))
    (share,) = effective  # a property of the probabilities, not of the draw
    exact = (x.double().square().sum(1) * dy.double().square().sum(1)).sum()
    measured = torch.stack(draws)[:, None] * share / exact
    assert standard_errors(measured, torch.ones(1)) < LIMIT
    assert float(measured.mean()) == pytest.approx(1.0, rel=0.2)
    assert 12 / 60 < share < 1  # better than even sampling, which the next test has


def test_even_sampling_of_a_tenth_is_worth_a_tenth() -> None:
    x = torch.nn.functional.normalize(torch.randn(200, 16), dim=1)
    sketch = take(x, x.flip(0), 20)
    assert sketch.effective == pytest.approx(0.1)
    assert sketch.weights_N is not None
    assert torch.allclose(sketch.weights_N, torch.full((20,), 10.0), rtol=1e-4)


def take(x: Tensor, dy: Tensor, num: int | None, *, kept: int = 65536, parts: int = 1) -> RowSketch:
    buffer = RowBuffer(x.shape[1], "float16", max_rows=kept)
    for x_ND, dy_ND in zip(x.chunk(parts), dy.chunk(parts), strict=True):
        buffer.add(x_ND, dy_ND)
    return buffer.take(num)


@pytest.mark.parametrize(
    ("kept", "parts", "repeats"), [(65536, 1, 1500), (25, 6, 700)], ids=["once", "again and again"]
)
def test_a_sampled_gradient_is_right_on_average(kept: int, parts: int, repeats: int) -> None:
    """Also of a buffer that overflowed several times before. Eight random projections of the gradient are compared."""
    hidden, width, num = 8, 5, 10
    gate_up, down = torch.randn(2 * width, hidden), torch.randn(hidden, width)
    x, dy = torch.randn(60, hidden) + 0.5, 0.3 * torch.randn(60, 1).exp() * (torch.randn(60, hidden) + 0.3)
    probes = torch.randn(8, gate_up.numel() + down.numel())

    def probed(sketch: RowSketch) -> Tensor:
        return probes @ torch.cat([part.flatten() for part in expert_gradient(gate_up, down, sketch)])

    whole = probed(take(x, dy, None))
    sketches = [take(x, dy, num, kept=kept, parts=parts) for _ in range(repeats)]
    assert all(sketch.num_rows == num and sketch.pairs == 60 for sketch in sketches)
    assert standard_errors(torch.stack([probed(sketch) for sketch in sketches]), whole) < LIMIT
    # Without the weights the same rows are seen to be wrong.
    plain = [RowSketch(s.x, s.dy, None, s.effective, s.pairs, s.codec) for s in sketches]
    assert standard_errors(torch.stack([6 * probed(sketch) for sketch in plain]), whole) > LIMIT


def test_counts_are_right_on_average_and_rows_without_gradient_are_seen_too() -> None:
    """The correction of a row does not shrink with its dy, so rows with dy = 0 must come, and with the right weight."""
    x, dy = torch.randn(50, 4), torch.randn(50, 4)
    dy[20:] = 0
    counts = []
    for _ in range(2000):
        sketch = take(x, dy, 10, kept=30, parts=5)
        assert sketch.weights_N is not None
        without = sketch.dy.dense().abs().sum(1) == 0
        counts.append(torch.stack((sketch.weights_N.sum(), sketch.weights_N[without].sum())).double())
    assert standard_errors(torch.stack(counts), torch.tensor([50.0, 30.0])) < LIMIT
    assert standard_errors(torch.stack(counts), torch.tensor([40.0, 24.0])) > LIMIT


def test_thinning_as_rows_come_loses_little_against_sampling_at_once() -> None:
    x, dy = torch.randn(400, 8), torch.randn(400, 1).exp() * torch.randn(400, 8)
    at_once = take(x, dy, 20).effective
    thinned = torch.tensor([take(x, dy, 20, kept=40, parts=20).effective for _ in range(40)])
    assert float(thinned.mean()) == pytest.approx(at_once, rel=0.15)


def test_weights_are_bounded_whatever_the_rows_look_like() -> None:
    for _ in range(30):
        x, dy = torch.randn(300, 4), torch.randn(300, 1).mul(random.choice([0, 1, 6])).exp() * torch.randn(300, 4)
        dy[: random.choice([0, 299])] = 0
        sketch = take(x.clamp(-3, 3), dy.clamp(-6e4, 6e4), 10, kept=random.choice([20, 300]), parts=10)
        assert sketch.weights_N is not None
        assert float(sketch.weights_N.min()) >= 1
        assert 0 < sketch.effective <= 1
        RowSketch.from_bytes(sketch.to_bytes(), hidden=4, max_rows=10)  # refuses weights that sum to 64 times the rows
