"""Rows as int8 with one scale each: codes = round(x / s), s = max|x| / 127 of the row.

The scale is a bfloat16, rounded up so that no code leaves [-127, 127]: two bytes a row instead of four, and a scale
is applied by one multiplication, so that every machine decodes to the same bits. A row whose scale would be below
`SMALLEST_SCALE` is sent as zeros: products of two scales then stay normal float32 numbers, which a machine that
flushes denormals computes like any other.

Shapes: N rows, D values in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 127
SMALLEST_SCALE = 1e-15
LARGEST_SCALE = 1e15
LARGEST_VALUE = LARGEST_SCALE / 2 * LARGEST_CODE * (1 - 1e-6)  # of a row that can be encoded


@dataclass(frozen=True)
class Int8Rows:
    """codes (N, D) int8 in [-127, 127]; scales (N,) bfloat16, each zero or within the bounds above."""

    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """float32 (N, D), the same bits everywhere."""
        return self.codes.float() * self.scales.float().unsqueeze(1)

    def to_bytes(self) -> bytes:
        """D + 2 bytes a row: all codes, then all scales, little-endian."""
        return tensor_bytes(self.codes) + tensor_bytes(self.scales)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, num_rows: int, row_size: int) -> Int8Rows:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: wrong length, a code of -128, or a scale that is negative, out of bounds or not finite.
        """
        if len(data) != num_rows * (row_size + 2):
            raise ValueError(f"{len(data)} bytes are not {num_rows} int8 rows of {row_size}")
        buffer = bytearray(data)  # torch wants to own writable memory
        if not buffer:
            return cls(torch.empty(num_rows, row_size, dtype=torch.int8), torch.empty(num_rows, dtype=torch.bfloat16))
        values = torch.frombuffer(buffer, dtype=torch.int8)
        codes = values[: num_rows * row_size].view(num_rows, row_size)
        # Copied: scales may start at an odd address.
        scales = values[num_rows * row_size :].clone().view(torch.bfloat16)
        if bool((codes < -LARGEST_CODE).any()):
            raise ValueError("an int8 code is -128")
        usable = (scales == 0) | ((scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE))
        if not bool(usable.all()):
            raise ValueError(f"a row's scale is neither zero nor in [{SMALLEST_SCALE}, {LARGEST_SCALE}]")
        return cls(codes, scales)


def quantise_rows(x_ND: Tensor) -> Int8Rows:
    """Nearest int8 codes of every row; the error is at most half a scale, so at most 0.4% of the row's largest value.

    Raises:
        ValueError: x is not finite, or larger than the largest scale can carry.
    """
    x_ND = x_ND.detach().float()
    if x_ND.numel() == 0:
        return Int8Rows(x_ND.to(torch.int8), x_ND.new_zeros(len(x_ND), dtype=torch.bfloat16))
    largest = x_ND.abs().amax(1)
    if not bool((largest <= LARGEST_VALUE).all()):  # also false for NaN
        raise ValueError("rows to quantise are not finite or too large")
    return quantise_within(x_ND, largest)


def quantise_within(x_ND: Tensor, largest_N: Tensor) -> Int8Rows:
    """The same of float32 rows whose largest absolute values are known, none above `LARGEST_VALUE`. Nothing here waits
    for a GPU."""
    scales = rounded_up(largest_N / LARGEST_CODE)
    scales = scales.masked_fill(scales < 2 * SMALLEST_SCALE, 0)
    divisor = scales.float().masked_fill(scales == 0, torch.inf).unsqueeze(1)
    return Int8Rows((x_ND / divisor).round_().to(torch.int8), scales)


def rounded_up(exact: Tensor) -> Tensor:
    """The least bfloat16 that is not below, of float32 values that are not negative."""
    rounded = exact.to(torch.bfloat16)
    # The next bfloat16 above a positive one is the next integer above its bits.
    return torch.where(rounded.float() < exact, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's memory, row by row, in the machine's (little-endian) order."""
    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
