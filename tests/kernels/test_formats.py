"""Experts on the wire: stated sizes, stated errors, exact ternary forwards, and garbage refused."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.kernels.experts import DenseExpert, run_expert
from shoal.kernels.formats import FORMATS, decode_expert, encode_expert, encoded_nbytes, format_of
from shoal.kernels.interface import LARGEST_WEIGHT
from shoal.kernels.lowbit import LowbitStandIn
from shoal.kernels.ternary import TernaryExpert
from torch import Tensor

formats = pytest.mark.parametrize("fmt", FORMATS)


def weights(hidden: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2 * width, hidden) / hidden**0.5, torch.randn(hidden, width) / width**0.5


@formats
@settings(max_examples=20)
@given(hidden=st.integers(1, 70), width=st.integers(1, 70), key=st.integers(0, 1 << 30))
def test_any_size_goes_round(fmt: str, hidden: int, width: int, key: int) -> None:
    """Shapes and stated size hold, and what was decoded encodes to the same bytes again."""
    torch.manual_seed(key)
    data = encode_expert(*weights(hidden, width), fmt)
    assert len(data) == encoded_nbytes(fmt, hidden, width)
    assert format_of(data) == fmt
    decoded = decode_expert(data, hidden, width, masters=True)
    assert [tuple(w.shape) for w in decoded] == [(2 * width, hidden), (hidden, width)]
    assert all(w.dtype == torch.float32 for w in decoded)
    if fmt != "int8":  # its scale is rounded up, so that a row's largest code may be 126
        assert encode_expert(*decoded, fmt) == data


@pytest.mark.parametrize(
    ("fmt", "error", "bytes_per_weight"),
    [
        ("float32", 0.0, 4.0),
        ("bfloat16", 0.004, 2.0),
        ("int8", 0.012, 1.01),
        ("nf4", 0.12, 0.5625),
        ("ternary", 0.6, 0.21),
    ],
)
def test_error_and_size(fmt: str, error: float, bytes_per_weight: float) -> None:
    original = weights(256, 256)
    data = encode_expert(*original, fmt)
    assert len(data) / (3 * 256 * 256) <= bytes_per_weight + 1e-4
    for mine, theirs in zip(decode_expert(data, 256, 256), original, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) <= error


def test_sizes_at_scale() -> None:
    """Bytes a weight of an expert of a 30B model, as the docstring states them."""
    got = {fmt: encoded_nbytes(fmt, 2048, 768) / (3 * 2048 * 768) for fmt in FORMATS}
    stated = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0015, "nf4": 0.5625, "ternary": 0.2015}
    assert got == pytest.approx(stated, abs=1e-4)


def test_a_newcomer_continues_a_ternary_expert_exactly() -> None:
    hidden, width = random.randint(1, 90), random.randint(1, 90)
    owner = TernaryExpert(*weights(hidden, width))
    data = encode_expert(owner.gate_up, owner.down, "ternary")
    heir = TernaryExpert(*decode_expert(data, hidden, width, masters=True))
    reader = DenseExpert(*decode_expert(data, hidden, width))
    x = torch.randn(5, hidden)
    for other in (heir, reader):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.dense(), owner.dense(), strict=True))
        assert torch.equal(run_expert(x, *other.dense()), run_expert(x, *owner.dense()))
    assert encode_expert(heir.gate_up, heir.down, "ternary") == data


def test_nf4_is_what_lowbit_copies_hold() -> None:
    original = weights(30, 17)
    decoded = decode_expert(encode_expert(*original, "nf4"), 30, 17)
    assert all(map(torch.equal, decoded, LowbitStandIn.of(*original).dense()))


@formats
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, -torch.inf, 2 * LARGEST_WEIGHT])
def test_values_that_are_not_sane_are_not_encoded(fmt: str, spoil: float) -> None:
    for spoilt in (0, 1):
        matrices = weights(5, 4)
        matrices[spoilt][2, 1] = spoil
        with pytest.raises(ValueError, match="finite"):
            encode_expert(*matrices, fmt)


@formats
def test_truncated_extended_and_misplaced_bytes_are_refused(fmt: str) -> None:
    data = encode_expert(*weights(8, 6), fmt)
    for wrong in (b"", data[:1], data[:-1], data + b"\0", data[: random.randrange(len(data))]):
        with pytest.raises(ValueError, match="bytes"):
            decode_expert(wrong, 8, 6)
    for hidden, width in ((90, 6), (8, 60), (0, 6), (8, -1)):
        with pytest.raises(ValueError, match=r"bytes|size"):
            decode_expert(data, hidden, width)


@formats
@settings(max_examples=40)
@given(data=st.data())
def test_garbage_is_refused_or_sane(fmt: str, data: st.DataObject) -> None:
    """Bytes of the right length decode to finite weights of the right shape, or to a ValueError."""
    size = encoded_nbytes(fmt, 6, 4)
    body = data.draw(st.binary(min_size=size - 1, max_size=size - 1))
    if data.draw(st.booleans()):  # near to a good one
        torch.manual_seed(data.draw(st.integers(0, 1 << 30)))
        good = bytearray(encode_expert(*weights(6, 4), fmt))
        good[data.draw(st.integers(1, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
        body = bytes(good[1:])
    for masters in (False, True):
        try:
            decoded = decode_expert(bytes([FORMATS.index(fmt)]) + body, 6, 4, masters=masters)
        except ValueError:
            continue
        assert [tuple(w.shape) for w in decoded] == [(8, 6), (6, 4)]
        assert all(bool((w.abs() <= LARGEST_WEIGHT).all()) for w in decoded)


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8", "nf4", "ternary"])
@pytest.mark.parametrize("value", [b"\xff\xff\xff\xff", b"\x80\x7f\x80\x7f"])
def test_nan_and_infinity_on_the_wire_are_refused(fmt: str, value: bytes) -> None:
    """The last four bytes are a weight, two of them, two scales, or a block's maximum."""
    data = encode_expert(*weights(8, 8), fmt)[:-4] + value
    with pytest.raises(ValueError, match=r"finite|scale|absmax"):
        decode_expert(data, 8, 8)


def test_unknown_formats_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format"):
        encode_expert(*weights(4, 4), "float16")
    with pytest.raises(ValueError, match="unknown format"):
        encoded_nbytes("", 4, 4)
    with pytest.raises(ValueError, match="no format"):
        decode_expert(bytes([len(FORMATS)]) + bytes(100), 4, 4)
    for gate_up, down in ((torch.zeros(8, 4), torch.zeros(4, 3)), (torch.zeros(8), torch.zeros(4, 4))):
        with pytest.raises(ValueError, match="weights of an expert"):
            encode_expert(gate_up, down, "float32")
