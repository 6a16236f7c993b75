"""Catching up with the common state: from whom, and how long for each of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from loopback import Loopback, loopback
from shoal.node.backbone import common_state
from shoal.node.backbone.common_state import Held
from shoal.protocol.messages import RoundOpen
from shoal.protocol.transport.downloads import FetchQuery, Resource
from tiny import manifest_of


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("catching-up"), manifest_of(outer={"fragments": 2}), 3) as swarm:
        yield swarm


def test_one_slow_backer_does_not_hold_up_who_has_others(swarm: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_state, "BACKER_SECONDS", 0.5)
    behind, slow, quick = swarm.peers
    assert quick.library is not None
    asked: list[str] = []

    async def answer_slowly(query: FetchQuery) -> Resource | None:
        asked.append("slow")
        await asyncio.sleep(20.0)
        return None

    async def answer(query: FetchQuery) -> Resource | None:
        asked.append("quick")
        assert quick.library is not None
        return await quick.library.answer(query)

    slow.links.transport.serve(answer_slowly)
    quick.links.transport.serve(answer)
    first = set()
    for _ in range(40):
        asked.clear()
        began = time.monotonic()
        wanted = behind.common.held[0]
        assert swarm.call(behind.common.fetch_fragment(0, wanted, [slow.peer_id, quick.peer_id]))
        assert time.monotonic() - began < 5.0
        first.add(asked[0])
        if len(first) == 2:
            break
    assert first == {"slow", "quick"}, "always the same one is asked first"
    assert not behind.common._patience, "whoever is next is not waited for longer"


def test_nobody_can_have_others_repeat_their_votes_again_and_again(swarm: Loopback) -> None:
    """Each repetition goes to everybody, by gossip and through the directory."""
    victim, missing, other = swarm.peers
    common, loop = victim.common, swarm.network.loop
    common.held[0] = Held(4, common.held[0].digest)
    opening = RoundOpen(round=2, attempt=0, fragment=0, step=1)
    heard: set[float] = set()

    def hear() -> bool:
        vote = other.links.directory.view().votes.get(0, {}).get(victim.peer_id)
        heard.update([] if vote is None else [vote.issued_at])
        return bool(heard)

    loop.call_soon_threadsafe(victim.outer.on_round_open, missing.peer_id, opening)
    swarm.until(hear, "who has missed a commit is told")
    for _ in range(10):
        time.sleep(common_state.REPEAT_SECONDS / 2)
        loop.call_soon_threadsafe(victim.outer.on_round_open, missing.peer_id, opening)
        hear()
    assert len(heard) == 1
    then = min(heard)
    loop.call_soon_threadsafe(victim.outer.on_round_open, other.peer_id, opening)
    swarm.until(lambda: hear() and max(heard) > then, "somebody else is told, too")
