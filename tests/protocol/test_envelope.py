"""Sealed messages: what opens, what does not, and in which order it is checked."""

import secrets

import msgspec
import pytest
from shoal.protocol import envelope as envelope_module
from shoal.protocol.envelope import ENVELOPE_OVERHEAD, Envelope, open_sealed, seal
from shoal.protocol.errors import BadSignature, Refused, ShoalError
from shoal.protocol.identity import Identity

RUN = "demo-0123456789ab"


def test_round_trip_and_overhead() -> None:
    identity = Identity.generate()
    for size in (0, 1, 100, 70_000):
        payload = secrets.token_bytes(size)
        data = seal(identity, RUN, "a" * 32, payload)
        assert len(data) <= size + ENVELOPE_OVERHEAD
        opened = open_sealed(data, RUN, max_bytes=len(data))
        assert (opened.kind, opened.sender, opened.payload) == ("a" * 32, identity.peer_id, payload)


def test_golden_bytes() -> None:
    assert seal(Identity(bytes(range(32))), "run-0123456789ab", "peer", b"payload").hex() == (
        "94a470656572d934313244334b6f6f574134586f70314a6154334d487877594d6b436570597376346950566f704d5877"
        "437a35694859644266655342c4077061796c6f6164c44019c66f329654406ade47d6abe8f1ff8c66088d9d307ce1f6a5"
        "917ff74ec6be1d6917613b2abb38c1ad2d48a04ed8454e9b37b59fc1508601b5cd3480f93ade0e"
    )


def test_oversized_is_refused_at_the_exact_bound() -> None:
    data = seal(Identity.generate(), RUN, "peer", b"x" * 100)
    with pytest.raises(Refused) as caught:
        open_sealed(data, RUN, max_bytes=len(data) - 1)
    assert caught.value.reason == "oversized"


def test_a_message_for_another_run_or_kind_or_sender_is_forged() -> None:
    identity, other = Identity.generate(), Identity.generate()
    good = msgspec.msgpack.decode(seal(identity, RUN, "peer", b"payload"), type=Envelope)
    for forged in (
        msgspec.structs.replace(good, kind="lease"),
        msgspec.structs.replace(good, sender=other.peer_id),
        msgspec.structs.replace(good, payload=b"payloae"),
        msgspec.structs.replace(good, signature=bytes(64)),
    ):
        with pytest.raises(BadSignature):
            open_sealed(msgspec.msgpack.encode(forged), RUN, max_bytes=1000)
    with pytest.raises(BadSignature):
        open_sealed(msgspec.msgpack.encode(good), "demo-0123456789ac", max_bytes=1000)


def test_bytes_cannot_move_between_the_signed_fields() -> None:
    identity = Identity.generate()
    data = msgspec.msgpack.decode(seal(identity, "run-a", "kind", b"payload"), type=Envelope)
    shifted = msgspec.structs.replace(data, kind="kindp", payload=b"ayload")
    with pytest.raises(BadSignature):
        open_sealed(msgspec.msgpack.encode(shifted), "run-a", max_bytes=1000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x94",
        b"\x91" * 10_000,  # deep nesting
        msgspec.msgpack.encode(["peer", "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB", b"", bytes(63)]),
        msgspec.msgpack.encode(["peer", "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB", b"", bytes(64), 1]),
        msgspec.msgpack.encode(["Peer", "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB", b"", bytes(64)]),
        msgspec.msgpack.encode(["peer", "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKrPpY", b"", bytes(64)]),
        msgspec.msgpack.encode({"kind": "peer"}),
    ],
)
def test_malformed_is_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        open_sealed(data, RUN, max_bytes=100_000)
    assert caught.value.reason == "malformed"


def test_the_payload_of_an_unverified_message_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def refuse(peer_id: str, message: bytes, signature: bytes) -> None:
        seen.append(peer_id)
        raise BadSignature("forged")

    monkeypatch.setattr(envelope_module, "verify", refuse)
    identity = Identity.generate()
    with pytest.raises(BadSignature):
        open_sealed(seal(identity, RUN, "peer", b"\xc1 not msgpack"), RUN, max_bytes=1000)
    assert seen == [identity.peer_id]


def test_random_damage_is_always_a_shoal_error() -> None:
    data = seal(Identity.generate(), RUN, "peer", b"payload")
    for _ in range(500):
        damaged = bytearray(data)
        damaged[secrets.randbelow(len(data))] ^= 1 << secrets.randbelow(8)
        with pytest.raises(ShoalError):
            open_sealed(bytes(damaged), RUN, max_bytes=1000)
