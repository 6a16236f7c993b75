"""Rank-R factors in int8 that expand to the same bits on every machine.

M ≈ diag(s) (A Bᵀ) diag(t), with A (m, R) and B (n, R) int8, s and t a scale per row and per column.

Why the bits agree. A and B hold integers of at most 127, so every product is an integer of at most 127² and every
partial sum, in whatever order and with or without fused multiply-add, an integer of at most R · 127². Up to R = 1040
that is below 2²⁴: float32 represents all of them exactly, nothing is ever rounded, and so neither the order of
summation nor blocking nor the number of threads can matter. (Half-precision *inputs*, as fast matmul modes use them,
would not either: 127 needs seven bits.) Then each element is multiplied by s, then by t: two operations that IEEE 754
rounds in one way only. A product of float factors has no such guarantee: matmuls reorder sums by shape, threads and
instruction set.

The factors come from a randomised range finder with two power iterations (Halko, Martinsson, Tropp 2011) from a fixed
start, so that the owner's result is a pure function of M; a full SVD costs far more at real widths for a per cent of
error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .codecs import LARGEST_CODE, Int8Rows, quantise_rows

MAX_RANK = (2**24 - 1) // LARGEST_CODE**2  # 1040
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Factors:
    """left: A with s, m rows of R codes. right: B with t, n rows of R codes."""

    left: Int8Rows
    right: Int8Rows

    def expand(self) -> Tensor:
        """float32 (m, n), bit-equal on every machine. Computed on the CPU."""
        product = self.left.codes.float() @ self.right.codes.float().t()
        return product * self.left.scales.float().unsqueeze(1) * self.right.scales.float()

    def to_bytes(self) -> bytes:
        """(m + n) (R + 2) bytes."""
        return self.left.to_bytes() + self.right.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, shape: tuple[int, int], rank: int) -> Factors:
        """Reads factors of a matrix of `shape`.

        Raises:
            ValueError: wrong length, rank out of [1, MAX_RANK], or anything `Int8Rows` refuses.
        """
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank {rank} is not within 1 and {MAX_RANK}")
        rows, columns = shape
        if len(data) != factors_nbytes(shape, rank):
            raise ValueError(f"{len(data)} bytes are not rank-{rank} factors of a {rows} x {columns} matrix")
        cut = rows * (rank + 2)
        return cls(Int8Rows.from_bytes(data[:cut], rows, rank), Int8Rows.from_bytes(data[cut:], columns, rank))


def factors_nbytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes of rank-`rank` factors of a matrix of `shape`."""
    return (shape[0] + shape[1]) * (rank + 2)


def factor(matrix_MN: Tensor, rank: int) -> Factors:
    """Near-best rank-`rank` factors of a matrix, each singular value split evenly between both sides.

    Raises:
        ValueError: rank is not within 1 and min(m, n, MAX_RANK), or the matrix is not finite.
    """
    rows, columns = matrix_MN.shape
    if not 1 <= rank <= min(rows, columns, MAX_RANK):
        raise ValueError(f"rank {rank} is not within 1 and {min(rows, columns, MAX_RANK)}")
    matrix = matrix_MN.detach().cpu().float()
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix to factor is not finite")
    start = torch.Generator().manual_seed(0)
    sample = torch.randn(columns, min(rank + _OVERSAMPLING, rows, columns), generator=start)
    basis = torch.linalg.qr(matrix @ sample).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return Factors(quantise_rows((basis @ u[:, :rank]) * root), quantise_rows(vh[:rank].t() * root))
