"""What peers say to each other beside the directory's records: gossip, and what travels in streams.

Every message is the payload of a sealed envelope, whose `kind` is the struct's `kind` below; it is decoded only after
the signature was verified. On the wire: MessagePack arrays, fields in the order given here, so a new field goes to
the end with a default. Decoding refuses what is malformed, out of bounds or not finite; no number from a peer is used
unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from .envelope import decode_payload
from .errors import Refused

MAX_GOSSIP_BYTES = 900_000  # gossipsub refuses RPCs over 1 MiB; the rest is for the envelope and for framing
MAX_SLOTS = 1 << 16
MAX_LAYERS = 512

Slot = Annotated[int, Meta(ge=0, lt=MAX_SLOTS)]
Epoch = Annotated[int, Meta(ge=0, lt=1 << 48)]
Sequence = Annotated[int, Meta(ge=0, lt=1 << 48)]  # of an epoch-independent count of a slot's deltas
Step = Annotated[int, Meta(ge=0, lt=1 << 48)]  # of the sender's inner steps
Fragment = Annotated[int, Meta(ge=0, lt=1 << 16)]
Round = Annotated[int, Meta(ge=0, lt=1 << 48)]
Digest16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Fidelity = Annotated[float, Meta(ge=-1e6, le=1.0)]  # 1 is exact, 0 as bad as nothing, below 0 worse
Count = Annotated[int, Meta(ge=0, lt=1 << 48)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages. `kind` is what the envelope calls it, `max_bytes` the longest payload accepted."""

    kind: ClassVar[str] = ""
    max_bytes: ClassVar[int] = MAX_GOSSIP_BYTES


class SurrogateDelta(Message, frozen=True):
    """One refresh of a slot's stand-ins, in all layers at once.

    Without layers it is an **announcement**: "my published state is at (epoch, seq) and has this digest". Owners send
    one instead of a delta that does not fit into gossip, and one now and then so that a lost last delta is noticed.
    """

    kind: ClassVar[str] = "surrogate-delta"

    slot: Slot
    epoch: Epoch
    seq: Sequence  # goes up by one per delta and over changes of owner; not by announcements
    step: Step  # of the owner, when it fitted the delta
    layers: Annotated[tuple[bytes, ...], Meta(max_length=MAX_LAYERS)]  # one per MoE layer; none in an announcement
    digest: Digest16  # of the slot's published state once this is applied
    fidelity: Annotated[tuple[Fidelity, ...], Meta(max_length=MAX_LAYERS)] = ()  # one per MoE layer, or none measured

    def __post_init__(self) -> None:
        if self.layers and self.fidelity and len(self.layers) != len(self.fidelity):
            raise ValueError(f"{len(self.layers)} layers but {len(self.fidelity)} fidelities")
        _check_finite(self.fidelity)

    @property
    def is_announcement(self) -> bool:
        return not self.layers

    def announcement(self) -> SurrogateDelta:
        """The same position without the delta itself."""
        return msgspec.structs.replace(self, layers=())


class DeltaBatch(Message, frozen=True):
    """Deltas of any number of slots in one gossip message: gossipsub counts messages, not bytes."""

    kind: ClassVar[str] = "delta-batch"

    deltas: Annotated[tuple[SurrogateDelta, ...], Meta(min_length=1, max_length=MAX_SLOTS)]


class RoundOpen(Message, frozen=True):
    """The sender is ready to merge a backbone fragment."""

    kind: ClassVar[str] = "round-open"

    round: Round
    attempt: Annotated[int, Meta(ge=0, lt=1 << 16)]  # rounds without a commit are tried again
    fragment: Fragment
    step: Step


class ExpertCounts(Message, frozen=True):
    """Tokens that the sender routed to each expert since its last report, for the load-balance loss over the swarm."""

    kind: ClassVar[str] = "expert-counts"

    step: Step
    counts: Annotated[  # (L, E)
        tuple[Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_SLOTS)], ...],
        Meta(min_length=1, max_length=MAX_LAYERS),
    ]

    def __post_init__(self) -> None:
        if len({len(layer) for layer in self.counts}) != 1:
            raise ValueError("layers differ in their number of experts")


class News(Message, frozen=True):
    """A directory record, sealed by its author: the DHT's content, faster. Anybody may pass it on."""

    kind: ClassVar[str] = "news"
    max_bytes: ClassVar[int] = 256 * 1024

    record: Annotated[bytes, Meta(min_length=1, max_length=255 * 1024)]


class StandInSnapshot(Message, frozen=True):
    """All of a slot's published stand-ins: answer to `standin/<slot>`."""

    kind: ClassVar[str] = "standin-snapshot"
    max_bytes: ClassVar[int] = 1 << 30

    slot: Slot
    epoch: Epoch
    seq: Sequence
    layers: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=MAX_LAYERS)]  # StandIn.to_bytes(), per MoE layer
    digest: Digest16  # of `layers`


class SlotState(Message, frozen=True):
    """A slot in full: answer to `snapshot/<slot>`, and to `handover/<slot>`, by when the sender has frozen it."""

    kind: ClassVar[str] = "slot-state"
    max_bytes: ClassVar[int] = 1 << 32

    slot: Slot
    epoch: Epoch
    version: Step  # the owner's step it was taken at
    tensors: Annotated[bytes, Meta(min_length=8)]  # safetensors: expert weights, optimizer state, publisher state
    standin: StandInSnapshot  # what the owner had published by then


class FragmentState(Message, frozen=True):
    """Header of `backbone/<fragment>`: which committed state the tensors that follow are."""

    kind: ClassVar[str] = "fragment-state"
    max_bytes: ClassVar[int] = 1024

    round: Round
    fragment: Fragment
    digest: Digest32  # of the fragment and its momentum, as voted


M = TypeVar("M", bound=Message)

_TYPES: tuple[type[Message], ...] = (
    DeltaBatch, RoundOpen, ExpertCounts, News, StandInSnapshot, SlotState, FragmentState,
)  # fmt: skip
KINDS = {message.kind: message for message in _TYPES}

_encoder = msgspec.msgpack.Encoder()
_decoders = {message: msgspec.msgpack.Decoder(message) for message in (*_TYPES, SurrogateDelta)}


def encode(message: Message) -> bytes:
    """The envelope's payload. Raises ValueError if peers would refuse it."""
    data = _encoder.encode(message)
    if len(data) > message.max_bytes:
        raise ValueError(f"{message.kind} of {len(data)} bytes is over its limit of {message.max_bytes}")
    return data


def decode(payload: bytes, message: type[M]) -> M:
    """A peer's message of a known type. Raises Refused with reason `oversized` or `malformed`."""
    if len(payload) > message.max_bytes:
        raise Refused("oversized", f"{message.kind} of {len(payload)} bytes, at most {message.max_bytes} are accepted")
    decoded = decode_payload(_decoders[message], payload, message.kind)
    assert isinstance(decoded, message)
    return decoded


def decode_kind(kind: str, payload: bytes) -> Message:
    """A peer's message by its envelope's kind. Raises Refused, also with reason `unknown-kind`."""
    if kind not in KINDS:
        raise Refused("unknown-kind", f"no message is called {kind[:40]!r}")
    return decode(payload, KINDS[kind])


def batches(deltas: Iterable[SurrogateDelta], max_bytes: int = MAX_GOSSIP_BYTES) -> Iterator[DeltaBatch]:
    """Splits deltas, in order, into messages of at most `max_bytes`. One too long by itself becomes an announcement."""
    header = 5 + 1  # of the outer arrays
    taken: list[SurrogateDelta] = []
    size = header
    for delta in deltas:
        length = len(_encoder.encode(delta))
        if header + length > max_bytes:
            delta = delta.announcement()
            length = len(_encoder.encode(delta))
        if taken and size + length > max_bytes:
            yield DeltaBatch(tuple(taken))
            taken, size = [], header
        taken.append(delta)
        size += length
    if taken:
        yield DeltaBatch(tuple(taken))


def _check_finite(values: Iterable[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError("not finite")
