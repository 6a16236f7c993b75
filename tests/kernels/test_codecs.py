"""Int8 rows: error bounds, exact bytes, refusals."""

from __future__ import annotations

import random

import pytest
import torch
from shoal.kernels.codecs import LARGEST_CODE, Int8Rows, quantise_rows


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_int8_rows_are_within_half_a_scale(scale: float) -> None:
    x = torch.randn(random.randint(1, 50), random.randint(1, 50)) * scale
    x[0] = 0.0
    rows = quantise_rows(x)
    assert bool(((rows.dense() - x).abs() <= 0.5001 * rows.scales.float().unsqueeze(1)).all())
    assert bool((rows.scales.float() * LARGEST_CODE <= 1.01 * x.abs().amax(1)).all())
    again = Int8Rows.from_bytes(rows.to_bytes(), *x.shape)
    assert torch.equal(again.codes, rows.codes)
    assert torch.equal(again.scales, rows.scales)
    assert len(rows.to_bytes()) == x.shape[0] * (x.shape[1] + 2)


def test_int8_golden_bytes() -> None:
    rows = quantise_rows(torch.tensor([[127.0, -64.0], [0.0, 0.0], [-0.5, 0.25]]))
    assert rows.to_bytes() == bytes.fromhex("7fc00000823f") + bytes.fromhex("803f0000823b")


def test_tiny_rows_become_zero_and_huge_ones_are_refused() -> None:
    assert not quantise_rows(torch.full((1, 3), 1e-20)).dense().any()
    for bad in (torch.inf, torch.nan, 1e30):
        with pytest.raises(ValueError, match="finite"):
            quantise_rows(torch.tensor([[1.0, bad]]))
    assert quantise_rows(torch.zeros(0, 4)).dense().shape == (0, 4)
    assert Int8Rows.from_bytes(b"", 0, 4).dense().shape == (0, 4)


def test_bad_int8_rows_are_refused() -> None:
    good = quantise_rows(torch.ones(1, 2))
    with pytest.raises(ValueError, match="-128"):
        Int8Rows.from_bytes(b"\x80\x01" + good.to_bytes()[2:], 1, 2)
    for scale in (torch.nan, torch.inf, -1.0, 1e-30, 1e30):
        data = good.to_bytes()[:2] + Int8Rows(good.codes[:0], torch.tensor([scale], dtype=torch.bfloat16)).to_bytes()
        with pytest.raises(ValueError, match="scale"):
            Int8Rows.from_bytes(data, 1, 2)
    with pytest.raises(ValueError, match="bytes are not"):
        Int8Rows.from_bytes(b"123", 1, 2)
