"""Ternary weights: W ≈ diag(s) C, C in {-1, 0, 1}, trained straight through, five to a byte on the wire.

Absmean (Ma et al. 2024, BitNet b1.58): s = mean |w| of an output row, rounded to bfloat16, and
C = clip(round(w / s), -1, 1), computed as sign(w) where |w| > s / 2: the same without a division that could round. A
row whose s would be below `SMALLEST_SCALE` is zero. So s is zero exactly where a row's codes all are.

One s per row, not per matrix as in BitNet: 16 bits over a whole row cost little (0.2 + 2 / columns bytes a weight).
Where all rows have one norm it makes no difference; where norms differ, an expert trained with one s per matrix ended
with 3 to 7% more error (row norms spread by a factor of 1.35 around their median) or 18 to 38% (by 2).

Straight through (Bengio et al. 2013): the forward computes with diag(s) C, the gradient goes to the masters w as if it
had computed with them.

The same s everywhere. It is summed in float64, where the order of summation moves it by at most columns · 2⁻⁵³ of
itself, and then rounded to 8 bits: two machines could only differ where the mean lies that near to the middle of two
bfloat16 values. Everything else is elementwise.

Packing: byte = Σᵢ 3ⁱ (cᵢ mod 3), so that zero weights are zero bytes, and a difference of codes modulo 3 packs like
codes. 1.6 bits a weight; the entropy of absmean codes of normal weights is 1.56. Rejected: four to a byte, 2 bits.

Shapes: N rows of inputs, D columns of a matrix, M rows of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .codecs import LARGEST_SCALE, SMALLEST_SCALE, tensor_bytes
from .experts import DenseExpert

TRITS_PER_BYTE = 5
_BYTES = 3**TRITS_PER_BYTE  # 243: larger bytes mean nothing


@dataclass(frozen=True)
class Ternary:
    """codes (M, D) int8 in {-1, 0, 1}; scales (M,) bfloat16, zero exactly for rows of zeros."""

    codes: Tensor
    scales: Tensor

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """diag(s) C, the same bits everywhere: nothing but a sign is applied to a scale."""
        return self.codes.to(dtype) * self.scales.to(dtype).unsqueeze(1)

    def to_bytes(self) -> bytes:
        """All codes, five to a byte, then all scales, little-endian: `ternary_nbytes` bytes."""
        return tensor_bytes(pack_trits(self.codes)) + tensor_bytes(self.scales)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, rows: int, columns: int) -> Ternary:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: wrong length, a byte that is not five trits, or scales that `check_scales` refuses.
        """
        if len(data) != ternary_nbytes(rows, columns):
            raise ValueError(f"{len(data)} bytes are not a ternary matrix of {rows} x {columns}")
        if not data:
            return cls(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, dtype=torch.bfloat16))
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # torch wants to own writable memory
        cut = packed_nbytes(rows * columns)
        codes = unpack_trits(raw[:cut], rows * columns).view(rows, columns)
        scales = raw[cut:].clone().view(torch.bfloat16)  # copied: it may start at an odd address
        check_scales(codes, scales)
        return cls(codes, scales)


class TernaryExpert(DenseExpert):
    """An expert that computes with the ternary form of its masters, and trains the masters."""

    def effective(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return straight_through(gate_up), straight_through(down)


def straight_through(w_MD: Tensor) -> Tensor:
    """The ternary form of w in its dtype, whose gradient is that of w. Weights that are not finite give NaN."""
    w: Tensor = _StraightThrough.apply(w_MD)  # type: ignore[no-untyped-call]
    return w


class _StraightThrough(torch.autograd.Function):
    """Not w + (q - w).detach(), which is q only up to rounding: copies of an expert compute with q itself."""

    @staticmethod
    def forward(ctx: Any, w_MD: Tensor) -> Tensor:
        return ternarise(w_MD).dense(w_MD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> Tensor:
        return grad_MD


def ternarise(w_MD: Tensor) -> Ternary:
    """Absmean codes and scales of every row.

    It waits for no GPU and so checks nothing: a row with NaN or infinity gets such a scale, and is NaN when dense.
    """
    w_MD = w_MD.detach()
    magnitude = w_MD.abs()
    # By float32 on purpose: the way from float64 straight to bfloat16 may differ between devices.
    scales = magnitude.mean(1, dtype=torch.float64).float().to(torch.bfloat16)
    scales = scales.masked_fill(scales.float() < SMALLEST_SCALE, 0)
    half = scales.to(w_MD.dtype).unsqueeze(1) / 2
    # A zero scale must beat weights that are small, but not zero.
    large = (magnitude > half) & (half > 0)
    return Ternary(w_MD.sign().to(torch.int8) * large, scales)


def masters_from(ternary: Ternary) -> Tensor:
    """float32 masters with exactly this ternary form: ±s / p where codes are not zero, p being their share of the row.

    The mean of a row's magnitudes is then s but for the rounding of float32, which the rounding to bfloat16 undoes;
    and s / p is at least s, so every code stays.

    Raises:
        ValueError: codes or scales are none that `ternarise` makes.
    """
    check_scales(ternary.codes, ternary.scales)
    share = (ternary.codes != 0).double().mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    magnitude = (ternary.scales.double() / share).float()
    return ternary.codes.float() * magnitude.unsqueeze(1)


def check_scales(codes: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless every scale is finite, not tiny, and zero exactly where a row's codes all are."""
    values = scales.float()
    usable = (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)
    if not bool((usable | (scales.view(torch.int16) == 0)).all()):
        raise ValueError(f"a row's scale is neither zero nor in [{SMALLEST_SCALE}, {LARGEST_SCALE}]")
    if not torch.equal(usable, (codes != 0).any(1)):
        raise ValueError("a row's scale is zero but its codes are not, or the other way round")


def packed_nbytes(size: int) -> int:
    """Bytes of `size` packed trits."""
    return -(-size // TRITS_PER_BYTE)


def ternary_nbytes(rows: int, columns: int) -> int:
    """Bytes of a ternary matrix on the wire."""
    return packed_nbytes(rows * columns) + 2 * rows


def pack_trits(codes: Tensor) -> Tensor:
    """Any tensor of codes in {-1, 0, 1} as uint8 bytes of five, row by row, the last padded with zeros.

    Raises:
        ValueError: codes are not int8, or not in {-1, 0, 1}.
    """
    if codes.dtype != torch.int8 or not bool(((codes >= -1) & (codes <= 1)).all()):
        raise ValueError("only int8 codes of -1, 0 and 1 can be packed")
    flat = codes.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % TRITS_PER_BYTE)]).view(-1, TRITS_PER_BYTE)
    digits = padded.add(padded < 0, alpha=3).view(torch.uint8)  # modulo 3
    packed = digits[:, -1]
    for place in range(TRITS_PER_BYTE - 2, -1, -1):
        packed = packed * 3 + digits[:, place]
    return packed


def unpack_trits(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_trits`: int8 (size,).

    Raises:
        ValueError: not uint8, wrong length, a byte above 242, or padding that is not zero.
    """
    check_packed(packed, size)
    return lookup_trits(packed, size, torch.int8)


def check_packed(packed: Tensor, size: int) -> None:
    """Raises ValueError unless `pack_trits` could have made these bytes out of `size` codes."""
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_nbytes(size),):
        raise ValueError(f"packed trits are {tuple(packed.shape)} {packed.dtype}, not {(packed_nbytes(size),)} uint8")
    used = size % TRITS_PER_BYTE
    if bool((packed >= _BYTES).any()):
        raise ValueError(f"a byte of packed trits is above {_BYTES - 1}")
    if used and int(packed[-1]) >= 3**used:
        raise ValueError("the padding of packed trits is not zero")


def lookup_trits(packed: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Codes of bytes that are known to be good, in any dtype, without waiting for a GPU."""
    return _table(packed.device, dtype).index_select(0, packed.int()).view(-1)[:size]


@cache
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(243, 5): the codes in every byte."""
    places = 3 ** torch.arange(TRITS_PER_BYTE)
    digits = torch.arange(_BYTES).unsqueeze(1).div(places, rounding_mode="floor").remainder(3)
    return torch.where(digits == 2, -1, digits).to(device, dtype)
