"""Rows as sketches carry them, in one of three codecs behind the same few functions.

codec     bytes of a row of D values    error of a value
float16   2 D                           0.05% of it
int8      D + 2                         0.4% of the row's largest (codecs.py)
int4      34 for 64 values              7% of the largest of its 64 (int4.py)

Shapes: N rows, D values in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from . import int4
from .codecs import LARGEST_VALUE, Int8Rows, quantise_within, tensor_bytes
from .int4 import Int4Rows, quantise_rows4

RowCodec = Literal["int8", "float16", "int4"]  # in the order of their numbers on the wire

CODECS: tuple[RowCodec, ...] = get_args(RowCodec)
LARGEST = {"int8": LARGEST_VALUE, "float16": 65504.0, "int4": int4.LARGEST_VALUE}  # that can be encoded


@dataclass(frozen=True)
class Float16Rows:
    """values (N, D) float16, finite."""

    values: Tensor

    def dense(self) -> Tensor:
        """float32 (N, D)."""
        return self.values.float()

    def to_bytes(self) -> bytes:
        """2 D bytes a row, little-endian."""
        return tensor_bytes(self.values)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, num_rows: int, row_size: int) -> Float16Rows:
        """Reads what `to_bytes` wrote. Raises ValueError: wrong length, or a value that is not finite."""
        if len(data) != 2 * num_rows * row_size:
            raise ValueError(f"{len(data)} bytes are not {num_rows} float16 rows of {row_size}")
        if not data:
            return cls(torch.empty(num_rows, row_size, dtype=torch.float16))
        values = torch.frombuffer(bytearray(data), dtype=torch.float16).view(num_rows, row_size)
        if not bool(values.isfinite().all()):
            raise ValueError("a float16 row is not finite")
        return cls(values)


Rows = Int8Rows | Float16Rows | Int4Rows


def encode_rows(x_ND: Tensor, largest_N: Tensor, codec: RowCodec) -> Rows:
    """Of float32 rows whose largest absolute values are known, none above `LARGEST[codec]`, on any device."""
    if codec == "int8":
        return quantise_within(x_ND, largest_N)
    return quantise_rows4(x_ND) if codec == "int4" else Float16Rows(x_ND.to(torch.float16))


def read_rows(data: bytes | memoryview, num_rows: int, row_size: int, codec: RowCodec) -> Rows:
    """What `to_bytes` of rows of that codec wrote. ValueError for anything else."""
    kind: type[Rows] = Int8Rows if codec == "int8" else Int4Rows if codec == "int4" else Float16Rows
    return kind.from_bytes(data, num_rows, row_size)


def parts_of(rows: Rows) -> tuple[Tensor, ...]:
    """The tensors that rows are made of, each with one row of its own for each."""
    if isinstance(rows, Int8Rows):
        return rows.codes, rows.scales
    return (rows.packed, rows.scales) if isinstance(rows, Int4Rows) else (rows.values,)


def rows_of(parts: Sequence[Tensor], codec: RowCodec, row_size: int) -> Rows:
    """The inverse of `parts_of`."""
    if codec == "int8":
        return Int8Rows(*parts)
    if codec == "int4":
        packed, scales = parts
        return Int4Rows(packed, scales, row_size)
    return Float16Rows(*parts)


def codec_of(rows: Rows) -> RowCodec:
    """Which they are in."""
    return "int8" if isinstance(rows, Int8Rows) else "int4" if isinstance(rows, Int4Rows) else "float16"


def row_size_of(rows: Rows) -> int:
    """D."""
    return rows.row_size if isinstance(rows, Int4Rows) else parts_of(rows)[0].shape[1]


def nbytes_of_rows(num_rows: int, row_size: int, codec: RowCodec) -> int:
    """Length of `to_bytes`."""
    if codec == "int4":
        return num_rows * -(-row_size // int4.BLOCK) * int4.BLOCK_BYTES
    return num_rows * (row_size + 2 if codec == "int8" else 2 * row_size)


def joined(several: Sequence[Rows], like: Tensor) -> Tensor:
    """All rows as they are decoded, of the dtype and on the device of `like`. Codes travel to it, not values.

    Args:
        several: of one row size, at least one.
    """
    codecs = {codec_of(rows) for rows in several}
    if len(codecs) > 1:
        return torch.cat([rows.dense() for rows in several]).to(like)
    columns = zip(*(parts_of(rows) for rows in several), strict=True)
    parts = [torch.cat(column).to(like.device) for column in columns]
    return rows_of(parts, codecs.pop(), row_size_of(several[0])).dense().to(like.dtype)
