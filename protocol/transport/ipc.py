"""Typed frames between the trainer and the py-libp2p host process, over one socket pair.

    4 bytes, big-endian length | msgpack of one frame (tagged by its type)

Both ends come from one installation, so frames carry no version. Whatever grows with a peer's wishes is paced by a
window (gossip by `GossipTaken`, served data by `ServePull`, bodies of calls by `CallPull`, publishes, fetches and calls
by `Limits`), the rest by the socket itself; neither side ever waits for the other while it reads, so the pair cannot
deadlock.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from .limits import Limits

MAX_FRAME_BYTES = 2 * 1024 * 1024
MAX_HEAD_BYTES = 65_536  # of a call's body, that go with it unasked: most calls have no more
_LENGTH = struct.Struct(">I")


class Frame(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all frames."""


# --- trainer to host ----------------------------------------------------------------------------------------------


class Start(Frame, frozen=True):
    """First frame. `peers` and `topics` are what an earlier host process had."""

    identity_path: str
    run_id: str
    listen_host: str
    listen_port: int  # 0: any
    limits: Limits
    parent_pid: int
    peers: list[list[str]]  # multiaddrs per peer
    topics: list[str]
    pace_folder: str = ""  # of the peer's buckets; empty: nothing is limited
    rate_up: float | None = None  # bytes per second
    rate_down: float | None = None


class Connect(Frame, frozen=True):
    """Dial, and keep connected. Answered by Done."""

    id: int
    addrs: list[str]


class Disconnect(Frame, frozen=True):
    """Hang up and stop redialling. Answered by Done."""

    id: int
    peer_id: str


class Publish(Frame, frozen=True):
    """Answered by Done when the message stands in its neighbours' queues."""

    id: int
    topic: str
    data: bytes


class Subscribe(Frame, frozen=True):
    """Answered by Done."""

    id: int
    topic: str


class GossipTaken(Frame, frozen=True):
    """The handler has finished one message of this topic."""

    topic: str


class FetchStart(Frame, frozen=True):
    """Answered by FetchHeader, FetchData and one FetchEnd."""

    id: int
    addrs: list[str]
    resource: str
    offset: int  # bytes the caller holds already
    digest: bytes  # of the resource they belong to; empty at offset 0
    max_bytes: int


class FetchCancel(Frame, frozen=True):
    """The caller has left."""

    id: int


class ServeOffer(Frame, frozen=True):
    """Answer to ServeRequest."""

    id: int
    size: int
    digest: bytes
    meta: bytes


class ServeRefuse(Frame, frozen=True):
    """Answer to ServeRequest: `reason` is a wire.Reason."""

    id: int
    reason: str


class ServeChunk(Frame, frozen=True):
    """Answer to ServePull."""

    id: int
    data: bytes


class CallStart(Frame, frozen=True):
    """Answered by CallPull for what is beyond `head`, and one CallEnd."""

    id: int
    addrs: list[str]
    name: str
    size: int  # bytes of the body
    digest: bytes  # sha256 of the body
    head: bytes  # of the body, up to MAX_HEAD_BYTES


class CallChunk(Frame, frozen=True):
    """Answer to CallPull."""

    id: int
    data: bytes


class CallCancel(Frame, frozen=True):
    """The caller has left."""

    id: int


class CallAccept(Frame, frozen=True):
    """Answer to CallOpen: send the body."""

    id: int


class CallReply(Frame, frozen=True):
    """Answer to CallWhole; the body is let go."""

    id: int
    body: bytes


class CallRefuse(Frame, frozen=True):
    """Answer to CallOpen or CallWhole: `reason` is a call_wire.CallReason or the handler's own."""

    id: int
    reason: str


class Stop(Frame, frozen=True):
    """Send what is queued, then exit."""


# --- host to trainer ----------------------------------------------------------------------------------------------


class Ready(Frame, frozen=True):
    """The host listens."""

    peer_id: str
    addrs: list[str]


class Failed(Frame, frozen=True):
    """The host could not start."""

    cause: str
    fix: str


class Done(Frame, frozen=True):
    """Answer to a command; `error` is empty on success."""

    id: int
    error: str = ""


class PeerUp(Frame, frozen=True):
    peer_id: str


class PeerDown(Frame, frozen=True):
    peer_id: str


class Gossip(Frame, frozen=True):
    topic: str
    sender: str  # peer id whose signature py-libp2p checked
    data: bytes


class FetchHeader(Frame, frozen=True):
    id: int
    size: int
    digest: bytes
    meta: bytes
    offset: int  # where the data that follows belongs: what was asked for, or 0 if the resource has changed


class FetchData(Frame, frozen=True):
    id: int
    data: bytes


class FetchEnd(Frame, frozen=True):
    """`reason` is empty when all bytes came, else a wire.Reason."""

    id: int
    reason: str
    cause: str


class ServeRequest(Frame, frozen=True):
    """A peer wants a resource."""

    id: int
    peer_id: str
    resource: str


class ServePull(Frame, frozen=True):
    id: int
    offset: int
    length: int


class ServeEnd(Frame, frozen=True):
    """The stream is over; the resource can be let go."""

    id: int


class CallPull(Frame, frozen=True):
    id: int
    offset: int
    length: int


class CallEnd(Frame, frozen=True):
    """How our own call ended: with `cause` empty by the reply, with `refused` set by a refusal, else without a word."""

    id: int
    reply: bytes = b""
    refused: str = ""  # the reason
    cause: str = ""


class CallOpen(Frame, frozen=True):
    """A peer calls; room for the body is reserved. Answered by CallAccept or CallRefuse."""

    id: int
    peer_id: str
    name: str
    size: int
    digest: bytes


class CallData(Frame, frozen=True):
    """The next bytes of the body."""

    id: int
    data: bytes


class CallWhole(Frame, frozen=True):
    """All of the body has come: this is the rest of it. Answered by CallReply or CallRefuse."""

    id: int
    data: bytes


class CallCut(Frame, frozen=True):
    """The call is over before all of its body came."""

    id: int


class Counters(Frame, frozen=True):
    """Totals since this host process started; sent every second, so that silence means trouble."""

    gossip_bytes_sent: int = 0
    gossip_bytes_received: int = 0
    fetch_bytes_sent: int = 0
    fetch_bytes_received: int = 0
    gossip_dropped_in: int = 0  # messages: our handler was too slow
    gossip_dropped_out: int = 0  # messages times neighbours: a neighbour was too slow
    garbage: int = 0  # messages and streams that broke a rule
    refused_busy: int = 0  # streams we were too busy for
    call_bytes_sent: int = 0  # of our calls
    call_bytes_received: int = 0  # of peers' calls
    calls_cut: int = 0  # peers' calls that broke off, or came too slowly

    def __add__(self, other: Counters) -> Counters:
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return Counters(*(a + b for a, b in pairs))


Command = (
    Start
    | Connect
    | Disconnect
    | Publish
    | Subscribe
    | GossipTaken
    | FetchStart
    | FetchCancel
    | ServeOffer
    | ServeRefuse
    | ServeChunk
    | CallStart
    | CallChunk
    | CallCancel
    | CallAccept
    | CallReply
    | CallRefuse
    | Stop
)
Event = (
    Ready
    | Failed
    | Done
    | PeerUp
    | PeerDown
    | Gossip
    | FetchHeader
    | FetchData
    | FetchEnd
    | ServeRequest
    | ServePull
    | ServeEnd
    | CallPull
    | CallEnd
    | CallOpen
    | CallData
    | CallWhole
    | CallCut
    | Counters
)

_encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def pack(frame: Frame) -> bytes:
    """Length and body. Raises ValueError over MAX_FRAME_BYTES."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(frame, buffer, _LENGTH.size)
    size = len(buffer) - _LENGTH.size
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a {type(frame).__name__} frame of {size} bytes is over {MAX_FRAME_BYTES}")
    _LENGTH.pack_into(buffer, 0, size)
    return bytes(buffer)


class Splitter:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Bodies completed by `data`. Raises ValueError on an oversized length: the channel is out of step for good."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, start)
            if size > MAX_FRAME_BYTES:
                raise ValueError(f"an IPC frame of {size} bytes is over {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + size
            if len(self._buffer) < end:
                break
            body = bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
            start = end
            yield body
        del self._buffer[:start]
