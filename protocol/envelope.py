"""A signed, typed, bounded container for everything one peer says to others.

On the wire: a msgpack array [kind, sender, payload, signature]. The signature covers the run and the kind as well, so
that bytes signed for one purpose or one run are worthless in another:

    "shoal/1" | len(run_id) | run_id | len(kind) | kind | payload        (lengths: one byte)

Opening checks the size, then the shape, then the signature. The payload stays bytes until all three have passed.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from .errors import Refused
from .identity import SIGNATURE_BYTES, Identity, verify

# kind, peer id, signature and their msgpack headers around the payload
ENVELOPE_OVERHEAD = 192

T = TypeVar("T")
PeerId = Annotated[str, Meta(pattern=r"^12D3KooW[1-9A-HJ-NP-Za-km-z]{44}\Z")]


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signed message. An instance from `open_sealed` has a good signature."""

    kind: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}\Z")]  # what the payload is; decides its type
    sender: PeerId  # who signed
    payload: bytes
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


_decoder = msgspec.msgpack.Decoder(Envelope)
_encoder = msgspec.msgpack.Encoder()


def seal(identity: Identity, run_id: str, kind: str, payload: bytes) -> bytes:
    """Sign `payload` as a message of `kind` in the run and wrap it."""
    signature = identity.sign(_signed_bytes(run_id, kind, payload))
    return _encoder.encode(Envelope(kind, identity.peer_id, payload, signature))


def open_sealed(data: bytes, run_id: str, *, max_bytes: int) -> Envelope:
    """Unwrap a message of this run, of at most `max_bytes` (the envelope included).

    Raises:
        Refused: reason `oversized` or `malformed`.
        BadSignature: not signed by `sender`, or signed for another run or kind.
    """
    if len(data) > max_bytes:
        raise Refused("oversized", f"a message of {len(data)} bytes exceeds the limit of {max_bytes}")
    envelope = decode_payload(_decoder, data, "message")
    verify(envelope.sender, _signed_bytes(run_id, envelope.kind, envelope.payload), envelope.signature)
    return envelope


def decode_payload(decoder: msgspec.msgpack.Decoder[T], data: bytes, what: str) -> T:
    """Decode bytes from a peer into their type. Raises Refused(`malformed`) on anything else; `what` is named in it."""
    try:
        return decoder.decode(data)
    # Bad UTF-8 and deep nesting are not among the errors that msgspec maps to its own.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused("malformed", f"not a {what}: {error}") from error


def _signed_bytes(run_id: str, kind: str, payload: bytes) -> bytes:
    run, what = run_id.encode(), kind.encode()
    return b"".join((b"shoal/1", bytes([len(run)]), run, bytes([len(what)]), what, payload))
