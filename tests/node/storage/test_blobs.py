"""Tensors that a peer sent: whole and finite, or refused, whatever their bytes."""

from __future__ import annotations

import contextlib
import json
import struct

import pytest
import torch
from shoal.node.storage.blobs import from_bytes, to_bytes
from shoal.protocol.errors import Refused


def blob(dtype: str, data: bytes) -> bytes:
    """A safetensors file of one tensor, by hand: torch need not have the dtype."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_tensors_come_back() -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    found = from_bytes(to_bytes(tensors), what="a blob")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "Q7"])
def test_dtypes_that_torch_hardly_knows_are_refused_or_read(dtype: str) -> None:
    """torch has float8 tensors, but cannot say of all whether they are finite."""
    for data in (b"\x00\x38\x40\x30", b"\xff\xff\xff\xff"):
        with contextlib.suppress(Refused):
            assert from_bytes(blob(dtype, data), what="a blob").keys() == {"a"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(Refused, match="NaN or infinity in 'b'"):
        from_bytes(to_bytes({"a": torch.ones(2), "b": torch.tensor([1.0, bad])}), what="a blob")


def test_every_cut_is_refused() -> None:
    whole = to_bytes({"a": torch.randn(4)})
    for length in range(len(whole)):
        with pytest.raises(Refused):
            from_bytes(whole[:length], what="a blob")
