"""Outer rounds of three composers over a real directory, gossip and fetches; only the averager is by function calls."""

from __future__ import annotations

import asyncio
import math
import operator
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import RUN, Loopback, LoopbackPeer, loopback
from shoal.node.backbone import common_state
from shoal.node.backbone.common_state import Held
from shoal.node.backbone.outer import MAX_ATTEMPT
from shoal.node.learning.composer import Composer
from shoal.protocol.averaging.merging import digest
from shoal.protocol.averaging.outcome import Outcome, Status
from shoal.protocol.averaging.reputation import Reputation
from shoal.protocol.directory.records import MAX_MEMBERS, VoteRecord, seal_record
from shoal.protocol.identity import Identity
from shoal.protocol.messages import RoundOpen
from shoal.protocol.transport.downloads import Resource
from tiny import manifest_of

STEPS = 24


@pytest.fixture(scope="module", params=["mean", "radial"])
def swarm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    manifest = manifest_of(outer={"every_steps": 8, "fragments": 2, "merge": request.param}, train={"steps": STEPS})
    with loopback(tmp_path_factory.mktemp("outer"), manifest, 3) as swarm:
        tasks: list[asyncio.Task[None]] = []
        loop = swarm.network.loop
        loop.call_soon_threadsafe(lambda: tasks.extend(loop.create_task(peer.outer.run()) for peer in swarm.peers))
        yield swarm
        assert tasks
        assert not any(task.done() for task in tasks)


def common(peer: LoopbackPeer) -> list[bytes]:
    return peer.ask(lambda c: [digest(f, m) for f, m in zip(c.common, c.momentum, strict=True)])


def drift(composer: Composer) -> float:
    return max(
        float((composer.local_fragment(i) - composer.common[i]).abs().max()) for i in range(len(composer.fragments))
    )


def merged(swarm: Loopback) -> bool:
    """Every step of everybody is in a common state that all hold."""
    return (
        all(peer.ask(lambda c, p=peer: p.outer.unmerged_steps(c)) == 0 for peer in swarm.peers)
        and len({tuple(peer.common.held[i].digest for i in range(2)) for peer in swarm.peers}) == 1
    )


def rounds_of(peer: LoopbackPeer) -> list[int]:
    """The round to come, of each fragment."""
    return [peer.common.next_round(index) for index in range(2)]


def later(peer: LoopbackPeer, before: list[int]) -> bool:
    """Both fragments have been merged since."""
    return all(now > then for now, then in zip(rounds_of(peer), before, strict=True))


def more_steps(peer: LoopbackPeer, steps: int) -> None:
    """Train beyond the run's end, so that no round but the pending one is due."""
    peer.ask(lambda c: [c.train_step() for _ in range(steps)])


def test_when_all_have_finished_everything_is_merged(swarm: Loopback) -> None:
    for peer in swarm.peers:
        peer.trainer.start_training()
    swarm.until(lambda: all(peer.composer.step == STEPS for peer in swarm.peers), "all have finished")
    swarm.until(lambda: merged(swarm), "all steps are merged")
    assert len({tuple(common(peer)) for peer in swarm.peers}) == 1
    assert common(swarm.peers[0]) == [held.digest for held in swarm.peers[0].common.held]
    assert all(peer.ask(drift) == 0.0 for peer in swarm.peers)
    assert all(held.round > 0 for held in swarm.peers[0].common.held)


def test_who_misses_a_round_keeps_its_work_for_the_next(swarm: Loopback) -> None:
    first, _, absent = swarm.peers
    before = rounds_of(first)
    swarm.meeting.absent = {absent.peer_id}
    try:
        more_steps(absent, 2)
        work = absent.ask(drift)
        more_steps(first, 1)
        swarm.until(
            lambda: later(absent, before),
            "two rounds are committed without it",
        )
        assert absent.ask(lambda c: absent.outer.unmerged_steps(c)) == 2
        assert absent.ask(drift) == pytest.approx(work, abs=1e-6)
    finally:
        swarm.meeting.absent = set()
    swarm.until(lambda: merged(swarm), "its work is merged, too")
    assert len({tuple(common(peer)) for peer in swarm.peers}) == 1


def test_who_gave_up_a_round_that_others_commit_merges_its_work_once(swarm: Loopback) -> None:
    *others, deaf = swarm.peers
    before, common = rounds_of(deaf), deaf.ask(lambda c: [each.clone() for each in c.common])
    swarm.meeting.stuck = {1}  # one fragment's turn
    swarm.meeting.deaf = {deaf.peer_id}
    try:
        more_steps(deaf, 4)
        swarm.until(lambda: all(rounds_of(peer)[0] > before[0] for peer in swarm.peers), "it has what others committed")
        assert not swarm.meeting.deaf, "it was told"
        assert all(deaf.peer_id in peer.common.held[0].members for peer in others)
        assert deaf.ask(lambda c: c.unmerged(0)) == (0, 0)
        assert float((deaf.ask(lambda c: c.local_fragment(0)) - deaf.composer.common[0]).abs().max()) < 1e-6
        assert not torch.equal(deaf.composer.common[0], common[0])
    finally:
        swarm.meeting.stuck = set()
    swarm.until(lambda: merged(swarm), "the rest is merged")


def test_those_who_have_finished_undo_nothing(swarm: Loopback) -> None:
    """They are in the round, for its quorum; all that the one learns that still trains is in what is merged."""
    first, *finished = swarm.peers
    before, common = rounds_of(first), first.ask(lambda c: [each.clone() for each in c.common])

    def step(composer: Composer) -> list[torch.Tensor]:
        for _ in range(4):
            composer.train_step()
        return [composer.local_fragment(index) for index in range(2)]

    local = first.ask(step)
    swarm.until(lambda: later(first, before) and merged(swarm), "its steps are merged")
    assert all(peer.peer_id in held.members for peer in finished for held in first.common.held)
    for then, wanted, now in zip(common, local, first.ask(lambda c: c.common), strict=True):
        learned, kept = wanted - then, now - then
        assert float((kept - learned).norm() / learned.norm()) < 0.02


def test_a_fragment_whose_rounds_fail_holds_up_no_other(swarm: Loopback) -> None:
    first = swarm.peers[0]
    before = rounds_of(first)
    swarm.meeting.stuck = {0}
    try:
        for count in (1, 2, 3):
            for peer in swarm.peers:
                more_steps(peer, 1)
            swarm.until(lambda c=count: rounds_of(first)[1] >= before[1] + 2 * c, "the other one's rounds go on")  # type: ignore[misc]
        assert rounds_of(first)[0] == before[0]
        assert first.ask(lambda c: c.steps_since_commit(0)) == 3
        assert first.ask(lambda c: c.steps_since_commit(1)) <= 1
    finally:
        swarm.meeting.stuck = set()
    swarm.until(lambda: merged(swarm), "and its work is not lost")
    assert len({tuple(common(peer)) for peer in swarm.peers}) == 1


def test_where_more_than_half_do_not_fit_into_a_round_nobody_meets(
    swarm: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failures() -> list[float]:
        return [peer.links.state.snapshot()["outer"]["rounds"].get("failed", 0) for peer in swarm.peers]

    before, failed = rounds_of(swarm.peers[0]), failures()
    with monkeypatch.context() as many:
        for peer in swarm.peers:
            many.setattr(peer.links, "quorum", lambda: MAX_MEMBERS + 1)
            more_steps(peer, 1)
        swarm.until(lambda: all(map(operator.gt, failures(), failed)), "all say so")
        assert rounds_of(swarm.peers[0]) == before
    swarm.until(lambda: merged(swarm), "and no work is lost")


def test_votes_live_on_while_a_fragment_is_fetched(swarm: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch may take longer than a vote lives; without their votes a swarm of slow links has no quorum."""
    first, _, slow = swarm.peers
    before, peer_id = rounds_of(slow), slow.peer_id
    arrived, fetch = asyncio.Event(), slow.links.fetch
    asked: list[str] = []

    async def late(*args: Any, **more: Any) -> Resource:
        asked.append(args[1])
        if args[1] == asked[0]:
            await arrived.wait()
        return await fetch(*args, **more)

    def votes() -> list[float]:
        votes = first.links.directory.view().votes
        return [votes[index][peer_id].issued_at for index in range(2)]

    for peer in swarm.peers:
        monkeypatch.setattr(peer.links, "record_seconds", 3.0)
    monkeypatch.setattr(slow.links, "fetch", late)
    swarm.meeting.absent = {peer_id}
    try:
        more_steps(first, 1)
        swarm.until(lambda: bool(asked), "the slow one fetches a fragment")
        for _ in range(2):
            then = votes()
            swarm.until(lambda then=then: all(map(operator.gt, votes(), then)), "it votes again")  # type: ignore[misc]
        assert rounds_of(slow) != rounds_of(first)
        swarm.until(lambda: any(map(operator.gt, rounds_of(slow), before)), "the other fragment is not held up by it")
    finally:
        swarm.meeting.absent = set()
        swarm.network.loop.call_soon_threadsafe(arrived.set)
    swarm.until(lambda: merged(swarm) and later(slow, before), "it has caught up")


def test_strangers_do_not_vote(swarm: Loopback, tmp_path: Path) -> None:
    victim = swarm.peers[0]
    held = list(victim.common.held)
    lie, number = secrets.token_bytes(32), victim.common.next_round(1) + 2
    before = {tuple(rounds_of(peer)) for peer in swarm.peers}

    async def hear(sealed: bytes) -> bool:
        heard = victim.links.directory.receive(sealed)
        victim.links.news.changed()
        await victim.common.catch_up(number % 2)
        return heard

    for i in range(5):
        now = time.time()
        record = VoteRecord(
            round=number, fragment=number % 2, digest=lie, members=[], issued_at=now, expires_at=now + 30
        )
        stranger = Identity.load_or_create(tmp_path / f"{i}.key")
        assert swarm.call(hear(seal_record(stranger, RUN, record)))
        assert stranger.peer_id in victim.links.directory.view().votes[number % 2]
        assert stranger.peer_id not in victim.links.votes(number % 2)
    assert victim.common.held == held
    assert {tuple(rounds_of(peer)) for peer in swarm.peers} == before


def test_one_message_does_not_take_a_round_to_its_last_attempt(swarm: Loopback) -> None:
    victim, other, _ = swarm.peers
    number = victim.common.next_round(0)
    lane = victim.outer._lanes[0]
    opening = RoundOpen(round=number, attempt=(1 << 16) - 1, fragment=0, step=1)
    victim.outer.on_round_open("12D3KooWstranger", opening)
    assert lane.opened < number
    victim.outer.on_round_open(other.peer_id, opening)
    assert lane.attempts[number] < MAX_ATTEMPT / 2
    victim.outer.on_round_open(other.peer_id, RoundOpen(round=1 << 40, attempt=0, fragment=0, step=1))
    assert 1 << 40 not in lane.attempts
    for peer in swarm.peers:
        more_steps(peer, 1)
    swarm.until(lambda: merged(swarm), "rounds go on")


def test_who_names_ever_new_attempts_does_not_keep_others_from_meeting(swarm: Loopback) -> None:
    victim, liar, other = swarm.peers

    async def scene() -> None:
        """In one go: no round ends in the middle of it."""
        number = victim.common.next_round(0)
        lane = victim.outer._lanes[0]
        lane.heed_from.clear()
        before = lane.attempts.get(number, 0)

        def opens(sender: LoopbackPeer, attempt: int) -> int:
            opening = RoundOpen(round=number, attempt=attempt, fragment=0, step=1)
            victim.outer.on_round_open(sender.peer_id, opening)
            return lane.attempts[number]

        assert opens(liar, before + 1) == before + 1
        assert [opens(liar, before + 2 + i) for i in range(5)] == [before + 1] * 5
        assert opens(other, before + 2) == before + 2, "others are heeded"
        lane.heed_from[liar.peer_id] = time.monotonic()
        assert opens(liar, before + 3) == before + 3, "and it, by the time that a meeting has had its time"
        assert opens(liar, before) == before + 3

    def heeds_all() -> bool:
        return {liar.peer_id, other.peer_id} <= set(victim.links.active_composers()) - victim.common.shunned

    swarm.until(heeds_all, "the others are active, and not shunned")
    swarm.call(scene())


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_a_backbone_that_cannot_be_sent_goes_back_to_what_was_merged(swarm: Loopback, value: float) -> None:
    """One bit that has flipped is enough, and every loss is NaN from then on."""
    broken = swarm.peers[0]
    numbers = rounds_of(broken)

    def attempts() -> list[int]:
        return [
            lane.attempts.get(number, 0)
            for peer in swarm.peers
            for lane, number in zip(peer.outer._lanes, numbers, strict=True)
        ]

    def flip(composer: Composer) -> None:
        for fragment in composer.fragments:
            composer.backbone[fragment.names[0]].data.view(-1)[0] = value

    before = attempts()
    broken.ask(flip)
    more_steps(broken, 1)
    swarm.until(lambda: merged(swarm), "it is merged again")
    assert broken.ask(drift) == 0.0
    assert math.isfinite(broken.ask(lambda composer: composer.train_step().loss))
    assert max(attempts()) <= max(before), "nobody was led to others"
    assert (broken.links.state.snapshot()["last_error"] or {}).get("code") == "SHOAL-107"
    swarm.until(lambda: merged(swarm), "as any other")


def test_peers_that_return_with_different_rounds_agree_again(swarm: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_state, "SPLIT_SECONDS", 0.2)
    swarm.until(lambda: merged(swarm), "a common state")
    ahead = min(rounds_of(swarm.peers[0])) // 2 * 2
    for offset, peer in enumerate(swarm.peers):

        def fall_back(composer: Composer, peer: LoopbackPeer = peer, offset: int = offset) -> None:
            for index in range(2):
                fragment = composer.common[index] + offset
                momentum = torch.zeros_like(fragment)
                composer.reset_fragment(index, fragment, momentum)
                peer.common.held[index] = Held(ahead + 2 + index - 2 * offset, digest(fragment, momentum))

        peer.ask(fall_back)
    rounds = {tuple(held.round for held in peer.common.held) for peer in swarm.peers}
    assert len(rounds) == 3
    for peer in swarm.peers:
        swarm.network.loop.call_soon_threadsafe(lambda p=peer: setattr(p.common, "_attested", 0.0))
    swarm.until(lambda: len({tuple(common(peer)) for peer in swarm.peers}) == 1, "all hold one state")
    for peer in swarm.peers:
        more_steps(peer, 1)
    swarm.until(lambda: merged(swarm), "and merge on from there")


@pytest.mark.parametrize("number", [(1 << 48) - 2, 1 << 53, 1001], ids=["the last", "none", "another fragment's"])
def test_one_vote_for_a_round_that_cannot_be_is_nobodys_state(
    swarm: Loopback, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where no quorum holds a state, the latest of the most held is taken: no round could follow this one."""
    monkeypatch.setattr(common_state, "SPLIT_SECONDS", -1.0)
    victim, other, liar = swarm.peers
    swarm.until(lambda: merged(swarm), "a common state")
    now, digests = time.time(), [secrets.token_bytes(32) for _ in range(3)]
    rounds = [rounds_of(victim)[0] - 2, rounds_of(victim)[0], number]
    votes = {
        peer.peer_id: VoteRecord(
            round=round_, fragment=0, digest=digest_, members=[], issued_at=now, expires_at=now + 30
        )
        for peer, round_, digest_ in zip((victim, other, liar), rounds, digests, strict=True)
    }
    asked: list[tuple[int, bytes]] = []

    async def note(index: int, number: int, digest: bytes, votes: object) -> None:
        asked.append((number, digest))

    with monkeypatch.context() as noting:
        noting.setattr(victim.common, "_take", note)
        swarm.call(victim.common._mend_split(0, votes))
    assert asked == [(rounds[1], digests[1])]


def test_who_spoils_a_round_is_not_met_again_and_does_not_vote(swarm: Loopback) -> None:
    """Its parts are NaN: without an end to that nothing would ever be committed again."""
    first, second, liar = swarm.peers
    swarm.until(lambda: merged(swarm), "nothing is pending")
    before = rounds_of(first)
    swarm.meeting.spoilers = {liar.peer_id}
    for peer in (first, second):
        more_steps(peer, 1)
    swarm.until(
        lambda: all(liar.peer_id in peer.common.shunned for peer in (first, second)), "both have seen what it does"
    )
    swarm.until(lambda: later(first, before), "two rounds are committed without it")
    assert liar.peer_id not in first.common.held[0].members
    assert liar.peer_id not in first.common.votes(0)
    assert first.links.state.snapshot()["refusals"]["round-spoiled"] == 1
    assert not liar.common.shunned - {first.peer_id, second.peer_id}


def test_nobody_is_shunned_on_suspicion_without_whom_there_is_no_quorum(
    swarm: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two cannot reach each other, the third hears each of them accuse the other, and needs one."""
    first, *others = swarm.peers
    monkeypatch.setattr(first.common, "reputation", Reputation(first.peer_id))
    suspicion = {peer.peer_id: 1.0 for peer in others}
    for _ in range(10):
        first.outer._judge(Outcome(Status.PARTIAL, 0, 0, suspicion=suspicion), committed=False)
    assert len(first.common.shunned) == 1
