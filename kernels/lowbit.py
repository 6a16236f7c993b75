"""`lowbit` stand-ins: the whole expert in NF4, 4.5 bits a weight, refreshed by lossless deltas of its codes.

Layout: gate_up and down flattened one after the other, padded with zeros to whole blocks of 64 weights; per block one
float32 absmax, per weight the index of the nearest of 16 normal-float levels times it (Dettmers et al. 2023, QLoRA),
two to a byte, high half first, as bitsandbytes packs them. One flat array means one dequantisation per `dense()`; and
bitsandbytes never sees an odd row length, for which its CPU path tries to compile a kernel.

Delta: (new code - old code) mod 16 of every weight, then the bits of every absmax XOR the old ones with bytes of
equal significance together, deflated by runs. Integers only, so it is exact by construction. A difference deflates
better than XOR of the codes, because steps of one level share a symbol wherever they happen.

Sticky absmax: a block whose absmax moved by at most `STICKY` keeps the old one, so that its codes move only where
weights did; the few weights above it are clipped. Under AdamW that saves from a tenth of the bytes (fast learning) to
four fifths (slow), and costs up to 2% of the copy's error: test_lowbit.py holds it to that. Rejected: codes that stay
until a weight is a tenth of a cell beyond its border. They save a fifth more, but the error then grows by 3 to 4% and
is no longer the nearest level's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from .bnb import functional as bnb
from .codecs import tensor_bytes
from .copies import CopyStandIn, deflated, inflated
from .interface import check_tensor

BLOCK = 64
STICKY = 0.05

_LEVELS: Tensor = bnb.get_4bit_type("nf4", device="cpu", blocksize=BLOCK)
_BOUNDS: Tensor = (_LEVELS[1:] + _LEVELS[:-1]) / 2
# [-1, 1] in cells so small that each has one bound in it at most, and none near its ends: a value's cell then tells its
# level but for one comparison, eight times as fast as a search among bounds.
_CELLS = 64
_LOW: Tensor = torch.bucketize(torch.arange(_CELLS) * (2 / _CELLS) - 1, _BOUNDS)  # level at each cell's lower end
_NEXT: Tensor = torch.cat([_BOUNDS, torch.tensor([torch.inf])])[_LOW]  # the bound after it
_LOW_CODES: Tensor = _LOW.to(torch.uint8)


def nf4_blocks(hidden: int, width: int) -> int:
    """Blocks that an expert's weights take in one flat array; the last is filled up with zeros."""
    return -(-3 * hidden * width // BLOCK)


class LowbitStandIn(CopyStandIn):
    """NF4 copy. State: codes uint8 (blocks * 32), absmax float32 (blocks), size int64 [D, F]."""

    kind: ClassVar[str] = "lowbit"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        # Read once: asking a GPU for them in every forward would wait for it.
        self._hidden, self._width = (int(size) for size in tensors["size"].tolist())
        self._padding = -3 * self._hidden * self._width % BLOCK

    @classmethod
    def of(cls, gate_up: Tensor, down: Tensor) -> Self:
        """The copy of an expert, a pure function of its weights: only maxima and elementwise operations.

        Raises:
            ValueError: weights that are not finite or far too large.
        """
        flat = _flat(gate_up, down)
        absmax = _absmax(flat)
        size = torch.tensor([down.shape[0], down.shape[1]])
        return cls({"codes": _codes(flat, absmax), "absmax": absmax, "size": size})

    @property
    def hidden(self) -> int:
        return self._hidden

    @property
    def width(self) -> int:
        return self._width

    def dense(self) -> tuple[Tensor, Tensor]:
        gate_up, down = self.dense_all([self])
        return gate_up[0], down[0]

    @classmethod
    def dense_all(cls, standins: Sequence[Self]) -> tuple[Tensor, Tensor]:
        """`dense` of some of one size at once: (G, 2F, D) and (G, D, F)."""
        hidden, width = standins[0]._hidden, standins[0]._width
        codes, absmax = (torch.cat([s._tensors[name] for s in standins]) for name in ("codes", "absmax"))
        state = bnb.QuantState(
            absmax=absmax,
            shape=torch.Size((len(absmax), BLOCK)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
        )
        flat = bnb.dequantize_4bit(codes.view(-1, 1), state).view(len(standins), -1)
        gate_up, down, _ = flat.split((2 * width * hidden, hidden * width, standins[0]._padding), dim=1)
        return gate_up.view(-1, 2 * width, hidden), down.view(-1, hidden, width)

    def payload_to(self, gate_up: Tensor, down: Tensor) -> bytes:
        """What leads from this copy to that of other weights of the same shapes.

        Raises:
            ValueError: weights that are not finite or far too large.
        """
        old = self._tensors["absmax"].cpu()
        flat = _flat(gate_up, down)
        absmax = _absmax(flat)
        absmax = torch.where((absmax - old).abs() <= STICKY * old, old, absmax)
        codes = _subtract(self._codes_towards(flat, absmax), self._tensors["codes"].cpu())
        bits = absmax.view(torch.int32) ^ old.view(torch.int32)
        planes = bits.view(torch.uint8).view(-1, 4).t()
        return deflated(tensor_bytes(codes) + tensor_bytes(planes))

    def _codes_towards(self, flat: Tensor, absmax: Tensor) -> Tensor:
        """Packed codes of the copy that comes after this one, of weights (blocks, BLOCK) and their scales."""
        return _codes(flat, absmax)

    @classmethod
    def _check(cls, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) != {"codes", "absmax", "size"}:
            raise ValueError(f"a lowbit stand-in holds codes, absmax and size, not {sorted(tensors)}")
        check_tensor("size", tensors["size"], torch.int64, (2,))
        hidden, width = tensors["size"].tolist()
        if not (0 < hidden < 1 << 24 and 0 < width < 1 << 24):
            raise ValueError(f"size {hidden} x {width} is not that of an expert")
        blocks = nf4_blocks(hidden, width)
        check_tensor("codes", tensors["codes"], torch.uint8, (blocks * BLOCK // 2,))
        check_tensor("absmax", tensors["absmax"], torch.float32, (blocks,))
        if bool((tensors["absmax"] < 0).any()):
            raise ValueError("a block's absmax is negative")

    def _advanced(self, payload: bytes) -> dict[str, Tensor]:
        codes, absmax = self._tensors["codes"].cpu(), self._tensors["absmax"].cpu()
        raw = torch.frombuffer(inflated(payload, codes.nbytes + absmax.nbytes), dtype=torch.uint8)
        planes = raw[codes.nbytes :].view(4, -1)
        bits = planes.t().reshape(-1).view(torch.int32) ^ absmax.view(torch.int32)
        return {
            "codes": _add(codes, raw[: codes.nbytes]),
            "absmax": bits.view(torch.float32),
            "size": self._tensors["size"].cpu(),
        }


def _flat(gate_up: Tensor, down: Tensor) -> Tensor:
    """float32 (blocks, BLOCK) on the CPU: quantising on one kind of device keeps it a function of the weights alone."""
    weights = [w.detach().to("cpu", torch.float32).reshape(-1) for w in (gate_up, down)]
    flat = torch.cat([*weights, torch.zeros(-sum(map(len, weights)) % BLOCK)]).view(-1, BLOCK)
    check_tensor("an expert's weight", flat, torch.float32, tuple(flat.shape))
    return flat


def _absmax(flat: Tensor) -> Tensor:
    return flat.abs().amax(1)


def _codes(flat: Tensor, absmax: Tensor) -> Tensor:
    """Nearest levels, packed; weights beyond their block's absmax become the outermost level."""
    codes = _nearest((flat * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1).view(-1))
    return (codes[::2] << 4) | codes[1::2]


def _nearest(scaled: Tensor) -> Tensor:
    """Index of the level nearest to each of these values in [-1, 1]; of two equally near ones, the lower."""
    cells = ((scaled + 1) * (_CELLS / 2)).to(torch.int32).clamp_(max=_CELLS - 1)
    return _LOW_CODES.index_select(0, cells).add_(scaled > _NEXT.index_select(0, cells))


def _add(codes: Tensor, change: Tensor) -> Tensor:
    """Both halves of every byte, each modulo 16: uint8 arithmetic wraps, and a carry out of the low half is masked."""
    return ((codes & 0xF0) + (change & 0xF0)) | (((codes & 0x0F) + (change & 0x0F)) & 0x0F)


def _subtract(codes: Tensor, base: Tensor) -> Tensor:
    return ((codes & 0xF0) - (base & 0xF0)) | (((codes & 0x0F) - (base & 0x0F)) & 0x0F)
