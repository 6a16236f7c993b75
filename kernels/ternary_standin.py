"""`ternary` stand-ins: the whole expert in 1.6 bits a weight, refreshed by lossless deltas of its codes.

An expert that is trained ternary (ternary.py) computes with exactly these weights, so its copy is exact. Of any other
expert it is a coarse copy, with a relative output error of about 0.5 on a trained model.

Layout: per matrix its codes packed five to a byte, and one bfloat16 scale per row.

Delta: (new code - old code) mod 3 of every weight, packed like codes, then the bits of every scale XOR the old ones,
bytes of equal significance together, deflated by runs. Integers only, so it is exact by construction. Packed before
deflating, because a symbol of Deflate costs at least a bit: one symbol per weight, of changes at random places, comes
to a quarter more bytes than one per five where a tenth of the codes change, a tenth more where a hundredth do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from .codecs import tensor_bytes
from .copies import CopyStandIn, deflated, inflated
from .experts import OwnedExpert
from .interface import check_tensor
from .ternary import (
    TRITS_PER_BYTE,
    Ternary,
    check_packed,
    check_scales,
    lookup_trits,
    masters_from,
    pack_trits,
    packed_nbytes,
    ternarise,
)

_NAMES = ("down_scales", "down_trits", "gate_up_scales", "gate_up_trits")


class TernaryStandIn(CopyStandIn):
    """Ternary copy. State: of gate_up and of down, `_trits` uint8 (ceil(2FD / 5) or ceil(FD / 5)) and `_scales`
    bfloat16 (2F or D)."""

    kind: ClassVar[str] = "ternary"

    @classmethod
    def of(cls, gate_up: Tensor, down: Tensor) -> Self:
        """The ternary form of masters, not of what is ternary already: that has smaller means.

        Raises:
            ValueError: weights that are not finite or far too large.
        """
        return cls(_state(gate_up, down))

    @classmethod
    def weights_of(cls, expert: OwnedExpert) -> tuple[Tensor, Tensor]:
        """The masters, whether the expert is trained ternary or not."""
        return expert.masters()

    @property
    def hidden(self) -> int:
        return len(self._tensors["down_scales"])

    @property
    def width(self) -> int:
        return len(self._tensors["gate_up_scales"]) // 2

    def dense(self) -> tuple[Tensor, Tensor]:
        gate_up, down = self.dense_all([self])
        return gate_up[0], down[0]

    @classmethod
    def dense_all(cls, standins: Sequence[Self]) -> tuple[Tensor, Tensor]:
        """`dense` of some of one size at once: (G, 2F, D) and (G, D, F)."""
        hidden, width = standins[0].hidden, standins[0].width
        sizes = {"gate_up": (2 * width, hidden), "down": (hidden, width)}
        found = []
        for part, (rows, columns) in sizes.items():
            trits, scales = (torch.cat([s._tensors[f"{part}_{of}"] for s in standins]) for of in ("trits", "scales"))
            codes = lookup_trits(trits, TRITS_PER_BYTE * len(trits), torch.float32).view(len(standins), -1)
            dense = codes[:, : rows * columns].view(-1, rows, columns)
            found.append(dense.mul_(scales.float().view(-1, rows, 1)))
        return found[0], found[1]

    def masters(self) -> tuple[Tensor, Tensor]:
        """float32 gate_up (2F, D) and down (D, F) with exactly this ternary form, for an expert that is trained so."""
        return self._masters("gate_up", 2 * self.width, self.hidden), self._masters("down", self.hidden, self.width)

    def payload_to(self, gate_up: Tensor, down: Tensor) -> bytes:
        """What leads from this copy to that of other masters of the same shapes.

        Raises:
            ValueError: weights that are not finite or far too large.
        """
        new, old = _state(gate_up, down), {name: tensor.cpu() for name, tensor in self._tensors.items()}
        planes = [tensor_bytes(_moved(old[f"{part}_trits"], new[f"{part}_trits"], -1)) for part in ("gate_up", "down")]
        for part in ("gate_up", "down"):
            bits = new[f"{part}_scales"].view(torch.int16) ^ old[f"{part}_scales"].view(torch.int16)
            planes.append(tensor_bytes(bits.view(torch.uint8).view(-1, 2).t()))
        return deflated(b"".join(planes))

    @classmethod
    def _check(cls, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) != set(_NAMES):
            raise ValueError(f"a ternary stand-in holds {', '.join(_NAMES)}, not {sorted(tensors)}")
        hidden, rows = tensors["down_scales"].numel(), tensors["gate_up_scales"].numel()
        if not (0 < hidden < 1 << 24 and 0 < rows < 1 << 25 and rows % 2 == 0):
            raise ValueError(f"a ternary stand-in that holds {rows} x {hidden} gates and ups is not that of an expert")
        for part, shape in (("gate_up", (rows, hidden)), ("down", (hidden, rows // 2))):
            trits, scales, size = tensors[f"{part}_trits"], tensors[f"{part}_scales"], shape[0] * shape[1]
            check_tensor(f"{part}_scales", scales, torch.bfloat16, shape[:1])
            check_tensor(f"{part}_trits", trits, torch.uint8, (packed_nbytes(size),))
            check_packed(trits, size)
            check_scales(lookup_trits(trits, size, torch.int8).view(shape), scales)

    def _advanced(self, payload: bytes) -> dict[str, Tensor]:
        old = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        parts = [old[name] for name in ("gate_up_trits", "down_trits", "gate_up_scales", "down_scales")]
        sizes = [tensor.nbytes for tensor in parts]
        raw = torch.frombuffer(inflated(payload, sum(sizes)), dtype=torch.uint8)
        gate_up, down, gate_up_planes, down_planes = torch.split(raw, sizes)
        advanced = {}
        for part, change, planes in (("gate_up", gate_up, gate_up_planes), ("down", down, down_planes)):
            check_packed(change, len(change) * TRITS_PER_BYTE)
            advanced[f"{part}_trits"] = _moved(change, old[f"{part}_trits"], 1)
            # Contiguous already where there is one row: it is copied all the same, to an even address.
            bits = planes.view(2, -1).t().clone(memory_format=torch.contiguous_format).view(torch.int16).view(-1)
            scales = bits ^ old[f"{part}_scales"].view(torch.int16)
            advanced[f"{part}_scales"] = scales.view(torch.bfloat16)
        return advanced

    def _masters(self, part: str, rows: int, columns: int) -> Tensor:
        codes = lookup_trits(self._tensors[f"{part}_trits"], rows * columns, torch.int8).view(rows, columns)
        return masters_from(Ternary(codes, self._tensors[f"{part}_scales"]))


def _state(gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Made on the CPU: quantising on one kind of device keeps it a function of the weights alone."""
    state = {}
    for part, weights in (("gate_up", gate_up), ("down", down)):
        matrix = weights.detach().to("cpu", torch.float32)
        check_tensor("an expert's weight", matrix, torch.float32, tuple(matrix.shape))
        ternary: Ternary = ternarise(matrix)
        state[f"{part}_trits"], state[f"{part}_scales"] = pack_trits(ternary.codes), ternary.scales
    return state


def _moved(change: Tensor, packed: Tensor, sign: int) -> Tensor:
    """Packed trits plus (or, with sign -1, minus) others, each modulo 3."""
    first, second = (lookup_trits(trits, len(trits) * TRITS_PER_BYTE, torch.int8) for trits in (change, packed))
    sums = first.mul_(sign).add_(second)  # in [-2, 2]; torch's remainder is ten times as slow
    return pack_trits(sums.add(sums > 1, alpha=-3).add_(sums < -1, alpha=3))
