"""Stand-ins that are copies: all weights of the expert, coarser, and nothing fitted. `lowbit` and `ternary` are."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from torch import Tensor

from .experts import OwnedExpert
from .interface import Publisher, StandIn, output_fidelity, prefixed, take
from .replay import ReplayBuffer

_JUDGED_ROWS = 256  # nothing is fitted: rows serve only to measure fidelity


class CopyStandIn(StandIn):
    """A pure function of the expert's weights."""

    @classmethod
    @abstractmethod
    def of(cls, gate_up: Tensor, down: Tensor) -> Self:
        """The copy of an expert, the same on every machine.

        Raises:
            ValueError: weights that are not finite or far too large.
        """

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
        expert: as it is now; the copy of its masters is what was published, unless `published` is given.
        published: what composers already hold, where ownership was taken over.
    """

    copy_type: ClassVar[type[CopyStandIn]]
    published: CopyStandIn

    def __init__(
        self, expert: OwnedExpert, *, replay_rows: int, published: CopyStandIn | None = None, act: str = "silu"
    ) -> None:
        # Of the masters, as `initial_standin` has it: what an expert computes with may differ from them.
        self.published = published or self.copy_type.of(*expert.masters())
        self._replay = ReplayBuffer(min(replay_rows, _JUDGED_ROWS), self.published.hidden)
        self._act = act

    def observe(self, x_ND: Tensor, gate_N: Tensor) -> None:
        self._replay.add(x_ND, gate_N)

    def refit(self, expert: OwnedExpert) -> None:
        """A copy follows its expert by `delta` alone."""

    def delta(self, expert: OwnedExpert) -> bytes:
        return self.published.delta(self.published.payload_to(*self.copy_type.weights_of(expert)))

    def fidelity(self, expert: OwnedExpert) -> float:
        return output_fidelity(expert, self.published, *self._replay.all_rows(), self._act)

    def state_dict(self, *, replay: bool = True) -> dict[str, Tensor]:
        state = prefixed("published", {name: t.cpu().clone() for name, t in self.published.tensors.items()})
        if replay:
            state |= prefixed("replay", self._replay.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        published = self.copy_type({name: t.cpu().clone() for name, t in take(state, "published").items()})
        if (published.hidden, published.width) != (self.published.hidden, self.published.width):
            raise ValueError(f"the state is of a {published.hidden} x {published.width} expert")
        replay = take(state, "replay")
        if len(replay) + len(published.tensors) != len(state):
            raise ValueError("the state holds more than published and replay")
        if replay:
            self._replay.load_state_dict(replay)
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
