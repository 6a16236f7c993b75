"""Stand-ins of which only the bytes matter, for tests of how copies are kept equal."""

import hashlib
from collections.abc import Sequence

from shoal.protocol.experts.surrogates import SlotPublisher, StandIn, state_digest
from shoal.protocol.messages import StandInSnapshot

LAYERS = 2


class FakeStandIn:
    """A hash chain. It applies any delta to any base, unlike a real one, so that only the protocol can tell."""

    def __init__(self, state: bytes) -> None:
        self.state = state

    def apply(self, delta: bytes) -> None:
        if delta.startswith(b"bad"):
            raise ValueError("bad delta")
        self.state = hashlib.sha256(self.state + delta).digest()

    def to_bytes(self) -> bytes:
        return self.state

    def digest(self) -> bytes:
        return hashlib.sha256(self.state).digest()[:16]


def load(data: bytes) -> FakeStandIn:
    if len(data) != 32:
        raise ValueError("not a state")
    return FakeStandIn(data)


def seeded() -> list[FakeStandIn]:
    return [FakeStandIn(bytes([layer]) * 32) for layer in range(LAYERS)]


def snapshot_of(publisher: SlotPublisher, published: Sequence[StandIn]) -> StandInSnapshot:
    """What an owner answers to who fetches its stand-ins."""
    layers = tuple(layer.to_bytes() for layer in published)
    return StandInSnapshot(publisher.slot, publisher.epoch, publisher.seq, layers, state_digest(published))


def states(layers: Sequence[FakeStandIn]) -> list[bytes]:
    return [layer.state for layer in layers]
