"""What a peer, and this process, may take at most. One frozen object for both sides of the IPC."""

from __future__ import annotations

from dataclasses import dataclass, fields

MAX_PUBLISH_BYTES = 900_000
"""Largest gossip payload. py-libp2p refuses RPCs over 1 MiB; the rest is signature, key, topic and sender record."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the transport. Every field must be positive."""

    max_served_streams: int = 32
    """Streams served at once in total; one more is answered `busy`."""
    max_served_streams_per_peer: int = 4
    """Streams served at once to one peer; one more is answered `busy`."""
    max_request_bytes: int = 4096
    """Largest fetch request, and largest opening of a call."""
    max_meta_bytes: int = 65_536
    """Largest `Resource.meta`."""
    chunk_bytes: int = 262_144
    """Bytes of a resource moved at a time."""
    read_deadline_seconds: float = 10.0
    """A peer must make progress on a stream, in either direction, within this time."""
    serve_deadline_seconds: float = 30.0
    """Our own handler must answer within this time, else the peer is told `busy`."""
    max_fetches: int = 16
    """Fetches under way at once; further calls wait for a turn (inside their own deadline)."""
    max_fetches_per_peer: int = 4
    """The same from one peer, which serves no more: one that sends slowly must not hold up fetches from others."""
    min_fetch_bytes_per_second: int = 16_384
    """What we fetch may take as much longer than its deadline as it would at this rate."""
    min_served_bytes_per_second: int = 16_384
    """Who reads what we serve more slowly is cut off, as it holds its memory all the while."""
    max_call_bytes: int = 64 * 1024 * 1024
    """Largest body of a call, either way; a larger one is refused before a byte of it is read."""
    max_reply_bytes: int = 65_536
    """Largest reply to a call."""
    max_calls: int = 16
    """Our calls under way at once; further ones wait for a turn (inside their own deadline)."""
    max_received_calls: int = 16
    """Peers' calls under way at once in total; one more is answered `busy`."""
    max_received_calls_per_peer: int = 2
    """Calls of one peer under way at once; one more is answered `busy`."""
    max_received_call_bytes: int = 128 * 1024 * 1024
    """Bytes of peers' bodies held at once, those on their way included, at most `max_call_bytes` of them from one peer;
    a call that finds no room is answered `busy`."""
    min_call_bytes_per_second: int = 262_144
    """A body that comes slower is cut off, as it holds its memory all the while."""
    idle_stream_seconds: float = 15.0
    """A stream whose call has ended is kept for the next one so long by the caller, and twice as long by the answerer,
    which keeps at most `max_received_calls_per_peer` of one peer."""
    answer_deadline_seconds: float = 30.0
    """Our own handler must answer a call within this time, else the peer is told `busy`."""
    gossip_queue_messages: int = 1024
    """Received messages kept per topic while the handler is slow; then the oldest is dropped and counted."""
    gossip_queue_bytes: int = 64 * 1024 * 1024
    """The same in bytes."""
    gossip_window: int = 32
    """Received messages per topic handed to the handler before it must have finished the first of them."""
    peer_queue_messages: int = 4096
    """Outgoing gossip waiting for one neighbour; then dropped for that neighbour and counted."""
    peer_queue_bytes: int = 32 * 1024 * 1024
    """The same in bytes."""
    publish_window: int = 32
    """`publish` calls under way at once; further calls wait."""
    max_connections: int = 256
    """Open connections. A quarter is kept for peers that this one dials."""
    dial_seconds: float = 10.0
    """Per address, TCP and both handshakes."""
    redial_max_seconds: float = 15.0
    """Longest pause between two attempts to reach a peer that was lost."""
    start_seconds: float = 180.0
    """The host process must be listening within this time. It takes a second or two, and a minute where others have
    most of the machine: volunteers run peers at the lowest priority."""
    silence_seconds: float = 20.0
    """A host process that has said nothing for this long (it reports every second) is killed and restarted."""
    restarts_per_minute: int = 5
    """More restarts than this within a minute are fatal."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")
        if self.chunk_bytes > 1_000_000:
            raise ValueError("chunk_bytes must fit an IPC frame: at most 1,000,000")
        if self.max_meta_bytes > 1_000_000:
            raise ValueError("max_meta_bytes must fit an IPC frame: at most 1,000,000")
        if self.max_reply_bytes > 1_000_000:
            raise ValueError("max_reply_bytes must fit an IPC frame: at most 1,000,000")
