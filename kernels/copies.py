"""Stand-ins that are copies: all weights of the expert, coarser, and nothing fitted. All but `narrow` are."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Self

from torch import Tensor

from .experts import OwnedExpert
from .interface import Publisher, StandIn, output_fidelity, prefixed, take
from .replay import ReplayBuffer

JUDGED_ROWS = 64  # nothing is fitted: rows serve only to measure fidelity, and all their outputs go into one number


class CopyStandIn(StandIn):
    """A pure function of the expert's weights."""

    @classmethod
    def weights_of(cls, expert: OwnedExpert) -> tuple[Tensor, Tensor]:
        """What of an expert `payload_to` copies."""
        return expert.dense()

    @abstractmethod
    def payload_to(self, gate_up: Tensor, down: Tensor) -> bytes:
        """What leads from this copy to that of other weights of the same shapes.

        Raises:
            ValueError: weights that are not finite or far too large.
        """


class CopyPublisher(Publisher):
    """Publishes an expert's copy; nothing is fitted, so `refit` does nothing.

    Args:
        published: what composers hold.
        replay: of rows that serve to measure fidelity.
    """

    published: CopyStandIn

    def __init__(self, published: CopyStandIn, replay: ReplayBuffer, *, act: str = "silu") -> None:
        self.published, self.replay, self._act = published, replay, act

    def refit(self, expert: OwnedExpert) -> None:
        """A copy follows its expert by `delta` alone."""

    def delta(self, expert: OwnedExpert) -> bytes:
        return self.published.delta(self.published.payload_to(*self.published.weights_of(expert)))

    def fidelity(self, expert: OwnedExpert) -> float:
        return output_fidelity(expert, self.published, *self.replay.all_rows(), self._act)

    def successor(self, replay: ReplayBuffer) -> Self:
        return type(self)(copy(self.published), replay, act=self._act)

    def state_dict(self, *, replay: bool = True) -> dict[str, Tensor]:
        state = prefixed("published", {name: t.cpu().clone() for name, t in self.published.tensors.items()})
        if replay:
            state |= prefixed("replay", self.replay.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        published = self.published.with_state({name: t.cpu().clone() for name, t in take(state, "published").items()})
        if (published.hidden, published.width) != (self.published.hidden, self.published.width):
            raise ValueError(f"the state is of a {published.hidden} x {published.width} expert")
        replay = take(state, "replay")
        if len(replay) + len(published.tensors) != len(state):
            raise ValueError("the state holds more than published and replay")
        if replay:
            self.replay.load_state_dict(replay)
        self.published = published


def deflated(raw: bytes) -> bytes:
    """A payload that is mostly runs of zeros, smaller."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return deflate.compress(raw) + deflate.flush()


def inflated(payload: bytes, size: int) -> bytearray:
    """Exactly `size` bytes out of a deflated payload, never allocating more for a hostile one.

    Raises:
        ValueError: damaged, or another size.
    """
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(payload, size + 1)
    except zlib.error as error:
        raise ValueError(f"a delta does not inflate: {error}") from error
    if len(raw) != size or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a delta does not inflate to exactly {size} bytes")
    return bytearray(raw)
