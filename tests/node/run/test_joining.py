"""Catching up with a run whose peers are slow, over a real directory and transport."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from loopback import SECONDS, loopback
from shoal.node.run import joining
from shoal.node.watching.state import Phase
from shoal.protocol.transport.downloads import FetchQuery, Resource
from tiny import SLOTS, manifest_of


def test_an_owner_that_does_not_send_keeps_no_newcomer_from_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "STANDIN_SECONDS", 1.0)
    manifest = manifest_of(outer={"every_steps": 1_000_000}, train={"steps": 1_000_000}, standin={"publish_every": 1})
    with loopback(tmp_path, manifest, 3) as swarm:
        owner, slow, newcomer = swarm.peers

        async def withhold(_: FetchQuery) -> Resource | None:
            await asyncio.sleep(SECONDS)
            return None

        swarm.call(owner.own(range(SLOTS - 1), 1))
        swarm.call(slow.own([SLOTS - 1], 1))
        swarm.until(lambda: len(newcomer.links.view().leases) == SLOTS, "the newcomer knows all owners")
        slow.links.transport.serve(withhold)
        said: list[str] = []
        began = time.monotonic()
        swarm.call(joining._standins(newcomer.links, newcomer.exchange, said.append))
        assert time.monotonic() - began < 15
        assert len(said) == SLOTS - 1
        assert newcomer.exchange._book.subscribers[0].point.epoch == 1
        assert newcomer.exchange._book.subscribers[SLOTS - 1].point.epoch == 0


def test_who_comes_back_with_others_that_wait_goes_on_at_their_step(tmp_path: Path) -> None:
    """All were down: one has its checkpoint, another none, and nobody trains yet."""
    with loopback(tmp_path, manifest_of(), 2) as swarm:
        back, bare = swarm.peers
        back.ask(lambda composer: composer.go_to(300))
        back.links.state.resume(step=300)
        for peer in swarm.peers:
            peer.links.state.enter(Phase.READY)
            swarm.call(peer.member.announce())
        swarm.until(
            lambda: (
                all(not peer.links.active_composers() for peer in swarm.peers)
                and bare.links.view().peers[back.peer_id].step == 300
            ),
            "each knows that the other waits",
        )
        for peer in swarm.peers:
            swarm.call(joining.go_to_the_swarms_step(peer.links, peer.trainer))
        assert [peer.ask(lambda composer: composer.step) for peer in swarm.peers] == [300, 300]
