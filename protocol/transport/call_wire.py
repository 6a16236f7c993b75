"""The stream protocol `/shoal/call/1`: requests with a body and one reply each, one after another on a stream.

    caller:    4 bytes length | msgpack Opening
    answerer:  4 bytes length | msgpack Go or Refusal
    caller:    size raw bytes                                    only after Go: a refused body costs nobody its bytes
    answerer:  4 bytes length | msgpack Reply or Refusal         then again from the top, or either closes

A refusal instead of Go is the stream's end. To open a stream costs as much as two calls on it, and two round trips:
callers keep streams for some seconds. Whoever finds one ended before Go may call again on another one, if there was a
body, as nothing can have been handled.

The answerer has reserved the body's memory before it says Go, which costs a call one round trip. Sending the body
unasked was rejected: 64 MiB would be on their way to a peer that is busy. Noise authenticates every byte as the
caller's; sha256 over the body covers the way from one trainer to the other, its host processes included.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import Annotated

import msgspec

from .wire import DIGEST_BYTES, Size

PROTOCOL = "/shoal/call/1"
MAX_CALL_NAME = 128
REPLY_OVERHEAD_BYTES = 16  # of a Reply besides its body


class CallReason(StrEnum):
    """Why the transport, rather than the handler, refused a call."""

    BUSY = "busy"
    """The answerer is at a limit, or its handler did not answer in time; call again later."""
    TOO_LARGE = "too-large"
    """The body is larger than the answerer takes."""
    NO_HANDLER = "no-handler"
    """Nobody there answers calls (of this run)."""
    DIGEST = "digest"
    """The body that arrived is not the one that was announced."""
    FAILED = "failed"
    """The handler failed on the call: a bug there."""
    GARBAGE = "garbage"
    """The answer broke the protocol."""
    UNKNOWN_PROTOCOL = "unknown-protocol"
    """The peer does not speak `/shoal/call/1`."""


class Opening(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run_id: Annotated[str, msgspec.Meta(max_length=128)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CALL_NAME)]  # what is called
    size: Size  # bytes of the body; bounded by Limits.max_call_bytes
    digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]  # sha256 of the body


class Go(msgspec.Struct, frozen=True, tag="g", array_like=True, forbid_unknown_fields=True):
    """Send the body."""


class Reply(msgspec.Struct, frozen=True, tag="a", array_like=True, forbid_unknown_fields=True):
    body: bytes  # bounded by Limits.max_reply_bytes through the frame's length


class Refusal(msgspec.Struct, frozen=True, tag="r", array_like=True, forbid_unknown_fields=True):
    """The end of the call."""

    reason: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9_-]{1,64}\Z")]  # a CallReason, or the handler's own


_encoder = msgspec.msgpack.Encoder()
_openings = msgspec.msgpack.Decoder(Opening)
_permissions: msgspec.msgpack.Decoder[Go | Refusal] = msgspec.msgpack.Decoder(Go | Refusal)
_outcomes: msgspec.msgpack.Decoder[Reply | Refusal] = msgspec.msgpack.Decoder(Reply | Refusal)


def pack(message: Opening | Go | Reply | Refusal) -> bytes:
    body = _encoder.encode(message)
    return struct.pack(">I", len(body)) + body


def unpack_opening(body: bytes) -> Opening:
    """Raises ValueError (msgspec's are) on anything malformed."""
    return _openings.decode(body)


def unpack_permission(body: bytes) -> Go | Refusal:
    """The answer to an Opening. Raises ValueError on anything malformed."""
    return _permissions.decode(body)


def unpack_outcome(body: bytes) -> Reply | Refusal:
    """The answer to a body. Raises ValueError on anything malformed."""
    return _outcomes.decode(body)


def is_reason(reason: str) -> bool:
    """Whether a Refusal can carry it."""
    try:
        _outcomes.decode(_encoder.encode(Refusal(reason)))
    except msgspec.ValidationError:
        return False
    return True
