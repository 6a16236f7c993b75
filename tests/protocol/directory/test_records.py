"""Records: bounds, writers, times, and the bytes that all versions of this protocol agree on."""

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from shoal.protocol.directory.records import (
    MAX_EPOCH,
    MAX_FRAGMENTS,
    RECORD_TYPES,
    Lease,
    LeaseRecord,
    PeerRecord,
    Record,
    VoteRecord,
    manifest_digest,
    manifest_to_sign,
    open_manifest,
    open_record,
    record_key,
    seal_manifest,
    seal_record,
)
from shoal.protocol.envelope import seal
from shoal.protocol.errors import BadSignature, Refused
from shoal.protocol.identity import Identity

RUN = "demo-0123456789ab"
NOW = 1_000_000.0
FIXED = Identity(bytes(range(32)))


def peer_record(identity: Identity, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "role": "composer",
        "phase": "training",
        "capacity": 4,
        "transport_addrs": [f"/ip4/1.2.3.4/tcp/4001/p2p/{identity.peer_id}"],
        "dht_addrs": [],
        "metrics_url": "",
        "version": "0.1.0",
        "protocol_version": 1,
        "step": 7,
        "tokens": 8,
        "tokens_per_second": 9.5,
        "loss": 1.25,
        "slots": [0, 3],
        "round": 2,
        "fidelity": 0.5,
        "issued_at": NOW,
        "expires_at": NOW + 30,
    }
    return PeerRecord(**(fields | changes))


def lease_record(identity: Identity, **changes: Any) -> LeaseRecord:
    fields: dict[str, Any] = {
        "owner": identity.peer_id,
        "leases": [Lease(1, 2, 3)],
        "issued_at": NOW,
        "expires_at": NOW + 20,
    }
    return LeaseRecord(**(fields | changes))


def vote_record(identity: Identity, **changes: Any) -> VoteRecord:
    fields: dict[str, Any] = {
        "round": 3,
        "fragment": 1,
        "digest": bytes(32),
        "members": [identity.peer_id],
        "issued_at": NOW,
        "expires_at": NOW + 60,
    }
    return VoteRecord(**(fields | changes))


MAKERS: list[Callable[..., Record]] = [peer_record, lease_record, vote_record]


def unchecked(identity: Identity, record: Record) -> bytes:
    """Sealed as a peer that does not check itself would."""
    return seal(identity, RUN, record.kind, msgspec.msgpack.encode(record))


def refusal(data: bytes, **where: Any) -> str:
    with pytest.raises(Refused) as caught:
        open_record(data, RUN, now=NOW, **where)
    return caught.value.reason


@pytest.mark.parametrize("make", MAKERS)
def test_round_trip(make: Callable[..., Record]) -> None:
    identity = Identity.generate()
    record = make(identity)
    envelope, opened = open_record(seal_record(identity, RUN, record), RUN, now=NOW)
    assert opened == record
    assert envelope.sender == identity.peer_id


@pytest.mark.parametrize(
    ("make", "golden"),
    [
        (
            peer_record,
            "dc0012cb412e848000000000cb412e84bc00000000d934313244334b6f6f574134586f70314a6154334d487877594d6b"
            "436570597376346950566f704d5877437a35694859644266655342a8636f6d706f736572a8747261696e696e670491d9"
            "4e2f6970342f312e322e332e342f7463702f343030312f7032702f313244334b6f6f574134586f70314a6154334d4878"
            "77594d6b436570597376346950566f704d5877437a3569485964426665534290a0a5302e312e30010708cb4023000000"
            "000000cb3ff400000000000092000302cb3fe0000000000000",
        ),
        (
            lease_record,
            "94cb412e848000000000cb412e84a800000000d934313244334b6f6f574134586f70314a6154334d487877594d6b4365"
            "70597376346950566f704d5877437a356948596442666553429193010203",
        ),
        (
            vote_record,
            "96cb412e848000000000cb412e84f8000000000301c42000000000000000000000000000000000000000000000000000"
            "0000000000000091d934313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950566f704d"
            "5877437a35694859644266655342",
        ),
    ],
)
def test_golden_bytes(make: Callable[..., Record], golden: str) -> None:
    assert msgspec.msgpack.encode(make(FIXED)).hex() == golden


def test_every_kind_has_a_maker_here() -> None:
    assert {make(FIXED).kind for make in MAKERS} == set(RECORD_TYPES)


def test_keys_and_subkeys() -> None:
    assert [record_key(RUN, kind) for kind in ("peer", "lease", "vote", "manifest")] == [
        f"{RUN}.peers",
        f"{RUN}.leases",
        f"{RUN}.votes",
        f"{RUN}.manifest",
    ]
    me = FIXED.peer_id
    assert [make(FIXED).subkey(me) for make in MAKERS] == [me, me, f"{me}/1"]


@pytest.mark.parametrize("make", [peer_record, lease_record])
def test_nobody_writes_about_another(make: Callable[..., Record]) -> None:
    liar, victim = Identity.generate(), Identity.generate()
    record = make(victim)
    assert refusal(unchecked(liar, record)) == "wrong-writer"
    with pytest.raises(Refused):
        seal_record(liar, RUN, record)


def test_forged_and_foreign() -> None:
    identity = Identity.generate()
    data = bytearray(seal_record(identity, RUN, peer_record(identity)))
    data[-1] ^= 1
    with pytest.raises(BadSignature):
        open_record(bytes(data), RUN, now=NOW)
    with pytest.raises(BadSignature):
        open_record(seal_record(identity, "demo-ffffffffffff", peer_record(identity)), RUN, now=NOW)


def test_a_record_belongs_under_its_kind_and_subkey() -> None:
    identity, other = Identity.generate(), Identity.generate()
    data = seal_record(identity, RUN, peer_record(identity))
    assert refusal(data, kind="lease") == "wrong-kind"
    assert refusal(data, kind="peer", subkey=other.peer_id) == "wrong-subkey"
    assert refusal(seal(identity, RUN, "news", b"")) == "wrong-kind"
    vote = seal_record(identity, RUN, vote_record(identity))
    assert refusal(vote, kind="vote", subkey=identity.peer_id) == "wrong-subkey"


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ((NOW + 6, NOW + 30), "future"),
        ((NOW, NOW + 601), "too-long"),
        ((NOW, NOW), "too-long"),
        ((NOW, NOW - 1), "too-long"),
        ((NOW - 100, NOW - 11), "expired"),
        ((float("nan"), NOW + 1), "malformed"),
        ((NOW, float("inf")), "malformed"),
        ((-1.0, NOW), "malformed"),
    ],
)
def test_times(make: Callable[..., Record], times: tuple[float, float], reason: str) -> None:
    identity = Identity.generate()
    assert refusal(unchecked(identity, make(identity, issued_at=times[0], expires_at=times[1]))) == reason


@pytest.mark.parametrize("times", [(NOW + 4, NOW + 30), (NOW - 30, NOW - 9), (NOW, NOW + 600)])
def test_times_just_in_bounds(times: tuple[float, float]) -> None:
    identity = Identity.generate()
    open_record(
        seal_record(identity, RUN, peer_record(identity, issued_at=times[0], expires_at=times[1])), RUN, now=NOW
    )


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (peer_record, {"role": "king"}),
        (peer_record, {"phase": "Training"}),
        (peer_record, {"phase": ""}),
        (peer_record, {"capacity": -1}),
        (peer_record, {"transport_addrs": ["1.2.3.4:5"]}),
        (peer_record, {"transport_addrs": ["/ip4/1.2.3.4/tcp/1"] * 17}),
        (peer_record, {"transport_addrs": ["/ip4/1.2.3.4/tcp/1"]}),
        (peer_record, {"transport_addrs": [f"/ip4/1.2.3.4/tcp/1/p2p/{Identity.generate().peer_id}"]}),
        (peer_record, {"dht_addrs": [f"/ip4/1.2.3.4/tcp/1/p2p/{Identity.generate().peer_id}"]}),
        (peer_record, {"dht_addrs": ["/" + "x" * 256]}),
        (peer_record, {"dht_addrs": ["/ip4/1.2.3.4\n"]}),
        (peer_record, {"metrics_url": "javascript:alert(1)"}),
        (peer_record, {"version": "<b>"}),
        (peer_record, {"protocol_version": 65536}),
        (peer_record, {"step": 1 << 54}),
        (peer_record, {"tokens": -1}),
        (peer_record, {"tokens_per_second": float("nan")}),
        (peer_record, {"loss": float("nan")}),
        (peer_record, {"loss": float("inf")}),
        (peer_record, {"fidelity": -float("inf")}),
        (peer_record, {"slots": [65536]}),
        (peer_record, {"slots": [0] * 4097}),
        (peer_record, {"round": True}),
        (lease_record, {"leases": [Lease(1, 2, 3), Lease(1, 3, 3)]}),
        (lease_record, {"leases": [Lease(1, -1, 3)]}),
        (lease_record, {"leases": [Lease(1, MAX_EPOCH + 1, 3)]}),
        (lease_record, {"leases": [Lease(65536, 1, 3)]}),
        (vote_record, {"digest": bytes(31)}),
        (vote_record, {"members": ["QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKrPpY"]}),
        (vote_record, {"fragment": -1}),
        (vote_record, {"fragment": MAX_FRAGMENTS}),
    ],
)
def test_out_of_bounds_is_malformed(make: Callable[..., Record], changes: dict[str, Any]) -> None:
    identity = Identity.generate()
    good = make(identity)
    # Positional, as on the wire: some of these values cannot even be constructed.
    values = [changes.get(name, getattr(good, name)) for name in good.__struct_fields__]
    data = seal(identity, RUN, good.kind, msgspec.msgpack.encode(values))
    assert refusal(data) == "malformed"


@pytest.mark.parametrize("make", MAKERS)
def test_other_field_counts_are_malformed(make: Callable[..., Record]) -> None:
    identity = Identity.generate()
    values = msgspec.msgpack.decode(msgspec.msgpack.encode(make(identity)))
    for wrong in ([*values, 0], values[:-1], []):
        assert refusal(seal(identity, RUN, make(identity).kind, msgspec.msgpack.encode(wrong))) == "malformed"


def test_size_is_bounded_by_kind() -> None:
    identity = Identity.generate()
    padding = secrets.token_bytes(VoteRecord.max_bytes)
    assert refusal(seal(identity, RUN, "vote", padding)) == "oversized"
    assert refusal(seal(identity, RUN, "vote", padding), kind="vote") == "oversized"
    assert refusal(secrets.token_bytes(1 << 20)) == "oversized"


def test_the_largest_legitimate_records_fit() -> None:
    identity = Identity.generate()
    address = "/dns4/" + "x" * 180 + f"/tcp/4001/p2p/{identity.peer_id}"
    assert len(address) <= 256
    peer = peer_record(
        identity, slots=list(range(61440, 65536)), transport_addrs=[address] * 16, dht_addrs=[address] * 16
    )
    lease = lease_record(identity, leases=[Lease(slot, MAX_EPOCH, 1 << 53) for slot in range(61440, 65536)])
    vote = vote_record(identity, members=[Identity.generate().peer_id] * 128)
    for record in (peer, lease, vote):
        assert open_record(seal_record(identity, RUN, record), RUN, now=NOW)[1] == record


def test_a_mistake_of_ours_shows_before_it_is_sent() -> None:
    identity = Identity.generate()
    with pytest.raises(Refused, match="Expected `float`"):
        seal_record(identity, RUN, peer_record(identity, loss=float("nan")))


def test_the_manifest_is_pinned_by_the_run_id() -> None:
    manifest = msgspec.msgpack.encode(
        {"founder": FIXED.peer_id, "protocol_version": 7, "secret": secrets.token_hex(20)}
    )
    run_id = f"demo-{manifest_digest(manifest)}"
    assert manifest_digest(manifest) == hashlib.sha256(manifest).hexdigest()[:12]
    data = seal_manifest(manifest, FIXED.sign(manifest_to_sign(manifest)))
    assert open_manifest(data, run_id).manifest == manifest
    for wrong, reason in [
        (seal_manifest(manifest + b"x", bytes(64)), "wrong-hash"),
        (seal_manifest(manifest, bytes(63)), "malformed"),
        (data + b"x", "malformed"),
        (seal_manifest(bytes(70_000), bytes(64)), "oversized"),
    ]:
        with pytest.raises(Refused) as caught:
            open_manifest(wrong, run_id)
        assert caught.value.reason == reason
    with pytest.raises(BadSignature):
        open_manifest(seal_manifest(manifest, Identity.generate().sign(manifest_to_sign(manifest))), run_id)
    nobodys = msgspec.msgpack.encode({"founder": "somebody"})
    with pytest.raises(Refused, match="founder"):
        open_manifest(seal_manifest(nobodys, bytes(64)), f"demo-{manifest_digest(nobodys)}")
