"""The stream protocol `/shoal/fetch/1`: one resource per stream.

    asker:   4 bytes length | msgpack Request
    server:  4 bytes length | msgpack Header or Refusal          Header is followed by size - offset raw bytes, then EOF

Noise authenticates every byte as the server's; sha256 over the whole resource catches what that cannot: a resume that
mixes two versions, and a server that does not hold what it announced.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import Annotated

import msgspec

PROTOCOL = "/shoal/fetch/1"
LENGTH_BYTES = 4
DIGEST_BYTES = 32
MAX_RESOURCE_NAME = 512
_MAX_SIZE = 2**48


class Reason(StrEnum):
    """Why a fetch ended without the resource."""

    NOT_FOUND = "not-found"
    """The server does not hold it (or belongs to another run)."""
    BUSY = "busy"
    """The server is at a limit; ask again later, or someone else."""
    TOO_LARGE = "too-large"
    """The resource is larger than the asker allows."""
    DEADLINE = "deadline"
    """The asker's time ran out."""
    DIGEST = "digest"
    """All bytes came, and are not what the header promised."""
    UNREACHABLE = "unreachable"
    """No address answered."""
    CUT = "cut"
    """The stream broke off, again and again."""
    GARBAGE = "garbage"
    """The answer broke the protocol."""


Digest = Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]
Size = Annotated[int, msgspec.Meta(ge=0, le=_MAX_SIZE)]


class Request(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    run_id: Annotated[str, msgspec.Meta(max_length=128)]
    resource: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_RESOURCE_NAME)]
    offset: Size  # bytes
    digest: Digest  # of the resource those bytes belong to; empty at offset 0


class Header(msgspec.Struct, frozen=True, tag="h", array_like=True, forbid_unknown_fields=True):
    size: Size  # bytes of the whole resource
    offset: Size  # where the bytes that follow begin: the request's offset, or 0 if its digest is not ours
    digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]  # sha256 of the whole
    meta: bytes  # bounded by Limits.max_meta_bytes through the frame's length


class Refusal(msgspec.Struct, frozen=True, tag="r", array_like=True, forbid_unknown_fields=True):
    reason: Reason


_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Header | Refusal] = msgspec.msgpack.Decoder(Header | Refusal)


def pack(message: Request | Header | Refusal) -> bytes:
    body = _encoder.encode(message)
    return struct.pack(">I", len(body)) + body


def body_length(prefix: bytes, limit: int) -> int:
    """Length announced by a frame's first 4 bytes. Raises ValueError beyond `limit`, before anything is read."""
    (length,) = struct.unpack(">I", prefix)
    if not 0 < length <= limit:
        raise ValueError(f"a frame of {length} bytes, allowed are 1 to {limit}")
    return int(length)


def unpack_request(body: bytes) -> Request:
    """Raises ValueError (msgspec's are) on anything malformed."""
    return _requests.decode(body)


def unpack_answer(body: bytes) -> Header | Refusal:
    """Raises ValueError on anything malformed."""
    answer = _answers.decode(body)
    if isinstance(answer, Header) and answer.offset > answer.size:
        raise ValueError(f"offset {answer.offset} lies beyond the size {answer.size}")
    return answer
