"""Catching up with a run whose peers are slow, over a real directory and transport."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from loopback import SECONDS, loopback
from shoal.node.run import joining
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
