"""Sign sketches: what they keep of a gradient, how sums of it are rounded, and what is refused."""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from shoal.kernels.sign_sketch import LARGEST_SCALE, SignSketch, SignSum, sign_sketch_nbytes, sign_sum_nbytes
from torch import Tensor


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(random.randrange(1 << 30))


def gradient(hidden: int, width: int) -> tuple[Tensor, Tensor]:
    """Neurons of very different sizes, float64."""
    size = torch.randn(3 * width, 1, dtype=torch.float64).exp()
    rows = size * torch.randn(3 * width, hidden, dtype=torch.float64)
    return rows[: 2 * width], rows[2 * width :].t()


def rows_of(num: int, hidden: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, a and dh, as a backward pass has them."""
    return tuple(torch.randn(num, size) for size in (hidden, hidden, width, 2 * width))  # type: ignore[return-value]


def summed(x: Tensor, dy: Tensor, a: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    return dh.double().t() @ x.double(), dy.double().t() @ a.double()


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (13, 5), (1, 1)])
def test_each_row_becomes_its_signs_times_its_mean_size(hidden: int, width: int) -> None:
    d_gate_up, d_down = gradient(hidden, width)
    got = SignSketch.of(d_gate_up, d_down, 7).dense()
    for rows, near in ((d_gate_up, got[0]), (d_down.t(), got[1].t())):
        wanted = torch.where(rows >= 0, 1.0, -1.0) * rows.abs().mean(1, keepdim=True)
        torch.testing.assert_close(near.double(), wanted, rtol=1 / 256, atol=0.0)
        # Nearest of all multiples, but for the scale's own rounding.
        error = (rows - near).square().sum(1)
        for factor in (0.9, 1.1):
            assert bool((error <= (rows - factor * near).square().sum(1) * (1 + 1e-4)).all())


def test_of_normal_values_it_keeps_two_over_pi_of_the_square() -> None:
    rows = torch.randn(3 * 32, 512)
    d_gate_up, d_down = SignSketch.of(rows[:64], rows[64:].t(), 1).dense()
    got = torch.cat([d_gate_up, d_down.t()])
    kept = 1 - (rows - got).square().sum() / rows.square().sum()
    assert float(kept) == pytest.approx(2 / math.pi, abs=0.02)


def test_what_many_have_in_common_survives_though_each_is_mostly_noise() -> None:
    """Signal at a third of the noise, 64 senders: the mean of signs points where the mean of gradients does."""
    signal, sum_signs, sum_exact = torch.randn(48, 64), torch.zeros(48, 64), torch.zeros(48, 64)
    for _ in range(64):
        noisy = signal / 3 + torch.randn(48, 64)
        d_gate_up, d_down = SignSketch.of(noisy[:32], noisy[32:].t(), 1).dense()
        sum_signs += torch.cat([d_gate_up, d_down.t()])
        sum_exact += noisy
    along = torch.nn.functional.cosine_similarity
    exact, signs = (float(along(total.flatten(), signal.flatten(), dim=0)) for total in (sum_exact, sum_signs))
    assert exact > 0.9
    assert signs > exact - 0.1


@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (13, 5)])
def test_bytes_come_back_to_the_bit(hidden: int, width: int) -> None:
    sketch = SignSketch.of(*gradient(hidden, width), pairs=random.randrange(1, 1 << 40))
    data = sketch.to_bytes()
    assert len(data) == sign_sketch_nbytes(hidden, width)
    again = SignSketch.from_bytes(data, hidden=hidden, width=width)
    assert again.pairs == sketch.pairs == again.num_rows
    assert all(torch.equal(a, b) for a, b in zip(again.dense(), sketch.dense(), strict=True))
    assert again.to_bytes() == data


def test_what_is_no_sketch_is_refused() -> None:
    hidden, width = 13, 5
    good = SignSketch.of(*gradient(hidden, width), pairs=3).to_bytes()
    for size in (0, 3, 15, len(good) - 1):
        with pytest.raises(ValueError, match="are not a sign sketch of an expert"):
            SignSketch.from_bytes(good[:size], hidden=hidden, width=width)
    with pytest.raises(ValueError, match="are not a sign sketch of an expert"):
        SignSketch.from_bytes(good + b"\0", hidden=hidden, width=width)
    for place in range(8):
        with pytest.raises(ValueError, match="known version"):
            SignSketch.from_bytes(good[:place] + b"\x09" + good[place + 1 :], hidden=hidden, width=width)
    for scale in (math.nan, math.inf, -1.0, 4 * LARGEST_SCALE):
        bits = struct.pack("<f", scale)[2:]
        with pytest.raises(ValueError, match="a scale is negative, not finite or absurdly large"):
            SignSketch.from_bytes(good[:-2] + bits, hidden=hidden, width=width)
    with pytest.raises(ValueError, match="of no rows is not zero"):
        SignSketch.from_bytes(good[:8] + bytes(8) + good[16:], hidden=hidden, width=width)


def test_sums_are_those_of_all_rows() -> None:
    hidden, width = 24, 16
    sums, rounding = SignSum(hidden, width), generator()
    exact = [torch.zeros(2 * width, hidden).double(), torch.zeros(hidden, width).double()]
    for _ in range(20):
        rows = rows_of(random.randrange(1, 40), hidden, width)
        sums.add(*rows, rounding)
        exact = [total + new for total, new in zip(exact, summed(*rows), strict=True)]
    for got, wanted in zip((sums._d_gate_up, sums._d_down), exact, strict=True):
        # Twenty roundings of at most 1/128 each way add up as their square root does, mostly.
        assert float((got.double() - wanted).norm() / wanted.norm()) < 20**0.5 / 128
    assert sum(t.nbytes for t in (sums._d_gate_up, sums._d_down)) == sign_sum_nbytes(hidden, width)


def test_what_is_too_small_to_be_added_is_added_on_average() -> None:
    """A thousand times 1/1024 to a 1: to the nearest bfloat16 it would stay 1."""
    sums, rounding = SignSum(1, 512), generator()
    one = torch.ones(1, 1)
    sums.add(one, one, torch.ones(1, 512), torch.ones(1, 1024), rounding)
    for _ in range(1000):
        sums.add(one, one / 1024, torch.ones(1, 512), torch.ones(1, 1024) / 1024, rounding)
    assert float(sums._d_down.float().mean()) == pytest.approx(1 + 1000 / 1024, rel=0.02)
    assert float(sums._d_gate_up.float().mean()) == pytest.approx(1 + 1000 / 1024, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("place", range(4))
def test_rows_that_would_spoil_the_sum_are_left_out(bad: float, place: int) -> None:
    sums, rounding = SignSum(8, 4), generator()
    sums.add(*rows_of(5, 8, 4), rounding)
    before = sums.sketch().to_bytes()
    spoiled = rows_of(3, 8, 4)
    spoiled[place][1, 2] = bad
    sums.add(*spoiled, rounding)
    assert sums.refused == 3
    assert sums.sketch().to_bytes() == before


def test_sums_of_two_add_up_and_no_rows_are_no_gradient() -> None:
    rounding, parts = generator(), [rows_of(9, 16, 8), rows_of(4, 16, 8)]
    one, other = SignSum(16, 8), SignSum(16, 8)
    one.add(*parts[0], rounding)
    other.add(*parts[1], rounding)
    one.merge(other, rounding)
    wanted = [a + b for a, b in zip(summed(*parts[0]), summed(*parts[1]), strict=True)]
    for got, exact in zip((one._d_gate_up, one._d_down), wanted, strict=True):
        assert float((got.double() - exact).norm() / exact.norm()) < 0.02
    assert one.sketch().pairs == 13
    empty = SignSum(16, 8).sketch()
    assert not any(bool(matrix.any()) for matrix in SignSketch.from_bytes(empty.to_bytes(), hidden=16, width=8).dense())
