"""Deltas of 4-bit copies that say less than everything, for `fidelity.py` to compare with what Shoal sends.

What a delta leaves out stays in what the copy is off by, so the next one is made of it too: that is its error feedback.

exact      every code to the nearest level, which is what Shoal sends
largest    only the codes whose moves take most off the squared error
one level  every code by one level at most: three choices, 1.6 bits before they are deflated
low rank   int8 factors of what has changed since the last exact delta, and an exact one now and then
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.bnb import functional as bnb
from ..kernels.copies import CopyPublisher, CopyStandIn
from ..kernels.experts import OwnedExpert
from ..kernels.interface import float_weights, output_fidelity
from ..kernels.lowbit import BLOCK, LowbitStandIn
from ..kernels.narrow import NarrowStandIn
from ..kernels.replay import ReplayBuffer
from ..kernels.standin import StandIn

LEVELS: Tensor = bnb.get_4bit_type("nf4", device="cpu", blocksize=BLOCK)


class PartialCopy(LowbitStandIn):
    """A 4-bit copy of which only some codes move, and not far."""

    share = 1.0  # of the codes that move in a delta, those that gain most
    levels = len(LEVELS)  # by which one moves at most

    def with_state(self, tensors: Mapping[str, Tensor]) -> PartialCopy:
        copy = PartialCopy(tensors)
        copy.share, copy.levels = self.share, self.levels
        return copy

    def _codes_towards(self, flat: Tensor, absmax: Tensor) -> Tensor:
        old, nearest = unpacked(self._tensors["codes"]), unpacked(super()._codes_towards(flat, absmax))
        new = old + (nearest - old).clamp(-self.levels, self.levels)
        weights, scale = flat.view(-1), absmax.repeat_interleave(BLOCK)
        gain = (weights - LEVELS[old] * scale).square() - (weights - LEVELS[new] * scale).square()
        best = gain.topk(round(self.share * len(gain))).indices
        codes = old.index_copy(0, best, new[best]).to(torch.uint8)
        return (codes[::2] << 4) | codes[1::2]


class LowRankPublisher(CopyPublisher):
    """4-bit copies published seldom, and in between a low-rank correction of the last one, which the next replaces.

    Args:
        rank: of each matrix.
        exact_every: of so many deltas one is exact.
    """

    def __init__(self, published: CopyStandIn, replay: ReplayBuffer, *, act: str, rank: int, exact_every: int) -> None:
        super().__init__(published, replay, act=act)
        self._rank, self._exact_every, self._deltas = rank, exact_every, 0
        self._corrected: StandIn = published

    def delta(self, expert: OwnedExpert) -> bytes:
        self._deltas += 1
        if self._deltas % self._exact_every == 1:
            self._corrected = self.published
            return super().delta(expert)
        gate_up, down = self.published.dense()
        corrected = NarrowStandIn({"gate_up": gate_up, "down": down})  # as wide as the expert: a matrix of any values
        self._corrected = corrected
        return corrected.delta(corrected.payload_to(*float_weights(expert), self._rank))

    def fidelity(self, expert: OwnedExpert) -> float:
        return output_fidelity(expert, self._corrected, *self.replay.all_rows(), self._act)


def unpacked(codes: Tensor) -> Tensor:
    """int64 levels of codes that are two to a byte."""
    return torch.stack([codes >> 4, codes & 0x0F], 1).view(-1).long()
