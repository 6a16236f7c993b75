"""Every record of the directory: what it says, its bounds, who may write it, and under which key it lives.

A record travels as a sealed envelope, through the DHT and by gossip alike. It is valid when its envelope's signature is
good, its fields are in bounds, its writer is its subject, and its times are sane. Nobody can put words in another's
mouth; anybody can lie about himself, so nothing here is trusted beyond "that peer said so".

| kind     | key               | subkey              | written by        |
|----------|-------------------|---------------------|-------------------|
| peer     | <run_id>.peers    | peer id             | that peer         |
| lease    | <run_id>.leases   | peer id             | the leases' owner |
| vote     | <run_id>.votes    | <peer id>/<fragment>| the voter         |
| manifest | <run_id>.manifest | "manifest"          | anyone: its hash is in the run id, its founder signed it |

Records are msgpack arrays in field order: a new field or another order is another protocol version.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from ..envelope import ENVELOPE_OVERHEAD, Envelope, PeerId, decode_payload, open_sealed, seal
from ..errors import Refused
from ..identity import SIGNATURE_BYTES, Identity, verify

MAX_SLOTS = 65536
MAX_OWNED = 4096  # slots of one peer: its records list them
MAX_EPOCH = (1 << 48) - 1  # that messages and handles carry: a claim beyond would leave all others speechless
MAX_FRAGMENTS = 256  # of a backbone: as many votes may one identity have in everybody's memory
MAX_MEMBERS = 128  # of a round
MAX_LIFETIME_SECONDS = 600.0  # no record outlives its last renewal by more
MAX_CLOCK_AHEAD_SECONDS = 5.0  # how far in the future a record may have been issued
EXPIRED_GRACE_SECONDS = 10.0  # a record that expired on its way is not an offence
MAX_MANIFEST_BYTES = 65536

_UnixTime = Annotated[float, Meta(ge=0.0, le=1e11)]
_Counter = Annotated[int, Meta(ge=0, le=1 << 53)]
_Slot = Annotated[int, Meta(ge=0, lt=MAX_SLOTS)]
_Finite = Annotated[float, Meta(ge=-1e9, le=1e9)]  # bounds refuse NaN and infinities too
_Multiaddr = Annotated[str, Meta(pattern=r"^/[!-~]{1,255}\Z")]
_Multiaddrs = Annotated[list[_Multiaddr], Meta(max_length=16)]
Role = Literal["bootstrap", "composer", "worker", "observer"]


class Record(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Base of what a peer signs into the directory. Subclasses say their kind and the size of their sealed form."""

    kind: ClassVar[str]
    max_bytes: ClassVar[int]

    issued_at: _UnixTime  # seconds; of two records under one subkey the later issued counts
    expires_at: _UnixTime  # seconds; also the expiration time in the DHT

    def subkey(self, sender: str) -> str:
        """Where `sender`'s record lives under the kind's key. Raises Refused(`wrong-writer`) if it may not write it."""
        raise NotImplementedError


class PeerRecord(Record, frozen=True, kw_only=True):
    """A live peer: what it is, where it listens, how far it is."""

    kind: ClassVar[str] = "peer"
    max_bytes: ClassVar[int] = 32768

    peer_id: PeerId
    role: Role
    phase: Annotated[str, Meta(pattern=r"^[a-z][a-z-]{0,31}\Z")]  # of its lifecycle
    capacity: Annotated[int, Meta(ge=0, le=MAX_SLOTS)]  # slots that it can own
    transport_addrs: _Multiaddrs  # py-libp2p, each ending in /p2p/<peer id>
    dht_addrs: _Multiaddrs  # the Go daemon, likewise
    metrics_url: Annotated[str, Meta(pattern=r"^(https?://[!-~]{1,255})?\Z")]  # empty: not published
    version: Annotated[str, Meta(pattern=r"^[A-Za-z0-9.+_-]{0,64}\Z")]  # of the software
    protocol_version: Annotated[int, Meta(ge=0, le=65535)]
    step: _Counter  # inner steps done
    tokens: _Counter  # trained on since it joined
    tokens_per_second: Annotated[float, Meta(ge=0.0, le=1e12)]
    loss: _Finite  # nats per token, recent mean; 0 before the first step
    slots: Annotated[list[_Slot], Meta(max_length=MAX_OWNED)]  # that it owns, as it sees it
    round: _Counter  # outer rounds committed
    fidelity: _Finite  # mean over its published stand-ins, at most 1; 0 where it has none

    def __post_init__(self) -> None:
        if not all(address.endswith(f"/p2p/{self.peer_id}") for address in (*self.transport_addrs, *self.dht_addrs)):
            raise ValueError("an address is another peer's, or nobody's")

    def subkey(self, sender: str) -> str:
        _require_writer(self.peer_id, sender)
        return sender


class Lease(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The claim to own one slot."""

    slot: _Slot
    epoch: Annotated[int, Meta(ge=0, le=MAX_EPOCH)]  # grows by one with every change of owner
    version: _Counter  # owner's step of the last snapshot


class LeaseRecord(Record, frozen=True, kw_only=True):
    """All slots that one owner claims, in one record: renewing one slot or thousands takes one message."""

    kind: ClassVar[str] = "lease"
    max_bytes: ClassVar[int] = 98304

    owner: PeerId
    leases: Annotated[list[Lease], Meta(max_length=MAX_OWNED)]

    def __post_init__(self) -> None:
        if len({lease.slot for lease in self.leases}) < len(self.leases):
            raise ValueError("a slot is listed twice")

    def subkey(self, sender: str) -> str:
        _require_writer(self.owner, sender)
        return sender


class VoteRecord(Record, frozen=True, kw_only=True):
    """What a member of an outer round holds after it. The voter is the envelope's sender."""

    kind: ClassVar[str] = "vote"
    max_bytes: ClassVar[int] = 8192

    round: _Counter
    fragment: Annotated[int, Meta(ge=0, lt=MAX_FRAGMENTS)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]  # sha256 of the fragment and its momentum
    members: Annotated[list[PeerId], Meta(max_length=MAX_MEMBERS)]  # who contributed

    def subkey(self, sender: str) -> str:
        return f"{sender}/{self.fragment}"


class ManifestRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The run's manifest with its founder's signature. Needs no envelope: the run id commits to the bytes."""

    manifest: Annotated[bytes, Meta(min_length=2, max_length=MAX_MANIFEST_BYTES)]  # canonical
    signature: Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class _Founded(msgspec.Struct):
    """What the directory reads of a manifest, whatever else is in it."""

    founder: PeerId


RECORD_TYPES: dict[str, type[Record]] = {record.kind: record for record in (PeerRecord, LeaseRecord, VoteRecord)}
MAX_RECORD_BYTES = max(record.max_bytes for record in RECORD_TYPES.values())
MANIFEST_SUBKEY = "manifest"
MAX_SIGNED_MANIFEST_BYTES = MAX_MANIFEST_BYTES + SIGNATURE_BYTES + 16

_encoder = msgspec.msgpack.Encoder()
_decoders = {kind: msgspec.msgpack.Decoder(record) for kind, record in RECORD_TYPES.items()}
_manifest_decoder = msgspec.msgpack.Decoder(ManifestRecord)
_founder_decoder = msgspec.msgpack.Decoder(_Founded)


def record_key(run_id: str, kind: str) -> str:
    """The DHT key that holds all records of a kind (`peer`, `lease`, `vote` or `manifest`) of a run."""
    return f"{run_id}.{kind}" if kind == "manifest" else f"{run_id}.{kind}s"


def seal_record(identity: Identity, run_id: str, record: Record) -> bytes:
    """Sign a record of one's own.

    Raises Refused, like any reader would, where the record breaks a rule: a mistake of ours shows here, not as silence.
    """
    payload = _encoder.encode(record)
    _decode(record.kind, payload)
    record.subkey(identity.peer_id)
    if len(payload) + ENVELOPE_OVERHEAD > record.max_bytes:
        raise Refused("oversized", f"a {record.kind} record of {len(payload)} bytes exceeds {record.max_bytes}")
    return seal(identity, run_id, record.kind, payload)


def open_record(
    data: bytes, run_id: str, *, now: float, kind: str | None = None, subkey: str | None = None
) -> tuple[Envelope, Record]:
    """`verify_record`, then `check_times`. `now` is the own clock, unix seconds."""
    envelope, record = verify_record(data, run_id, kind=kind, subkey=subkey)
    check_times(record, now)
    return envelope, record


def verify_record(
    data: bytes, run_id: str, *, kind: str | None = None, subkey: str | None = None
) -> tuple[Envelope, Record]:
    """Verify and decode a sealed record, whatever its times are.

    Args:
        data: as it came from a peer.
        kind: the only acceptable kind, if given (which DHT key it was found under).
        subkey: the only acceptable subkey, if given.

    Raises:
        Refused: `oversized`, `malformed`, `wrong-kind`, `wrong-writer` or `wrong-subkey`.
        BadSignature: forged, or signed for another run.
    """
    limit = MAX_RECORD_BYTES if kind is None else RECORD_TYPES[kind].max_bytes
    envelope = open_sealed(data, run_id, max_bytes=limit)
    if envelope.kind not in RECORD_TYPES or kind not in (None, envelope.kind):
        raise Refused("wrong-kind", f"a {envelope.kind} message stands where a {kind or 'known'} record belongs")
    if len(data) > RECORD_TYPES[envelope.kind].max_bytes:
        raise Refused("oversized", f"a {envelope.kind} record has {len(data)} bytes")
    record = _decode(envelope.kind, envelope.payload)
    place = record.subkey(envelope.sender)
    if subkey not in (None, place):
        raise Refused("wrong-subkey", f"{envelope.sender}'s {envelope.kind} record stands under another subkey")
    return envelope, record


def open_manifest(data: bytes, run_id: str) -> ManifestRecord:
    """Decode a signed manifest whose hash is the run's and whose signature is the founder's that it names.

    The signature counts here too: with a wrong one the right bytes would take the manifest's place in the DHT, and
    nobody could join.

    Raises:
        Refused: `oversized`, `malformed`, or `wrong-hash`.
        BadSignature: its founder has not signed it.
    """
    record = open_signed_manifest(data)
    if not run_id.endswith("-" + manifest_digest(record.manifest)):
        raise Refused("wrong-hash", f"the manifest's hash {manifest_digest(record.manifest)} is not in {run_id!r}")
    founder = decode_payload(_founder_decoder, record.manifest, "manifest").founder
    verify(founder, manifest_to_sign(record.manifest), record.signature)
    return record


def open_signed_manifest(data: bytes) -> ManifestRecord:
    """Decode a signed manifest of any run, unverified. Raises Refused: `oversized` or `malformed`."""
    if len(data) > MAX_SIGNED_MANIFEST_BYTES:
        raise Refused("oversized", f"a manifest of {len(data)} bytes exceeds {MAX_SIGNED_MANIFEST_BYTES}")
    return decode_payload(_manifest_decoder, data, "signed manifest")


def seal_manifest(manifest: bytes, signature: bytes) -> bytes:
    """The wire form of a signed manifest."""
    return _encoder.encode(ManifestRecord(manifest, signature))


def manifest_to_sign(manifest: bytes) -> bytes:
    """What a founder signs of a manifest's canonical bytes."""
    return b"shoal/1 manifest" + manifest


def manifest_digest(manifest: bytes) -> str:
    """The 12 hex digits of the sha256 of a manifest's canonical bytes that stand in the run id."""
    return hashlib.sha256(manifest).hexdigest()[:12]


def _decode(kind: str, payload: bytes) -> Record:
    return decode_payload(_decoders[kind], payload, f"{kind} record")


def _require_writer(subject: str, sender: str) -> None:
    if subject != sender:
        raise Refused("wrong-writer", f"{sender} may not write a record about {subject}")


def check_times(record: Record, now: float) -> None:
    """Raises Refused: `expired`, `future` or `too-long`."""
    if record.issued_at > now + MAX_CLOCK_AHEAD_SECONDS:
        raise Refused("future", f"issued {record.issued_at - now:.1f} s ahead of this machine's clock")
    if not 0 < record.expires_at - record.issued_at <= MAX_LIFETIME_SECONDS:
        raise Refused("too-long", f"a lifetime of {record.expires_at - record.issued_at:.1f} s is out of bounds")
    if record.expires_at < now - EXPIRED_GRACE_SECONDS:
        raise Refused("expired", f"expired {now - record.expires_at:.1f} s ago")
