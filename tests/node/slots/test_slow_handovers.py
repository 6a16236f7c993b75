"""Slots that take long to hand over: what is made of them stays true, and nobody waits for who has left meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from loopback import SECONDS, LoopbackPeer, loopback
from shoal.node.run.manifest import Manifest, OwnershipSpec
from shoal.node.watching.state import Phase
from shoal.protocol.transport.downloads import Resource
from tiny import SLOTS, manifest_of

LEASE_SECONDS = 4.0


def manifest() -> Manifest:
    return msgspec.structs.replace(
        manifest_of(outer={"every_steps": 1_000_000}, train={"steps": 1_000_000}),
        ownership=OwnershipSpec(lease_seconds=LEASE_SECONDS, snapshot_every=1),
    )


def test_a_slot_stays_frozen_while_what_its_next_owner_takes_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be trained on, and what was learned then be lost with the claim that follows."""
    with loopback(tmp_path, manifest(), 2) as swarm:
        owner, next_owner = swarm.peers

        async def start() -> asyncio.Task[None]:
            return asyncio.create_task(owner.keeper.run())

        swarm.call(start())
        swarm.until(lambda: set(owner.keeper.held) == set(range(SLOTS)), "one owns all")

        def desired() -> set[int]:
            owners = owner.keeper._situation().desired
            return {slot for slot in range(SLOTS) if owners[slot][0] == next_owner.peer_id}

        swarm.until(lambda: bool(desired()), "the other one is to have some")
        slot, snapshot = min(desired()), owner.keeper.serving.snapshot
        frozen: list[bool] = []

        async def slowly(index: int, **more: Any) -> Resource | None:
            await asyncio.sleep(1.5 * LEASE_SECONDS)
            frozen.append(slot in await asyncio.wrap_future(owner.trainer.ask(lambda c: set(c.frozen))))
            return await snapshot(index, **more)

        monkeypatch.setattr(owner.keeper.serving, "snapshot", slowly)
        assert swarm.call(owner.keeper.serve_handover(slot, next_owner.peer_id)) is not None
        assert frozen == [True]
        swarm.until(lambda: not owner.ask(lambda c: set(c.frozen)), "nobody takes it, and it is trained on")


def test_who_leaves_before_a_large_slot_has_been_taken_is_succeeded_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come of a slot allows its fetch more time, hours for some: they would pass with the owner gone."""
    with loopback(tmp_path, manifest(), 2) as swarm:
        stayer, goner = swarm.peers
        tasks: dict[str, asyncio.Task[None]] = {}

        async def start(peer: LoopbackPeer) -> None:
            tasks[peer.peer_id] = asyncio.create_task(peer.keeper.run())

        for peer in swarm.peers:
            swarm.call(start(peer))
        swarm.until(lambda: len(stayer.keeper.held) + len(goner.keeper.held) == SLOTS, "every slot has an owner")
        slots, asked = set(goner.keeper.held), set[str]()
        assert slots
        for peer in swarm.peers:
            peer.step()
            peer.keeper.step = peer.composer.step
        swarm.until(lambda: slots <= set(stayer.keeper._copies.held), "every slot has a copy")
        fetch = stayer.links.fetch

        async def broken_off(peer: str, resource: str, **more: Any) -> Resource:
            if resource.startswith("handover/"):
                asked.add(resource)
                await asyncio.sleep(10 * SECONDS)
            return await fetch(peer, resource, **more)

        async def say_nothing(_record: object) -> None:
            await asyncio.sleep(0)

        async def go() -> None:
            goner.links.record_seconds = LEASE_SECONDS
            goner.links.state.enter(Phase.LEAVING)
            goner.links.news.changed()
            await goner.keeper.drain(2.0)
            tasks.pop(goner.peer_id).cancel()
            monkeypatch.setattr(goner.links, "announce", say_nothing)

        monkeypatch.setattr(stayer.links, "fetch", broken_off)
        swarm.call(go())
        assert asked
        assert slots <= set(goner.keeper.held), "time was up"
        swarm.until(lambda: set(stayer.keeper.held) == set(range(SLOTS)), "the other goes on from its copies")
        assert stayer.links.state.snapshot()["slots"]["lost"] == 0
        assert not tasks[stayer.peer_id].done()
