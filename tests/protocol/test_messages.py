"""Messages: their bytes are fixed, and what is malformed, too large or not finite is refused."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol import messages, resources
from shoal.protocol.envelope import seal
from shoal.protocol.errors import Refused
from shoal.protocol.identity import Identity
from shoal.protocol.messages import (
    Accusation,
    AuditedExpert,
    AuditedSketch,
    AuditRecord,
    DeltaBatch,
    ExpertCounts,
    ExpertSketch,
    FragmentState,
    HandleTable,
    Message,
    News,
    RoundOpen,
    SketchBatch,
    SketchOpen,
    SketchReply,
    SlotSketch,
    SlotState,
    StandInSnapshot,
    SurrogateDelta,
    batches,
    decode,
    decode_kind,
    encode,
)
from shoal.protocol.resources import Resource, ResourceKind, parse_resource
from shoal.protocol.transport.limits import MAX_PUBLISH_BYTES

DELTA = SurrogateDelta(3, 2, 17, 136, (b"ab", b"c"), bytes(range(16)), (0.5, 0.25))
SNAPSHOT = StandInSnapshot(3, 2, 17, (b"one", b"two"), bytes(range(16)))
SKETCH = SlotSketch(3, 2, 17, (ExpertSketch(b"handle-a", b"rows"), ExpertSketch(b"handle-b", b"")))

PEER = "12D3KooW" + "A" * 44
USED = AuditedSketch(PEER, 130, 512, b"rows", 1)
AUDITED = AuditedExpert(b"handle-a", b"before..", (USED,), b"after...", b"copy", (b"old",))

GOLDEN: list[tuple[Message, str]] = [
    (
        DELTA,
        "97030211cc8892c4026162c40163c410000102030405060708090a0b0c0d0e0f92cb3fe0000000000000cb3fd0000000000000",
    ),
    (
        DeltaBatch((DELTA.announcement(),)),
        "919197030211cc8890c410000102030405060708090a0b0c0d0e0f92cb3fe0000000000000cb3fd0000000000000",
    ),
    (RoundOpen(9, 1, 0, 72), "9409010048"),
    (SketchOpen(300, 72), "92cd012c48"),
    (ExpertCounts(72, ((1, 300), (0, 70000))), "92489292 01cd012c 9200ce00011170".replace(" ", "")),
    (News(b"sealed"), "91c4067365616c6564"),
    (SNAPSHOT, "9503021192c4036f6e65c40374776fc410000102030405060708090a0b0c0d0e0f"),
    (
        SlotState(3, 2, 130, b"8 bytes!", SNAPSHOT),
        "950302cc82c40838206279746573219503021192c4036f6e65c40374776fc410000102030405060708090a0b0c0d0e0f",
    ),
    (
        FragmentState(9, 1, bytes(range(32))),
        "930901c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
    ),
    (
        SketchBatch(136, 512, 4, (SKETCH,)),
        "94cc88cd02000491940302119292c40868616e646c652d61c404726f777392c40868616e646c652d62c400",
    ),
    (SketchReply(0.5, 1, ((4, "stale-epoch"),)), "93cb3fe000000000000001919204ab7374616c652d65706f6368"),
    (
        HandleTable(3, 2, ((b"handle-a", 1), (b"handle-b", 0))),
        "9303029292c40868616e646c652d610192c40868616e646c652d6200",
    ),
    (
        AuditRecord(3, 2, 17, 136, 0.5, 1.0, (AUDITED,)),
        "97030211cc88cb3fe0000000000000cb3ff00000000000009196c40868616e646c652d61c4086265666f72652e2e9195d934"
        "313244334b6f6f57414141414141414141414141414141414141414141414141414141414141414141414141414141414141"
        "4141cc82cd0200c404726f777301c40861667465722e2e2ec404636f707991c4036f6c64",
    ),
    (
        Accusation(PEER, 3, 2, "wrong-update"),
        "94d934313244334b6f6f57414141414141414141414141414141414141414141414141414141414141414141414141414141"
        "41414141410302ac77726f6e672d757064617465",
    ),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=[message.kind for message, _ in GOLDEN])
def test_golden_bytes(message: Message, golden: str) -> None:
    assert encode(message).hex() == golden
    assert decode(bytes.fromhex(golden), type(message)) == message


def test_every_kind_has_golden_bytes() -> None:
    assert set(messages.KINDS) == {message.kind for message, _ in GOLDEN} - {"surrogate-delta"}
    assert all(decode_kind(m.kind, encode(m)) == m for m, _ in GOLDEN if m.kind in messages.KINDS)


def packed(*fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("message", "payload"),
    [
        (RoundOpen, b""),
        (RoundOpen, b"\xc1"),
        (RoundOpen, packed(9, 1, 0)),
        (RoundOpen, packed(9, 1, 0, 72, 5)),
        (RoundOpen, packed(-1, 1, 0, 72)),
        (RoundOpen, packed(9, 1, 0, 1 << 60)),
        (RoundOpen, packed(9, 1, 0, 72.0)),
        (RoundOpen, packed(9, 1, 0, 72) + b"\x00"),
        (SketchOpen, packed(-1, 72)),
        (SketchOpen, packed(1 << 48, 72)),
        (SketchOpen, packed(300, 72, 0)),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"ab", b"c"), bytes(16), (0.5,))),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"ab",), bytes(15), (0.5,))),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"ab",), bytes(16), (math.nan,))),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"ab",), bytes(16), (-math.inf,))),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"ab",), bytes(16), (1.5,))),
        (SurrogateDelta, packed(1 << 16, 2, 17, 136, (b"ab",), bytes(16), ())),
        (SurrogateDelta, packed(3, 2, 17, 136, (b"",) * 513, bytes(16), ())),
        (SurrogateDelta, packed(3, 2, 17, 136, ("text",), bytes(16), ())),
        (DeltaBatch, packed(())),
        (ExpertCounts, packed(1, ((1, 2), (3,)))),
        (ExpertCounts, packed(1, ())),
        (ExpertCounts, packed(1, ((-1,),))),
        (StandInSnapshot, packed(3, 2, 17, (), bytes(16))),
        (FragmentState, packed(9, 1, bytes(16))),
        (AuditRecord, packed(3, 2, 17, 136, 0.5, 1.0, ())),
        (AuditRecord, packed(3, 2, 17, 136, 0.5, 1.0, (AUDITED, AUDITED))),
        (AuditRecord, packed(3, 2, 17, 136, 0.5, 0.0, (AUDITED,))),
        (AuditRecord, packed(3, 2, 17, 136, 0.5, 1.5, (AUDITED,))),
        (AuditRecord, packed(3, 2, 17, 136, math.nan, 1.0, (AUDITED,))),
        (AuditRecord, packed(3, 2, 17, 136, -0.5, 1.0, (AUDITED,))),
        (AuditRecord, packed(3, 2, 17, 136, 0.5, math.inf, (AUDITED,))),
        (Accusation, packed("somebody", 3, 2, "wrong-update")),
        (Accusation, packed(PEER, 3, 2, "Because I say so")),
        (SketchBatch, packed(136, 0, 4, (SKETCH,))),
        (SketchBatch, packed(136, 512, 0, (SKETCH,))),
        (SketchBatch, packed(136, 1 << 48, 4, (SKETCH,))),
        (SketchBatch, packed(136, 512, 4, ())),
        (SketchBatch, packed(136, 512, 4, (SKETCH, SKETCH))),
        (SketchBatch, packed(136, 512, 4, ((3, 2, 17, ()),))),
        (SketchBatch, packed(136, 512, 4, ((3, 2, 17, ((b"handle-a", b""), (b"handle-a", b""))),))),
        (SketchBatch, packed(136, 512, 4, ((3, 2, 17, ((b"handle", b""),)),))),
        (SketchBatch, packed(136, 512, 4, ((3, 2, 17, ((b"handle-a", b""),), 1),))),
        (SketchReply, packed(math.nan, 1, ())),
        (SketchReply, packed(1.5, 1, ())),
        (SketchReply, packed(-0.1, 1, ())),
        (SketchReply, packed(0.5, 1, ((4, "Stale Epoch"),))),
        (SketchReply, packed(0.5, 1, ((4, "stale-epoch"),) * (messages.MAX_REFUSALS + 1))),
        (HandleTable, packed(3, 2, ())),
        (HandleTable, packed(3, 2, ((b"handle-b", 0), (b"handle-a", 1)))),
        (HandleTable, packed(3, 2, ((b"handle-a", 0), (b"handle-a", 1)))),
        (HandleTable, packed(3, 2, ((b"handle-a", 0), (b"handle-b", 0)))),
        (HandleTable, packed(3, 2, ((b"handle-a", 1), (b"handle-b", 2)))),
    ],
)
def test_malformed_payloads_are_refused(message: type[Message], payload: bytes) -> None:
    with pytest.raises(Refused) as refused:
        decode(payload, message)
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize("message", [*messages.KINDS.values(), SurrogateDelta])
@given(data=st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(message: type[Message], data: bytes) -> None:
    try:
        decoded = decode(data, message)
    except Refused:
        return
    assert isinstance(decoded, message)


def test_size_limits_and_unknown_kinds() -> None:
    with pytest.raises(Refused) as refused:
        decode(bytes(2000), FragmentState)
    assert refused.value.reason == "oversized"
    with pytest.raises(ValueError, match="over its limit"):
        encode(DeltaBatch((SurrogateDelta(0, 0, 0, 0, (bytes(1 << 20),), bytes(16)),)))
    sketch = ExpertSketch(b"handle-a", bytes(64 << 20))
    with pytest.raises(ValueError, match="over its limit"):
        encode(SketchBatch(1, 1, 1, (SlotSketch(0, 0, 0, (sketch,)),)))
    with pytest.raises(Refused) as refused:
        decode_kind("gossip", b"")
    assert refused.value.reason == "unknown-kind"


@given(st.lists(st.integers(0, 900), max_size=40))
def test_batches_keep_order_and_fit(sizes: list[int]) -> None:
    deltas = [SurrogateDelta(i, 1, i, i, (random.randbytes(size),), bytes(16), (0.9,)) for i, size in enumerate(sizes)]
    made = list(batches(deltas, max_bytes=700))
    assert all(len(encode(batch)) <= 700 for batch in made)
    sent = [delta for batch in made for delta in batch.deltas]
    assert [(d.slot, d.seq, d.digest) for d in sent] == [(d.slot, d.seq, d.digest) for d in deltas]
    for delta, got in zip(deltas, sent, strict=True):
        assert got == delta or (got == delta.announcement() and len(encode(delta)) > 690)


def test_a_reply_that_lists_as_much_as_it_may_can_be_sent() -> None:
    reply = SketchReply(1 / 3, 65536, ((65535, "r" * 32),) * messages.MAX_REFUSALS)
    assert decode(encode(reply), SketchReply) == reply


def test_a_delta_too_long_for_gossip_is_announced() -> None:
    long = SurrogateDelta(1, 1, 5, 8, (bytes(800_000), bytes(200_000)), bytes(16), (0.9, 0.8))
    (batch,) = batches([DELTA, long])
    assert batch.deltas == (DELTA, long.announcement())
    assert batch.deltas[1].is_announcement


def test_the_fullest_batch_can_be_published_in_its_envelope() -> None:
    spare = messages.MAX_GOSSIP_BYTES - len(encode(DeltaBatch((DELTA,))))
    deltas = [msgspec.structs.replace(DELTA, layers=(bytes(spare - by), b"c")) for by in range(8)]
    fullest = max(len(encode(batch)) for delta in deltas for batch in batches([delta]))
    assert fullest > messages.MAX_GOSSIP_BYTES - 8, "the test does not fill a batch"
    sealed = seal(Identity.generate(), "demo-0123456789ab", DeltaBatch.kind, bytes(fullest))
    assert len(sealed) <= MAX_PUBLISH_BYTES


# Names of resources ---------------------------------------------------------------------------------------------------


def test_resource_names() -> None:
    names = [
        resources.manifest(),
        resources.backbone(0),
        resources.standin(17),
        resources.snapshot(65535),
        resources.handover(3),
        resources.rebuilt(3),
        resources.handle_key(),
        resources.handles(3, 0, (1 << 48) - 1),
        resources.audit(3, 2, 1),
    ]
    assert names == ["manifest", "backbone/0", "standin/17", "snapshot/65535", "handover/3",
                     "rebuilt/3", "handle-key", "handles/3/0/281474976710655", "audit/3/2/1"]  # fmt: skip
    assert [parse_resource(name).name for name in names] == names
    assert parse_resource("standin/17") == Resource(ResourceKind.STANDIN, 17)
    assert parse_resource("handles/3/1/2") == Resource(ResourceKind.HANDLES, 3, (1, 2))


@pytest.mark.parametrize(
    "name",
    ["", "manifest/0", "standin", "standin/", "standin/-1", "standin/017", "standin/65536", "standin/1/2", "secret/1",
     "standin/1\n", "standin/٣", "../identity", "STANDIN/1", "handle-key/0", "handle_key", "rebuilt", "rebuilt/65536",
     "handles", "handles/3", "handles/3/1", "handles/3/2/1", "handles/3/01/2", "handles/3/1/2/3", "handles/65536/1/2",
     "handles/3/0/281474976710656", "rebuilt/3/1/2", "handles/3//2", "handles//1/2",
     "audit/3", "audit/3/1", "audit", "audit/3/1/281474976710656", "audit/3/281474976710656/1", "audit/65536/1/1"],
)  # fmt: skip
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_resource(name)
    assert refused.value.reason == "unknown-resource"
