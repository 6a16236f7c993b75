"""Four bits a value: per block of 64 a bfloat16 scale, and codes from -7 to 7, two to a byte. 4.25 bits in all.

    s = max|x| / 7, rounded up to a bfloat16;  code = round(x / s) + 8, of which 0 never occurs

The error of a value is at most half a scale, a fourteenth of the largest in its block; blocks keep one large value from
costing all others of a row their digits. A scale is applied by one multiplication, the same on every machine. Encoding
what was decoded gives the same bytes, as long as blocks are cut alike.

Shapes: M blocks, N rows, D values in a row, which has B blocks; the last one is filled up with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codecs import LARGEST_SCALE, rounded_up, tensor_bytes

BLOCK = 64
BLOCK_BYTES = BLOCK // 2 + 2
LARGEST_CODE = 7
LARGEST_VALUE = LARGEST_SCALE / 2 * LARGEST_CODE * (1 - 1e-6)  # of a row that can be encoded


@dataclass(frozen=True)
class Int4Blocks:
    """packed (M, 32) uint8, the earlier value in the high half; scales (M,) bfloat16."""

    packed: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """float32 (M, 64), the same bits everywhere."""
        codes = torch.stack((self.packed >> 4, self.packed & 0x0F), dim=2).view(-1, BLOCK)
        return (codes.to(torch.int8) - 8).float() * self.scales.float().unsqueeze(1)

    def to_bytes(self) -> bytes:
        """34 bytes a block: all codes, then all scales, little-endian."""
        return tensor_bytes(self.packed) + tensor_bytes(self.scales)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, num_blocks: int) -> Int4Blocks:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: another length, a code that does not occur, or a scale that is negative or not finite.
        """
        if len(data) != num_blocks * BLOCK_BYTES:
            raise ValueError(f"{len(data)} bytes are not {num_blocks} blocks of 4-bit values")
        if not num_blocks:
            return quantise_blocks(torch.empty(0, BLOCK))
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch wants to own writable memory
        cut = num_blocks * BLOCK // 2
        packed, scales = raw[:cut].view(num_blocks, -1), raw[cut:].view(torch.bfloat16)
        if not bool(((packed >= 0x10) & (packed & 0x0F > 0)).all()):
            raise ValueError("a code is 0")
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError("a scale is negative or not finite")
        return cls(packed, scales)


def quantise_blocks(x_MK: Tensor) -> Int4Blocks:
    """Nearest codes of blocks (M, 64) of finite float32 values, on any device. Nothing here waits for a GPU."""
    scales = rounded_up(x_MK.abs().amax(1) / LARGEST_CODE)
    divisor = scales.float().masked_fill(scales == 0, torch.inf).unsqueeze(1)
    codes = (x_MK / divisor).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8).add_(8).view(torch.uint8)
    return Int4Blocks((codes[:, ::2] << 4) | codes[:, 1::2], scales)


@dataclass(frozen=True)
class Int4Rows:
    """packed (N, 32 B) uint8 and scales (N, B) bfloat16, of rows of `row_size` values."""

    packed: Tensor
    scales: Tensor
    row_size: int

    def dense(self) -> Tensor:
        """float32 (N, D), the same bits everywhere."""
        blocks = Int4Blocks(self.packed.reshape(-1, BLOCK // 2), self.scales.reshape(-1))
        return blocks.dense().view(len(self.packed), self.scales.shape[1] * BLOCK)[:, : self.row_size]

    def to_bytes(self) -> bytes:
        """34 B bytes a row: all codes, then all scales, little-endian."""
        return tensor_bytes(self.packed) + tensor_bytes(self.scales)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, num_rows: int, row_size: int) -> Int4Rows:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: as `Int4Blocks.from_bytes`, or a scale is absurdly large.
        """
        in_row = -(-row_size // BLOCK)
        blocks = Int4Blocks.from_bytes(data, num_rows * in_row)
        if bool((blocks.scales > LARGEST_SCALE).any()):
            raise ValueError(f"a scale is above {LARGEST_SCALE}")
        return _in_rows(blocks, num_rows, row_size)


def quantise_rows4(x_ND: Tensor) -> Int4Rows:
    """Nearest codes of float32 rows, finite and none above `LARGEST_VALUE`, on any device."""
    num_rows, row_size = x_ND.shape
    return _in_rows(quantise_blocks(pad(x_ND, (0, -row_size % BLOCK)).view(-1, BLOCK)), num_rows, row_size)


def _in_rows(blocks: Int4Blocks, num_rows: int, row_size: int) -> Int4Rows:
    in_row = -(-row_size // BLOCK)
    packed, scales = blocks.packed.view(num_rows, in_row * BLOCK // 2), blocks.scales.view(num_rows, in_row)
    return Int4Rows(packed, scales, row_size)
