"""What peers say to each other beside the directory's records: gossip, and what travels in streams.

Every message is the payload of a sealed envelope, whose `kind` is the struct's `kind` below; it is decoded only after
the signature was verified. On the wire: MessagePack arrays, fields in the order given here, so a new field goes to
the end with a default. Decoding refuses what is malformed, out of bounds or not finite; no number from a peer is used
unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from .envelope import ENVELOPE_OVERHEAD, PeerId, decode_payload
from .errors import Refused
from .transport.limits import MAX_PUBLISH_BYTES

MAX_GOSSIP_BYTES = MAX_PUBLISH_BYTES - ENVELOPE_OVERHEAD  # what is published is the payload in its envelope
MAX_SKETCH_BYTES = 64 * 1024 * 1024 - 4096  # a call's body of 64 MiB; the rest is for the envelope
MAX_SLOTS = 1 << 16
MAX_LAYERS = 512
HANDLE_BYTES = 8
MAX_REFUSALS = 1024  # listed in one reply
MAX_AUDITED_SKETCHES = 4096  # of one expert and step
MAX_AUDITED_PAST = 64  # versions of a stand-in that these were taken at

Slot = Annotated[int, Meta(ge=0, lt=MAX_SLOTS)]
Epoch = Annotated[int, Meta(ge=0, lt=1 << 48)]
Seq = Annotated[int, Meta(ge=0, lt=1 << 48)]  # of an epoch-independent count of a slot's deltas
Step = Annotated[int, Meta(ge=0, lt=1 << 48)]  # of the sender's inner steps
Fragment = Annotated[int, Meta(ge=0, lt=1 << 16)]
Round = Annotated[int, Meta(ge=0, lt=1 << 48)]
Digest16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Digest32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Fidelity = Annotated[float, Meta(ge=-1e6, le=1.0)]  # 1 is exact, 0 as bad as nothing, below 0 worse
Count = Annotated[int, Meta(ge=0, lt=1 << 48)]
Positive = Annotated[int, Meta(ge=1, lt=1 << 48)]
Handle = Annotated[bytes, Meta(min_length=HANDLE_BYTES, max_length=HANDLE_BYTES)]  # an expert's name, see handles.py
Reason = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}\Z")]  # of a refusal, as in `errors.Refused`


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
    seq: Seq  # goes up by one per delta and over changes of owner; not by announcements
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


class SketchOpen(Message, frozen=True):
    """The sender brings the gradient sketches of an interval: whoever has some of it, or owns what they are of, too."""

    kind: ClassVar[str] = "sketch-open"

    interval: Round  # since the run began; names the seed of the projections
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
    seq: Seq
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


class ExpertSketch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the sender's tokens teach one expert."""

    handle: Handle
    # `to_bytes` of a RowSketch or SignSketch; of no rows it says that none were routed here, as the mean has to know
    rows: bytes


class SlotSketch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Sketches for experts of one slot, all or some."""

    slot: Slot
    epoch: Epoch  # of the lease that the handles are of
    seq: Seq  # of the stand-ins that ran when the rows were made
    experts: Annotated[tuple[ExpertSketch, ...], Meta(min_length=1, max_length=MAX_LAYERS)]

    def __post_init__(self) -> None:
        _check_distinct("handle", [expert.handle for expert in self.experts])


class SketchBatch(Message, frozen=True):
    """A composer's sketches for slots of one owner, over the same tokens. Answered by a SketchReply."""

    kind: ClassVar[str] = "sketch-batch"
    max_bytes: ClassVar[int] = MAX_SKETCH_BYTES

    step: Step  # of the composer, the last that the sketches cover
    tokens: Positive  # that they stand for, whether routed to these experts or not
    steps: Positive  # inner steps that they cover
    slots: Annotated[tuple[SlotSketch, ...], Meta(min_length=1, max_length=MAX_SLOTS)]

    def __post_init__(self) -> None:
        _check_distinct("slot", [sketch.slot for sketch in self.slots])


class SketchReply(Message, frozen=True):
    """What an owner made of a SketchBatch, and how much it can take from now on."""

    kind: ClassVar[str] = "sketch-reply"
    max_bytes: ClassVar[int] = 60_000

    rate: Annotated[float, Meta(ge=0.0, le=1.0)]  # share of its rows that a composer should send
    accepted: Annotated[int, Meta(ge=0, le=MAX_SLOTS)]  # slots of the batch
    refused: Annotated[tuple[tuple[Slot, Reason], ...], Meta(max_length=MAX_REFUSALS)] = ()  # the first ones


class HandleTable(Message, frozen=True):
    """How a slot's experts are called under a new lease: answer to `handles/<slot>/<from_epoch>/<to_epoch>`."""

    kind: ClassVar[str] = "handle-table"

    slot: Slot
    epoch: Epoch  # of the new lease
    entries: Annotated[  # new handles, ascending, each with the expert's position in the former handle order
        tuple[tuple[Handle, Annotated[int, Meta(ge=0, lt=MAX_LAYERS)]], ...],
        Meta(min_length=1, max_length=MAX_LAYERS),
    ]

    def __post_init__(self) -> None:
        handles = [handle for handle, _ in self.entries]
        _check_distinct("handle", handles)
        if handles != sorted(handles):
            raise ValueError("handles are not in order")
        if sorted(position for _, position in self.entries) != list(range(len(handles))):
            raise ValueError("positions are not a permutation")


class AuditedSketch(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sketch as an owner says that it used it."""

    sender: PeerId
    step: Step  # of the sender's SketchBatch
    tokens: Positive  # of that batch
    rows: Annotated[bytes, Meta(max_length=MAX_SKETCH_BYTES)]  # as sent
    past: Annotated[int, Meta(ge=0, le=MAX_AUDITED_PAST)] = 0  # taken at the expert's `standin`, or the n-th in `past`


class AuditedExpert(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one step did to one expert."""

    handle: Handle
    before: Annotated[bytes, Meta(min_length=8)]  # safetensors: masters, optimizer state as `<matrix>.<name>`
    sketches: Annotated[tuple[AuditedSketch, ...], Meta(max_length=MAX_AUDITED_SKETCHES)]  # in the order of use
    after: Annotated[bytes, Meta(min_length=8)]  # safetensors: masters
    standin: bytes  # StandIn.to_bytes(), published when the step was taken
    past: Annotated[tuple[bytes, ...], Meta(max_length=MAX_AUDITED_PAST)] = ()  # earlier ones


class AuditRecord(Message, frozen=True):
    """One step of a slot, so that another peer can take it again: answer to `audit/<slot>/<epoch>/<seed>`."""

    kind: ClassVar[str] = "audit-record"
    max_bytes: ClassVar[int] = 1 << 30

    slot: Slot
    epoch: Epoch
    seq: Seq  # of the stand-ins that were published when the step was taken
    step: Step  # of the owner, by which the learning rate goes
    learning_rate: Annotated[float, Meta(ge=0.0, le=1e6)]
    clip: Annotated[float, Meta(gt=0.0, le=1.0)]  # what the mean gradient was multiplied by
    experts: Annotated[tuple[AuditedExpert, ...], Meta(min_length=1, max_length=MAX_LAYERS)]

    def __post_init__(self) -> None:
        _check_distinct("handle", [expert.handle for expert in self.experts])


class Accusation(Message, frozen=True):
    """The sender has audited an owner and found it to lie. Nobody need believe it: see `auditing.py`."""

    kind: ClassVar[str] = "accusation"
    max_bytes: ClassVar[int] = 1024

    owner: PeerId
    slot: Slot
    epoch: Epoch
    reason: Reason


M = TypeVar("M", bound=Message)

_TYPES: tuple[type[Message], ...] = (
    DeltaBatch, RoundOpen, SketchOpen, ExpertCounts, News, StandInSnapshot, SlotState, FragmentState,
    SketchBatch, SketchReply, HandleTable, AuditRecord, Accusation,
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


def _check_distinct(what: str, values: Collection[int] | Collection[bytes]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"a {what} is listed twice")


def _check_finite(values: Iterable[float]) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError("not finite")
