"""`shared` stand-ins: a base that many experts have in common, and of each a correction of low rank.

For upcycled models, whose experts begin as copies of a dense one's layers and move away from them slowly: what an
expert has learned since is nearly of low rank, where that of an expert from scratch is not.

State: which base, and rank-R int8 factors of (expert - base) for both matrices (lowrank.py). The base itself is never
sent: it is part of the run's seed (bases.py). A stand-in costs the FLOPs of its expert, and memory for the base once.

Delta: the factors anew, and which state they replace. Those of two versions have nothing in common that a difference
would save: the singular vectors turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor

from .bases import DIGEST_BYTES, Bases
from .codecs import Int8Rows
from .copies import CopyStandIn
from .interface import check_tensor
from .lowrank import MAX_RANK, Factors, factor, factors_nbytes

_MATRICES = ("gate_up", "down")
_SIDES = ("left", "right")
_STATE_BYTES = 8  # of the digest of the state that a delta is for


class SharedStandIn(CopyStandIn):
    """A base and low-rank corrections. State: base uint8 (16), its digest; of each matrix (m, n) `_left` int8 (m, R)
    and `_right` int8 (n, R) with a bfloat16 scale per row, `_left_scales` and `_right_scales`.

    Args:
        tensors: the state.
        bases: where its base is.

    Raises:
        ValueError: not a state of this kind, or the base is not among `bases`.
    """

    kind: ClassVar[str] = "shared"

    def __init__(self, tensors: Mapping[str, Tensor], bases: Bases) -> None:
        super().__init__(tensors)
        self.bases, self._base = bases, bytes(self._tensors["base"].tolist())
        if self._base not in bases:
            raise ValueError("a stand-in on a base that is not one of this run's")
        if bases[self._base][1].shape != (self.hidden, self.width):
            raise ValueError(f"a correction of {self.hidden} x {self.width} for a base of another size")

    @classmethod
    def near(cls, gate_up: Tensor, down: Tensor, rank: int, bases: Bases) -> Self:
        """The one for an expert, on the base that lies nearest to it; a rank beyond the matrices' is cut to theirs.

        Raises:
            ValueError: weights that are not finite, rank below 1, or no base of their size.
        """
        gate_up, down = (matrix.detach().to("cpu", torch.float32) for matrix in (gate_up, down))
        digest = bases.nearest(gate_up, down)
        state = {"base": torch.tensor(list(digest), dtype=torch.uint8)}
        rank = min(rank, *gate_up.shape, *down.shape)
        for name, factors in zip(_MATRICES, _corrections((gate_up, down), bases[digest], rank), strict=True):
            state |= _named(name, factors)
        return cls(state, bases)

    @property
    def hidden(self) -> int:
        return len(self._tensors["down_left"])

    @property
    def width(self) -> int:
        return len(self._tensors["down_right"])

    @property
    def rank(self) -> int:
        """R."""
        return self._tensors["down_left"].shape[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        device = self._tensors["down_left"].device
        gate_up, down = self.bases.on(device, self._base)
        return gate_up + self._factors("gate_up").expand(), down + self._factors("down").expand()

    def payload_to(self, gate_up: Tensor, down: Tensor) -> bytes:
        """What leads from this one to that of other weights of the same shapes, on the same base.

        Raises:
            ValueError: weights that are not finite.
        """
        wanted = [matrix.detach().to("cpu", torch.float32) for matrix in (gate_up, down)]
        found = _corrections((wanted[0], wanted[1]), self.bases[self._base], self.rank)
        return self.digest()[:_STATE_BYTES] + b"".join(factors.to_bytes() for factors in found)

    def with_state(self, tensors: Mapping[str, Tensor]) -> Self:
        return type(self)(tensors, self.bases)

    def _factors(self, name: str) -> Factors:
        sides = [Int8Rows(self._tensors[f"{name}_{s}"], self._tensors[f"{name}_{s}_scales"]) for s in _SIDES]
        return Factors(*sides)

    @classmethod
    def _check(cls, tensors: Mapping[str, Tensor]) -> None:
        sides = [f"{name}_{side}" for name in _MATRICES for side in _SIDES]
        if set(tensors) != {"base", *sides, *(f"{side}_scales" for side in sides)}:
            raise ValueError(f"a shared stand-in holds a base and factors, not {sorted(tensors)}")
        check_tensor("base", tensors["base"], torch.uint8, (DIGEST_BYTES,))
        if any(tensors[side].dim() != 2 for side in sides):
            raise ValueError("factors are matrices")
        hidden, rank = tensors["down_left"].shape
        width = len(tensors["down_right"])
        if not (1 <= rank <= MAX_RANK and hidden and width):
            raise ValueError(f"factors of rank {rank} for an expert of {hidden} x {width}")
        for side, rows in zip(sides, (2 * width, hidden, hidden, width), strict=True):
            check_tensor(side, tensors[side], torch.int8, (rows, rank))
            check_tensor(f"{side}_scales", tensors[f"{side}_scales"], torch.bfloat16, (rows,))
            # What `Int8Rows` refuses of bytes, it refuses of tensors.
            Int8Rows.from_bytes(Int8Rows(tensors[side], tensors[f"{side}_scales"]).to_bytes(), rows, rank)

    def _advanced(self, payload: bytes) -> dict[str, Tensor]:
        shapes = {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}
        sizes = {name: factors_nbytes(shape, self.rank) for name, shape in shapes.items()}
        before, payload = payload[:_STATE_BYTES], payload[_STATE_BYTES:]
        if before != self.digest()[:_STATE_BYTES]:
            raise ValueError("the delta is damaged, or made for another state than this one")
        if len(payload) != sum(sizes.values()):
            raise ValueError(f"a delta payload of {len(payload)} bytes is not of rank {self.rank} for this stand-in")
        state = {"base": self._tensors["base"].cpu()}
        cut = sizes["gate_up"]
        for name, part in zip(_MATRICES, (payload[:cut], payload[cut:]), strict=True):
            state |= _named(name, Factors.from_bytes(part, shapes[name], self.rank))
        return state


def _corrections(weights: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor], rank: int) -> list[Factors]:
    return [factor(matrix - near.float(), rank) for matrix, near in zip(weights, base, strict=True)]


def _named(name: str, factors: Factors) -> dict[str, Tensor]:
    return {
        f"{name}_left": factors.left.codes,
        f"{name}_left_scales": factors.left.scales,
        f"{name}_right": factors.right.codes,
        f"{name}_right_scales": factors.right.scales,
    }
