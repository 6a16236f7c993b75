"""The formats of the data plane, without processes."""

import contextlib
import random
import struct

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.transport import ipc, wire
from shoal.protocol.transport.inbox import GossipCounts, Inbox
from shoal.protocol.transport.limits import Limits
from shoal.protocol.transport.patience import Patience

GOLDEN = [
    (wire.Request("run", "snapshot/3", 5, bytes(2)), "00000015" + "94a372756eaa736e617073686f742f3305c4020000"),
    (wire.Header(300, 5, bytes(range(32)), b"m"), None),
    (wire.Refusal(wire.Reason.BUSY), "00000008" + "92a172a462757379"),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN)
def test_golden_bytes(message: wire.Request | wire.Header | wire.Refusal, golden: str | None) -> None:
    expected = golden or "0000002c" + "95a168cd012c05c420" + bytes(range(32)).hex() + "c4016d"
    assert wire.pack(message).hex() == expected
    body = bytes.fromhex(expected)[4:]
    decoded = wire.unpack_request(body) if isinstance(message, wire.Request) else wire.unpack_answer(body)
    assert decoded == message


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode(["run", "", 0, b""]),
        msgspec.msgpack.encode(["run", "x" * 513, 0, b""]),
        msgspec.msgpack.encode(["run", "x", -1, b""]),
        msgspec.msgpack.encode(["run", "x", 2**60, b""]),
        msgspec.msgpack.encode(["run", "x", 0, bytes(33)]),
        msgspec.msgpack.encode(["run", "x", 0, b"", "more"]),
        msgspec.msgpack.encode(["h", 5, 6, bytes(32), b""]),
        msgspec.msgpack.encode(["h", 5, 0, bytes(31), b""]),
        msgspec.msgpack.encode(["r", "because"]),
        b"",
    ],
)
def test_out_of_bounds_is_refused(body: bytes) -> None:
    for unpack in (wire.unpack_request, wire.unpack_answer):
        with pytest.raises((msgspec.DecodeError, ValueError)):
            unpack(body)


@given(st.binary(max_size=300))
def test_garbage_is_a_value_error(body: bytes) -> None:
    for unpack in (wire.unpack_request, wire.unpack_answer):
        with contextlib.suppress(ValueError):
            unpack(body)


def test_a_length_is_checked_before_anything_is_read() -> None:
    assert wire.body_length(struct.pack(">I", 4096), 4096) == 4096
    for length in (0, 4097, 2**32 - 1):
        with pytest.raises(ValueError, match="bytes"):
            wire.body_length(struct.pack(">I", length), 4096)


@given(st.lists(st.binary(max_size=2000), max_size=20), st.integers())
def test_frames_survive_any_cut(payloads: list[bytes], seed: int) -> None:
    frames = [ipc.Publish(i, "topic", data) for i, data in enumerate(payloads)]
    stream = b"".join(ipc.pack(frame) for frame in frames)
    splitter, rng, found = ipc.Splitter(), random.Random(seed), []
    while stream:
        cut = rng.randint(1, 3000)
        found += [ipc.command_decoder.decode(body) for body in splitter.feed(stream[:cut])]
        stream = stream[cut:]
    assert found == frames


def test_ipc_frames_are_bounded() -> None:
    with pytest.raises(ValueError, match="over"):
        ipc.pack(ipc.Publish(1, "topic", bytes(ipc.MAX_FRAME_BYTES)))
    with pytest.raises(ValueError, match="over"):
        list(ipc.Splitter().feed(struct.pack(">I", ipc.MAX_FRAME_BYTES + 1)))


@pytest.mark.parametrize("field", ["chunk_bytes", "dial_seconds", "max_served_streams"])
def test_limits_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})


def test_an_inbox_is_bounded_in_bytes_and_paced_by_its_window() -> None:
    counts = GossipCounts()
    inbox = Inbox("topic", Limits(gossip_queue_bytes=100, gossip_window=3), counts)
    sent: list[ipc.Frame] = []

    async def scenario() -> None:
        async def send(frame: ipc.Frame) -> None:
            sent.append(frame)

        for i in range(20):
            inbox.put("peer", bytes([i]) * 10)
        assert counts.dropped_in == 10
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inbox.deliver, send)
            for expected in (3, 4, 5):
                await trio.testing.wait_all_tasks_blocked()
                assert len(sent) == expected
                inbox.taken()
            nursery.cancel_scope.cancel()
        assert sent[0] == ipc.Gossip("topic", "peer", bytes([10]) * 10)

    trio.run(scenario)


def test_patience_is_used_up_by_slow_reading_and_never_saved_up() -> None:
    patience = Patience(30.0, 1000)
    patience.took(10_000_000, 1.0)
    assert patience.left == 30.0, "who has read fast is waited for no longer"
    for _ in range(100):
        patience.took(5000, 5.0)
    assert patience.left == 30.0
    patience.took(5000, 20.0)
    assert patience.left == 15.0
    patience.took(1000, 17.0)
    assert patience.left == -1.0
