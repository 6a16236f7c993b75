"""Sign sketches: one bit for each weight of an expert, of a gradient summed over many rows.

An expert's gradient as one matrix of 3F rows of D, one for each row of `gate` and `up` and each column of `down`: three
to a neuron. Of a row g it keeps its signs and a = mean |g|:

    g ≈ a · sign(g)

which of all multiples of the signs is nearest to g. (One bit with a scale: Seide et al. 2014; as a compressor of
gradients: Bernstein et al. 2018.) Of normal values it keeps 2/π of the square. What several composers say adds up
better than that: where the noise of a sum is larger than what all sums have in common, the mean of signs is in
proportion to it.

The sum is kept in bfloat16, two bytes a weight, rounded up or down by chance: to the nearest, what is below 1/512 of
the sum would never be added. A low-rank sketch of the same gradient (`gradient_sketch.py`) takes fewer bytes where
experts are large, and says far less for each: gradients of experts are of full rank.

Bytes: scales are bfloat16, rows of bits are padded to whole bytes. Shapes: N rows, D hidden, F width, H = 2F.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .codecs import tensor_bytes

LARGEST_SCALE = 1e15  # of a sum; with more, products in an optimizer would leave float32
_HEADER = struct.Struct("<B7xQ")  # version, pairs
_VERSION = 1
# By byte, its eight signs: set is plus. The first is the highest bit, as numpy packs them.
_SIGNS: Tensor = 2.0 * torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)).float() - 1.0


@dataclass(frozen=True)
class SignSketch:
    """What some rows teach one expert, in a bit a weight.

    Attributes:
        bits: (3F, ceil(D / 8)) uint8.
        scales: (3F,) bfloat16, not negative.
        pairs: how many routed rows it stands for.
        hidden: D.
    """

    bits: Tensor
    scales: Tensor
    pairs: int
    hidden: int

    @classmethod
    def of(cls, d_gate_up: Tensor, d_down: Tensor, pairs: int) -> SignSketch:
        """Of a summed gradient: (2F, D) and (D, F), any dtype and device, finite."""
        rows = torch.cat([d_gate_up, d_down.t()]).float()
        scales = rows.abs().mean(1).to(torch.bfloat16).cpu()
        bits = np.packbits((rows >= 0).cpu().numpy(), axis=1)
        return cls(torch.from_numpy(bits), scales, pairs, rows.shape[1])

    @property
    def num_rows(self) -> int:
        """Routed rows that it stands for, as `RowSketch` has them."""
        return self.pairs

    def small(self) -> SignSketch:
        """Itself."""
        return self

    def dense(self) -> tuple[Tensor, Tensor]:
        """float32 d gate_up (2F, D) and d down (D, F), on the CPU; the same bits everywhere."""
        signs = _SIGNS.index_select(0, self.bits.view(-1).int()).view(len(self.bits), -1)[:, : self.hidden]
        rows = signs * self.scales.float().unsqueeze(1)
        width = len(rows) // 3
        return rows[: 2 * width], rows[2 * width :].t()

    def to_bytes(self) -> bytes:
        """A header of 16 bytes, then bits and scales."""
        return _HEADER.pack(_VERSION, self.pairs) + tensor_bytes(self.bits) + tensor_bytes(self.scales)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, hidden: int, width: int) -> SignSketch:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: not a sketch of an expert of these sizes; a scale that is negative, not finite or absurdly
                large; or one that is not zero where no row came.
        """
        if len(data) != sign_sketch_nbytes(hidden, width):
            raise ValueError(f"{len(data)} bytes are not a sign sketch of an expert of {hidden} x {width}")
        version, pairs = _HEADER.unpack_from(data)
        if version != _VERSION or any(data[1 : _HEADER.size - 8]):
            raise ValueError("not a sign sketch of a known version")
        body = torch.frombuffer(bytearray(data[_HEADER.size :]), dtype=torch.uint8)
        size = 3 * width * -(-hidden // 8)
        scales = body[size:].clone().view(torch.bfloat16)  # copied: they may start at an odd address
        if not bool(((scales >= 0) & (scales <= LARGEST_SCALE)).all()):  # also true for NaN
            raise ValueError("a scale is negative, not finite or absurdly large")
        if not pairs and bool(scales.any()):
            raise ValueError("a gradient of no rows is not zero")
        return cls(body[:size].view(3 * width, -1), scales, pairs, hidden)


class SignSum:
    """The gradient of one expert, summed over rows until it is taken.

    Args:
        hidden, width: D and F.
        device: of the rows.
    """

    def __init__(self, hidden: int, width: int, device: torch.device | str = "cpu") -> None:
        self.refused = 0  # rows left out: not finite, or too large
        self._pairs = 0
        self._d_gate_up = torch.zeros(2 * width, hidden, dtype=torch.bfloat16, device=device)
        self._d_down = torch.zeros(hidden, width, dtype=torch.bfloat16, device=device)

    def add(self, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor, generator: torch.Generator) -> None:
        """Rows as `RowTap.backward_rows` has them. All are left out if what they come to is not finite, or too large.

        Args:
            generator: of rounding, on the device of the rows.
        """
        d_gate_up, d_down = dh_NH.float().t() @ x_ND.float(), dy_ND.float().t() @ a_NF.float()
        d_gate_up, d_down = _added(self._d_gate_up, d_gate_up, generator), _added(self._d_down, d_down, generator)
        largest = torch.maximum(d_gate_up.abs().amax(), d_down.abs().amax())
        if not bool(largest <= LARGEST_SCALE):  # also true for NaN
            self.refused += len(x_ND)
            return
        self._d_gate_up, self._d_down = d_gate_up, d_down
        self._pairs += len(x_ND)

    def merge(self, other: SignSum, generator: torch.Generator) -> None:
        """Take in what another one of the same expert has summed."""
        device = self._d_gate_up.device
        self._d_gate_up = _added(self._d_gate_up, other._d_gate_up.to(device), generator)
        self._d_down = _added(self._d_down, other._d_down.to(device), generator)
        self._pairs += other._pairs
        self.refused += other.refused

    def sketch(self) -> SignSketch:
        """Of all that was added."""
        return SignSketch.of(self._d_gate_up, self._d_down, self._pairs)


def sign_sketch_nbytes(hidden: int, width: int) -> int:
    """Of one expert's sketch, whatever the rows."""
    return _HEADER.size + 3 * width * (-(-hidden // 8) + 2)


def sign_sum_nbytes(hidden: int, width: int) -> int:
    """Memory of one expert's sum."""
    return 6 * hidden * width


def _added(sum_: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 `sum_` + `new`, rounded up or down by chance, so that it is right on average."""
    exact = (sum_.float() + new).view(torch.int32)
    noise = torch.randint(1 << 16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32)
    return exact.add_(noise).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)
