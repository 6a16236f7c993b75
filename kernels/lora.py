"""QLoRA experts: a frozen base in 4 bits, and low-rank factors that are trained beside it (https://arxiv.org/abs/2305.14314).

    W = base + α/r · B A        A (r, in), B (out, r), for gate_up (2F, D) and for down (D, F)

so that an owner keeps 4.13 bits a weight and the factors' optimizer state, where a full expert takes 16 bytes a weight.
Others see W: what is published, exported and handed over is the product added to the base. Whoever takes it over as
QLoRA again quantises it once; that moves W by NF4's error, about a tenth of its norm.

The base is bitsandbytes' NF4 in blocks of 64 with double quantisation: the blocks' maxima are 8 bits in blocks of 256.
gate_up and down are one flat array, as in `lowbit.py`.

From rows of its own an expert's gradients never take the shape of W: dA = α/r (dy B)ᵀ x and dB = α/r dyᵀ (x Aᵀ). What
sketches teach comes as a gradient of W, of one expert at a time, and `project` brings it down at once.

Shapes: D hidden, F width, r rank, N rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .bnb import functional as bnb
from .experts import OwnedExpert
from .interface import check_tensor
from .lowbit import BLOCK, nf4_blocks

NESTED_BLOCK = 256


@dataclass(frozen=True)
class Nf4Base:
    """Frozen weights of one expert.

    Attributes:
        codes: uint8 (blocks * 32), two weights a byte.
        absmax: uint8 (blocks), codes of the blocks' maxima.
        nested_absmax: float32, one for 256 of `absmax`; offset: float32 scalar, their mean.
        hidden, width: D and F.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    hidden: int
    width: int

    @classmethod
    def of(cls, gate_up: Tensor, down: Tensor) -> Self:
        """The nearest levels to gate_up (2F, D) and down (D, F)."""
        flat = torch.cat([gate_up.detach().float().flatten(), down.detach().float().flatten()])
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        codes, state = bnb.quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        nested = state.state2.absmax
        return cls(codes.flatten(), state.absmax, nested, state.offset.reshape(()), down.shape[0], down.shape[1])

    def dense(self) -> tuple[Tensor, Tensor]:
        """float32 gate_up (2F, D) and down (D, F)."""
        state = bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((len(self.absmax), BLOCK)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
            offset=self.offset,
            state2=bnb.QuantState(
                absmax=self.nested_absmax,
                blocksize=NESTED_BLOCK,
                code=_dynamic_map(self.codes.device),
                dtype=torch.float32,
            ),
        )
        flat = bnb.dequantize_4bit(self.codes.view(-1, 1), state).view(-1)
        cut = 2 * self.width * self.hidden
        gate_up, down = flat[:cut], flat[cut : cut + self.hidden * self.width]
        return gate_up.view(2 * self.width, self.hidden), down.view(self.hidden, self.width)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state by name; `read` is the inverse."""
        return {name: getattr(self, name) for name in ("codes", "absmax", "nested_absmax", "offset")}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], hidden: int, width: int) -> Self:
        """Raises ValueError: not the state of an expert of this size."""
        blocks = nf4_blocks(hidden, width)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (blocks * BLOCK // 2,)),
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (math.ceil(blocks / NESTED_BLOCK),)),
            "offset": (torch.float32, ()),
        }
        return cls(**_checked(tensors, shapes), hidden=hidden, width=width)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(
            **{name: tensor.to(device) for name, tensor in self.tensors.items()}, hidden=self.hidden, width=self.width
        )


@functools.cache
def _dynamic_map(device: torch.device) -> Tensor:
    found: Tensor = bnb.create_dynamic_map().to(device)
    return found


@dataclass
class LoraExpert(OwnedExpert):
    """One expert, trained by its factors: gate_up_a (r, D), gate_up_b (2F, r), down_a (r, F) and down_b (D, r)."""

    names = ("gate_up_a", "gate_up_b", "down_a", "down_b")

    base: Nf4Base
    scale: float  # α/r
    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor

    @classmethod
    def of(
        cls, gate_up: Tensor, down: Tensor, *, rank: int, alpha: float, generator: torch.Generator | None = None
    ) -> Self:
        """An expert that starts as the 4-bit form of these weights: A is drawn, B is zero (Hu et al. 2021).

        Raises:
            ValueError: a rank below 1, or above the smaller side of a matrix.
        """
        hidden, width = down.shape
        if not 1 <= rank <= min(hidden, width):
            raise ValueError(f"rank {rank} is not from 1 to {min(hidden, width)}, the smaller side of these experts")

        def drawn(columns: int) -> Tensor:
            return torch.randn(rank, columns, generator=generator) / math.sqrt(columns)

        zeros = torch.zeros(2 * width, rank), torch.zeros(hidden, rank)
        base = Nf4Base.of(gate_up, down)
        return cls(base, alpha / rank, drawn(hidden), zeros[0], drawn(width), zeros[1])

    @property
    def width(self) -> int:
        return self.base.width

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.gate_up_a, self.gate_up_b, self.down_a, self.down_b

    def dense(self) -> tuple[Tensor, Tensor]:
        gate_up, down = self.base.dense()
        gate_up.addmm_(self.gate_up_b.detach(), self.gate_up_a.detach(), alpha=self.scale)
        down.addmm_(self.down_b.detach(), self.down_a.detach(), alpha=self.scale)
        return gate_up, down

    def with_trained(self, trained: Sequence[Tensor]) -> Self:
        return type(self)(self.base, self.scale, *trained)

    def to(self, device: torch.device) -> Self:
        return type(self)(self.base.to(device), self.scale, *self.trained)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(tensor.nbytes for tensor in self.base.tensors.values())

    def gradients(self, x_ND: Tensor, dh_NH: Tensor, dy_ND: Tensor, a_NF: Tensor) -> tuple[Tensor, ...]:
        d_gate_up = self._of_rows(x_ND, dh_NH, self.gate_up_a, self.gate_up_b)
        return *d_gate_up, *self._of_rows(a_NF, dy_ND, self.down_a, self.down_b)

    def _of_rows(self, x_NI: Tensor, dy_NO: Tensor, a_rI: Tensor, b_Or: Tensor) -> tuple[Tensor, Tensor]:
        a_rI, b_Or = a_rI.detach().to(x_NI.dtype), b_Or.detach().to(x_NI.dtype)
        return (dy_NO @ b_Or).t() @ x_NI * self.scale, dy_NO.t() @ (x_NI @ a_rI.t()) * self.scale

    def project(self, d_gate_up: Tensor, d_down: Tensor) -> tuple[Tensor, ...]:
        d_gate_up, d_down = d_gate_up.to(self.gate_up_a.device), d_down.to(self.down_a.device)
        return (
            *self._of_weights(d_gate_up, self.gate_up_a, self.gate_up_b),
            *self._of_weights(d_down, self.down_a, self.down_b),
        )

    def _of_weights(self, dw_OI: Tensor, a_rI: Tensor, b_Or: Tensor) -> tuple[Tensor, Tensor]:
        return b_Or.detach().t() @ dw_OI * self.scale, dw_OI @ a_rI.detach().t() * self.scale

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All there is to it, by name; `read` is the inverse."""
        factors = dict(zip(self.names, (tensor.detach() for tensor in self.trained), strict=True))
        return self.base.tensors | factors | {"scale": torch.tensor(self.scale, dtype=torch.float64)}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], hidden: int, width: int) -> Self:
        """Raises ValueError: not the state of an expert of this size, or not finite."""
        first = tensors.get("gate_up_a")
        rank = first.shape[0] if first is not None and first.dim() == 2 else 0
        shapes = {
            "gate_up_a": (rank, hidden),
            "gate_up_b": (2 * width, rank),
            "down_a": (rank, width),
            "down_b": (hidden, rank),
        }
        if not 1 <= rank <= min(hidden, width):
            raise ValueError(f"gate_up_a, of rank {rank}, is not that of an expert of {hidden} x {width}")
        found = _checked(tensors, {name: (torch.float32, shape) for name, shape in shapes.items()})
        scale = _checked(tensors, {"scale": (torch.float64, ())})["scale"].item()
        return cls(Nf4Base.read(tensors, hidden, width), scale, **found)


def lora_bytes(hidden: int, width: int, rank: int) -> tuple[int, int]:
    """Bytes of one expert's base, and weights in its factors."""
    blocks = nf4_blocks(hidden, width)
    base = blocks * BLOCK // 2 + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4
    return base, rank * (hidden + 2 * width + width + hidden)


def _checked(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, Tensor]:
    for name, (dtype, shape) in shapes.items():
        if name not in tensors:
            raise ValueError(f"a low-rank expert's state lacks {name}")
        check_tensor(name, tensors[name], dtype, shape)
    return {name: tensors[name] for name in shapes}
