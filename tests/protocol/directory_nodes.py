"""What the directory's tests share: two nodes, a rogue, and records to put there."""

import time
from dataclasses import dataclass
from typing import Any

import msgspec
from shoal.protocol.directory.dht import RunDHT
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import (
    Lease,
    LeaseRecord,
    PeerRecord,
    VoteRecord,
    manifest_digest,
    manifest_to_sign,
    seal_manifest,
)
from shoal.protocol.identity import Identity

FOUNDER = Identity.generate()
MANIFEST = msgspec.msgpack.encode({"founder": FOUNDER.peer_id, "name": "demo", "note": "x" * 200})
RUN = f"demo-{manifest_digest(MANIFEST)}"


def signed_manifest(manifest: bytes = MANIFEST, founder: Identity = FOUNDER) -> bytes:
    return seal_manifest(manifest, founder.sign(manifest_to_sign(manifest)))


@dataclass
class Node:
    dht: RunDHT
    identity: Identity

    def directory(self, **options: Any) -> Directory:
        return Directory(self.dht, self.identity, RUN, **options)


def peer_record(identity: Identity, **changes: Any) -> PeerRecord:
    now = time.time()
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "role": "worker",
        "phase": "training",
        "capacity": 2,
        "transport_addrs": [],
        "dht_addrs": [],
        "metrics_url": "",
        "version": "0.1.0",
        "protocol_version": 1,
        "step": 0,
        "tokens": 0,
        "tokens_per_second": 0.0,
        "loss": 0.0,
        "slots": [],
        "round": 0,
        "fidelity": 0.0,
        "issued_at": now,
        "expires_at": now + 60,
    }
    return PeerRecord(**(fields | changes))


def leases(identity: Identity, *claims: tuple[int, int], issued: float, lasts: float = 20.0) -> LeaseRecord:
    return LeaseRecord(
        owner=identity.peer_id,
        leases=[Lease(slot, epoch, 0) for slot, epoch in claims],
        issued_at=issued,
        expires_at=issued + lasts,
    )


def vote(fragment: int, issued: float, digest: bytes = bytes(32)) -> VoteRecord:
    return VoteRecord(round=1, fragment=fragment, digest=digest, members=[], issued_at=issued, expires_at=issued + 60)
