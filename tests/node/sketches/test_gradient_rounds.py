"""Intervals of gradient sketches among composers over real gossip; only the averager is by function calls."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from loopback import RUN, Loopback, LoopbackPeer, loopback
from shoal.node.learning.composer import Composer, StepReport
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.gradient_receiving import GradientReceiver
from shoal.node.sketches.gradient_rounds import GradientRounds
from shoal.node.sketches.gradient_sending import GradientSender
from shoal.node.watching.state import Count
from shoal.protocol.averaging.facts import RoundFacts
from shoal.protocol.averaging.outcome import Outcome, Status
from shoal.protocol.errors import RoundFailed
from shoal.protocol.experts.sketch_intervals import AHEAD
from shoal.protocol.messages import SketchOpen
from tiny import SLOTS, manifest_of
from torch import Tensor

EVERY = 4
MEETING_SECONDS = 2.0

Group = dict[str, tuple[Tensor | None, int, Future[Outcome]]]


class SketchMeeting:
    """Averages what comes for one slot, interval and lease, once as many as expected are there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[Any, ...], Group] = {}
        self.spoiled = False  # the mean is not finite

    def submit(self, peer: str, slot: int, interval: int, sketch: Tensor | None, **facts: Any) -> Future[Outcome]:
        key = (slot, interval, facts["owner"], facts["epoch"])
        future: Future[Outcome] = Future()
        with self._lock:
            group = self._waiting.setdefault(key, {})
            group[peer] = (sketch, facts["tokens"], future)
            if len(group) < facts["expected"]:
                timer = threading.Timer(MEETING_SECONDS, self._give_up, (key, future, interval))
                timer.daemon = True
                timer.start()
                return future
            del self._waiting[key]
        tokens = sum(count for _, count, _ in group.values())
        mean = sum((sum_ for sum_, _, _ in group.values() if sum_ is not None), torch.zeros(())) / tokens
        if self.spoiled:
            mean = mean * float("nan")
        claims = tuple(
            RoundFacts(member, interval, 0, slot, count, 1, bytes(32), True, time.time())
            for member, (_, count, _) in group.items()
        )
        for _, _, waiting in group.values():
            waiting.set_result(
                Outcome(
                    Status.COMPLETE, interval, 0, average=mean.clone(), members=tuple(group), facts=claims,
                    bytes_sent=100, bytes_received=200,
                )
            )  # fmt: skip
        return future

    def _give_up(self, key: tuple[Any, ...], future: Future[Outcome], interval: int) -> None:
        with self._lock:
            if not future.done():
                group = self._waiting.get(key, {})
                self._waiting[key] = {peer: entry for peer, entry in group.items() if entry[2] is not future}
                future.set_result(Outcome(Status.NO_GROUP, interval, 0))


class SketchSeat:
    """One peer's place there."""

    num_slots = SLOTS

    def __init__(self, meeting: SketchMeeting, peer: str) -> None:
        self._meeting, self._peer = meeting, peer
        self.broken = False

    def submit(self, slot: int, interval: int, sketch: Tensor | None, **facts: Any) -> Future[Outcome]:
        if self.broken:
            raise RoundFailed("the slot is still being averaged")
        return self._meeting.submit(self._peer, slot, interval, sketch, **facts)


class Sketching:
    """What a composer peer has for gradient sketches."""

    def __init__(self, peer: LoopbackPeer, meeting: SketchMeeting) -> None:
        self.peer = peer
        self.form = GradientForm(run_id=RUN, shape=peer.composer.shape, rank=peer.links.manifest.sketch.rank)
        self.seat: Any = SketchSeat(meeting, peer.peer_id)
        self.rounds = GradientRounds(peer.links, self.seat)
        self.collector = GradientCollector(self.form)
        self.sender = GradientSender(peer.links, peer.trainer, peer.exchange, self.collector, self.rounds)
        self.receiver = GradientReceiver(
            peer.links, peer.trainer, peer.exchange, peer.keeper, self.form, self.rounds
        )  # fmt: skip
        peer.composer.collector = self.collector
        assert peer.member is not None
        peer.member.on_sketch_open = self.rounds.on_sketch_open
        inner = peer._after_step

        def after_step(composer: Composer, report: StepReport) -> None:
            inner(composer, report)
            self.sender.after_step(composer)

        peer._after_step = after_step  # type: ignore[method-assign]

    def counted(self, what: Count) -> dict[str, float]:
        name = {Count.REFUSALS: "refusals", Count.SKETCHES_LOST: "sketches_lost", Count.SKETCH_ROUNDS: "sketch_rounds"}
        return dict(self.peer.links.state.snapshot()[name[what]])

    def collect(self, steps: int) -> None:
        """Take inner steps whose end does not open the interval."""
        self.peer.ask(lambda c: [c.train_step() for _ in range(steps)])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Loopback, SketchMeeting, list[Sketching]]]:
    """Two composers; the first owns slots 0 and 1, the second 2 and 3."""
    manifest = manifest_of(sketch={"kind": "gradient", "gradient_every": EVERY, "rank": 8}, train={"steps": 10_000})
    with loopback(tmp_path_factory.mktemp("gradient"), manifest, 2) as swarm:
        meeting = SketchMeeting()
        both = [Sketching(peer, meeting) for peer in swarm.peers]
        for i, peer in enumerate(swarm.peers):
            slots = (2 * i, 2 * i + 1)
            swarm.call(peer.own(slots, epoch=3))
            peer.keeper.held = dict.fromkeys(slots, 3)
        for peer in swarm.peers:
            swarm.until(lambda p=peer: len(p.ask(lambda _: p.exchange.owners())) == 2, "each knows the other's slots")
        yield swarm, meeting, both


@pytest.fixture
def settled(pair: tuple[Loopback, SketchMeeting, list[Sketching]]) -> tuple[Loopback, SketchMeeting, list[Sketching]]:
    """With nothing under way, and both in the same interval."""
    swarm, _, both = pair
    swarm.until(lambda: not any(each.rounds.running for each in both), "all rounds have ended")
    for each in both:
        number = max(other.rounds.intervals.next for other in both)
        each.rounds.intervals.next = number
        each.rounds.intervals.completed()
        each.peer.ask(lambda _, each=each, number=number: each.collector.begin(number))
    return pair


def test_one_is_due_and_both_bring_and_learn(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, _, (fast, slow) = settled
    interval = fast.rounds.intervals.next
    before = [each.receiver.learned for each in (fast, slow)]
    slow.collect(1)  # it has hardly begun
    fast.peer.step(EVERY)
    swarm.until(
        lambda: [each.receiver.learned for each in (fast, slow)] == [2 + number for number in before],
        "each has learned for both of its slots",
    )
    for each in (fast, slow):
        assert each.rounds.intervals.next == each.collector.interval == interval + 1
        shares = each.peer.ask(lambda c: {at: each.of_step() for at, each in copy.deepcopy(c.shares).items()})
        assert {slot for slot, _ in shares} == each.peer.composer.owned
        # Over the other's tokens: its own are in its own steps.
        steps = 1 if each is fast else EVERY
        assert {share.tokens * share.steps for [share] in shares.values()} == {float(steps * 2 * 16)}
        assert each.counted(Count.SKETCH_ROUNDS)["complete"] >= 4
        assert not each.counted(Count.SKETCHES_LOST)
        told = {(row["kind"], row["direction"]): row["bytes"] for row in each.peer.links.state.snapshot()["bytes"]}
        assert told["gradient-sketch", "out"] * 2 == told["gradient-sketch", "in"] > 0
        weights = [t.detach().clone() for slot in sorted(each.peer.composer.owned) for t in _weights(each, slot)]
        each.collect(1)
        after = [t for slot in sorted(each.peer.composer.owned) for t in _weights(each, slot)]
        assert any(not torch.equal(a, b) for a, b in zip(weights, after, strict=True))
        left = each.peer.ask(lambda c: {at: copy.deepcopy(each).of_step() for at, each in c.shares.items()})
        for at, [share] in shares.items():
            assert sum(later.left for later in left[at]) == max(0, share.left - 1), "the step has used a share"


def _weights(each: Sketching, slot: int) -> list[Tensor]:
    return [expert.down for expert in each.peer.composer.experts_of(slot)]


def test_what_is_of_another_interval_is_dropped_and_counted(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, _, (one, other) = settled
    interval = one.rounds.intervals.next
    lost = other.counted(Count.SKETCHES_LOST).get("another-interval", 0)
    other.collect(1)
    other.peer.ask(lambda _: setattr(other.collector, "interval", interval - 2))  # openings did not reach it
    one.peer.step(EVERY)
    swarm.until(lambda: other.counted(Count.SKETCHES_LOST).get("another-interval", 0) == lost + 2, "it is counted")
    assert other.peer.ask(lambda _: other.collector.interval) == interval + 1
    assert other.peer.ask(lambda _: other.collector.tokens) == 0


def test_rounds_that_find_nobody_are_counted_and_training_goes_on(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, _, (one, other) = settled
    lost = one.counted(Count.SKETCHES_LOST).get("no-group", 0)
    other.seat.broken = True
    try:
        one.peer.step(EVERY)
        swarm.until(lambda: one.counted(Count.SKETCHES_LOST).get("no-group", 0) == lost + 2, "its sums found nobody")
        swarm.until(lambda: other.counted(Count.SKETCH_ROUNDS).get("failed", 0) >= 2, "the other could not come")
    finally:
        other.seat.broken = False
    swarm.until(lambda: not one.rounds.running, "all its rounds have ended")
    learned = other.receiver.learned
    one.peer.step(EVERY)
    swarm.until(lambda: other.receiver.learned == learned + 2, "the next interval works")


def test_the_next_round_of_a_slot_waits_for_the_last_one(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    """The straggler that a round waits for may open the next one meanwhile."""
    swarm, _, (one, other) = settled
    busy = one.counted(Count.SKETCH_ROUNDS).get("busy", 0)
    owner, number = other.peer.peer_id, one.rounds.intervals.next
    sketch, slot = torch.ones(one.form.numel), 2

    def bring(interval: int) -> asyncio.Future[Any]:
        work = one.rounds.round(slot, interval, sketch, tokens=5, owner=owner, epoch=3)
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, swarm.network.loop))

    async def three() -> list[Any]:
        ended = [bring(number), bring(number + 1)]
        await asyncio.sleep(0)  # both have begun
        assert await bring(number + 2) == "busy"
        assert not any(future.done() for future in ended)
        first = await ended[0]  # only then does the next one look for its owner
        receive = other.rounds.round(slot, number + 1, None, tokens=0, owner=owner, epoch=3)
        return [first, *await asyncio.gather(ended[1], receive)]

    first, second, received = swarm.call(three())
    assert first == "no-group"  # the owner did not come to that one
    assert torch.equal(second.average, received.average)
    assert one.counted(Count.SKETCH_ROUNDS)["busy"] == busy + 1


def test_a_round_that_is_cancelled_while_it_waits_does_not_keep_its_slot(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, _, (one, other) = settled
    number, sketch, slot = one.rounds.intervals.next, torch.ones(one.form.numel), 1

    def bring(interval: int) -> asyncio.Task[Any]:
        work = one.rounds.round(slot, interval, sketch, tokens=5, owner=other.peer.peer_id, epoch=3)
        return asyncio.get_running_loop().create_task(work)

    async def three() -> list[Any]:
        first, second = bring(number), bring(number + 1)
        await asyncio.sleep(0)  # both have begun
        second.cancel()
        third = bring(number + 2)
        return await asyncio.gather(first, second, third, return_exceptions=True)

    first, second, third = swarm.call(three())
    assert (first, type(second), third) == ("no-group", asyncio.CancelledError, "no-group")


def test_a_mean_that_is_no_gradient_is_refused(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, meeting, both = settled
    both[1].collect(1)
    both[0].collect(1)  # takes in what has come before
    before = [each.counted(Count.REFUSALS).get("sketch-not-finite", 0) for each in both]
    meeting.spoiled = True
    try:
        both[0].peer.step(EVERY)
        swarm.until(
            lambda: (
                [each.counted(Count.REFUSALS).get("sketch-not-finite", 0) for each in both]
                == [2 + number for number in before]
            ),
            "both refuse it for both of their slots",
        )
    finally:
        meeting.spoiled = False
    assert not any(each.peer.ask(lambda c: dict(c._sums)) for each in both)


def test_an_owner_that_has_let_go_learns_nothing(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    _, _, (one, _) = settled
    before, sums = one.counted(Count.REFUSALS).get("sketch-not-owner", 0), one.peer.ask(lambda c: dict(c._sums))
    mean = torch.zeros(one.form.numel)
    one.peer.ask(lambda c: one.receiver._learn(c, 0, 2, 0, mean, 10.0, 1, one.peer.peer_id))  # an earlier lease
    one.peer.ask(lambda c: one.receiver._learn(c, 3, 3, 0, mean, 10.0, 1, one.peer.peer_id))  # the other's slot
    assert one.counted(Count.REFUSALS)["sketch-not-owner"] == before + 2
    assert one.peer.ask(lambda c: dict(c._sums)) == sums


def test_only_composers_open_and_not_far_ahead(
    settled: tuple[Loopback, SketchMeeting, list[Sketching]],
) -> None:
    swarm, _, (victim, other) = settled
    number = victim.rounds.intervals.next

    async def hear(sender: str, interval: int) -> None:
        victim.rounds.on_sketch_open(sender, SketchOpen(interval, 1))

    swarm.call(hear("12D3KooWstranger", number))
    assert victim.counted(Count.REFUSALS)["sketch-open-not-a-composer"] == 1
    swarm.call(hear(other.peer.peer_id, number + AHEAD + 1))
    assert victim.counted(Count.REFUSALS)["sketch-open-far-ahead"] == 1
    assert victim.rounds.intervals.next == number
