"""The directory over real DHT nodes on loopback: what is stored, and what is refused and counted."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import hivemind
import msgspec
import pytest
from directory_nodes import MANIFEST, RUN, Node, leases, peer_record, signed_manifest, vote
from shoal.protocol.directory.dht import refusals
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import (
    MANIFEST_SUBKEY,
    Record,
    VoteRecord,
    record_key,
    seal_manifest,
    seal_record,
)
from shoal.protocol.envelope import seal
from shoal.protocol.errors import BadSignature, Refused
from shoal.protocol.identity import Identity


def test_what_one_puts_the_other_reads(nodes: list[Node]) -> None:
    async def scenario() -> None:
        first, second = (node.directory() for node in nodes)
        me, now = nodes[0].identity, time.time()
        await first.put(peer_record(me, step=7))
        await first.put(leases(me, (0, 1), (3, 5), issued=now))
        await first.put(vote(0, now, b"a" * 32))
        await first.put(vote(1, now, b"b" * 32))
        view = await second.read()
        assert view.peers[me.peer_id].step == 7
        assert {slot: (claim.owner, claim.epoch) for slot, claim in view.leases.items()} == {
            0: (me.peer_id, 1),
            3: (me.peer_id, 5),
        }
        assert {fragment: votes[me.peer_id].digest for fragment, votes in view.votes.items()} == {
            0: b"a" * 32,
            1: b"b" * 32,
        }
        assert view.peers == (await first.read()).peers
        assert not first.refusals
        assert not second.refusals
        assert not first.failures
        assert not second.failures

        await first.put(peer_record(me, step=8))
        assert (await second.read()).peers[me.peer_id].step == 8

    asyncio.run(scenario())


def test_the_manifest_travels_and_only_the_right_one(nodes: list[Node], rogue: hivemind.DHT) -> None:
    async def scenario() -> None:
        first, second = (node.directory() for node in nodes)
        assert await second.manifest() is None
        sealed = signed_manifest()
        with pytest.raises(Refused):
            await first.put_manifest(signed_manifest(MANIFEST + b"x"))
        key = record_key(RUN, "manifest")
        for bad, subkey in ((signed_manifest(b"other"), MANIFEST_SUBKEY), (sealed, "elsewhere")):
            assert not rogue.store(key, bad, time.time() + 500, subkey=subkey, exclude_self=True)
        assert not rogue.store(key, b"no subkey", time.time() + 500, exclude_self=True)
        await first.put_manifest(sealed)
        assert await second.manifest() == sealed

    before = sum((refusals(node.dht) for node in nodes), start=type(refusals(nodes[0].dht))())
    asyncio.run(scenario())
    counted = sum((refusals(node.dht) for node in nodes), start=type(before)()) - before
    assert counted["wrong-hash"] >= 1
    assert counted["wrong-subkey"] >= 1
    assert counted["malformed"] >= 1


def test_the_manifest_with_another_signature_does_not_take_its_place(nodes: list[Node], rogue: hivemind.DHT) -> None:
    """Whoever stores for longest wins in a DHT: nobody could join a run whose manifest is signed by nobody."""

    async def scenario() -> None:
        first, second = (node.directory() for node in nodes)
        await first.put_manifest(signed_manifest())
        unsigned, key = seal_manifest(MANIFEST, bytes(64)), record_key(RUN, "manifest")
        assert not rogue.store(key, unsigned, time.time() + 604, subkey=MANIFEST_SUBKEY, exclude_self=True)
        with pytest.raises(BadSignature):
            await first.put_manifest(unsigned)
        assert await second.manifest() == signed_manifest()

    asyncio.run(scenario())


def bad_records() -> dict[str, Callable[[], tuple[str, bytes, float, Any]]]:
    """By the reason for which it must be refused: what a rogue would store (kind, value, expiration, subkey)."""
    rogue, victim = Identity.generate(), Identity.generate()
    now = time.time()

    def unchecked(identity: Identity, record: Record) -> bytes:
        return seal(identity, RUN, record.kind, msgspec.msgpack.encode(record))

    def forged() -> tuple[str, bytes, float, Any]:
        record = peer_record(victim)
        sealed = bytearray(seal_record(victim, RUN, record))
        sealed[-1] ^= 1
        return "peer", bytes(sealed), record.expires_at, victim.peer_id

    def other_run() -> tuple[str, bytes, float, Any]:
        record = peer_record(rogue)
        return "peer", seal_record(rogue, "demo-ffffffffffff", record), record.expires_at, rogue.peer_id

    def impersonated() -> tuple[str, bytes, float, Any]:
        record = peer_record(victim)
        return "peer", unchecked(rogue, record), record.expires_at, victim.peer_id

    def stale() -> tuple[str, bytes, float, Any]:
        record = leases(rogue, (1, 9), issued=now - 100)
        return "lease", seal_record(rogue, RUN, record), now + 30, rogue.peer_id

    def kept_alive() -> tuple[str, bytes, float, Any]:
        record = leases(rogue, (1, 9), issued=now)
        return "lease", seal_record(rogue, RUN, record), record.expires_at + 30, rogue.peer_id

    def future() -> tuple[str, bytes, float, Any]:
        record = leases(rogue, (1, 9), issued=now + 60)
        return "lease", seal_record(rogue, RUN, record), record.expires_at, rogue.peer_id

    def eternal() -> tuple[str, bytes, float, Any]:
        record = peer_record(rogue, expires_at=now + 10_000)
        return "peer", unchecked(rogue, record), record.expires_at, rogue.peer_id

    def oversized() -> tuple[str, bytes, float, Any]:
        return "vote", seal(rogue, RUN, "vote", bytes(VoteRecord.max_bytes)), now + 30, f"{rogue.peer_id}/0"

    def malformed() -> tuple[str, bytes, float, Any]:
        return "peer", seal(rogue, RUN, "peer", b"\xc1"), now + 30, rogue.peer_id

    def not_finite() -> tuple[str, bytes, float, Any]:
        record = peer_record(rogue, loss=float("nan"))
        return "peer", unchecked(rogue, record), record.expires_at, rogue.peer_id

    def misplaced() -> tuple[str, bytes, float, Any]:
        record = peer_record(rogue)
        return "peer", seal_record(rogue, RUN, record), record.expires_at, victim.peer_id

    def wrong_kind() -> tuple[str, bytes, float, Any]:
        record = peer_record(rogue)
        return "lease", seal_record(rogue, RUN, record), record.expires_at, rogue.peer_id

    return {
        "forged": forged,
        "forged (other run)": other_run,
        "wrong-writer": impersonated,
        "expired": stale,
        "wrong-expiration": kept_alive,
        "future": future,
        "too-long": eternal,
        "oversized": oversized,
        "malformed": malformed,
        "malformed (not finite)": not_finite,
        "wrong-subkey": misplaced,
        "wrong-kind": wrong_kind,
    }


@pytest.mark.parametrize("name", list(bad_records()))
def test_storing_nodes_refuse_and_count(name: str, nodes: list[Node], rogue: hivemind.DHT) -> None:
    kind, value, expiration, subkey = bad_records()[name]()
    reason = name.split(" ")[0]
    before = [refusals(node.dht)[reason] for node in nodes]
    stored = rogue.store(record_key(RUN, kind), value, expiration, subkey=subkey, exclude_self=True)
    assert stored is False
    assert [refusals(node.dht)[reason] for node in nodes] == [count + 1 for count in before]


@pytest.mark.parametrize("name", [name for name in bad_records() if name != "wrong-expiration"])
def test_readers_refuse_and_count(name: str, rogue: hivemind.DHT) -> None:
    """A reader whose own DHT process lets everything through: the records come from the rogue's store."""
    kind, value, expiration, subkey = bad_records()[name]()
    reason = name.split(" ")[0]

    async def scenario() -> None:
        reader = Directory(rogue, Identity.generate(), RUN)
        # `future` and `expired` ones are stored under whatever time keeps them in the rogue's store.
        await rogue.store(
            record_key(RUN, kind), value, max(expiration, time.time() + 30), subkey=subkey, return_future=True
        )
        before = reader.refusals[reason]
        view = await reader.read()
        assert reader.refusals[reason] > before
        assert subkey not in view.peers
        assert all(claim.owner != subkey for claim in view.leases.values())

    asyncio.run(scenario())


def test_a_rogue_cannot_hide_honest_records(nodes: list[Node], rogue: hivemind.DHT) -> None:
    """It holds a poisoned dictionary under the same key: its whole answer is dropped, the other replicas' is not."""

    async def scenario() -> None:
        first, second = (node.directory() for node in nodes)
        me = nodes[0].identity
        await first.put(peer_record(me, step=99))
        kind, value, expiration, subkey = bad_records()["forged"]()
        await rogue.store(record_key(RUN, kind), value, expiration, subkey=subkey, return_future=True)
        view = await second.read()
        assert view.peers[me.peer_id].step == 99
        assert subkey not in view.peers
        assert (await asyncio.to_thread(refusals, nodes[1].dht))["forged"] >= 1

    asyncio.run(scenario())


def test_hiveminds_own_keys_pass_but_small_and_short_lived(nodes: list[Node], rogue: hivemind.DHT) -> None:
    now = time.time()
    assert rogue.store("averager.0b01", True, now + 30, subkey=b"peer", exclude_self=True)
    found = nodes[1].dht.get("averager.0b01", latest=True)
    assert found is not None
    assert found.value[b"peer"].value is True
    before = [refusals(node.dht) for node in nodes]
    assert not rogue.store("averager.0b10", bytes(2000), now + 30, subkey=b"peer", exclude_self=True)
    assert not rogue.store("averager.0b10", True, now + 10_000, subkey=b"peer", exclude_self=True)
    for node, count in zip(nodes, before, strict=True):
        assert refusals(node.dht) - count == {"oversized": 1, "too-long": 1}
