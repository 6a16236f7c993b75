"""Outer steps as a peer lives them: when a fragment's round is due, what it sends, how its result becomes common.

Each fragment has rounds of its own (`protocol/averaging/cadence.py`), and a few of them are under way at the same time.
One round goes like this, for every member:

    due -> begin_round (trainer) -> all-reduce (averager process) -> proposal -> vote -> quorum -> commit (trainer)

Training never waits: the trainer hands over a copy and goes on; the commit is posted to it between two steps. What is
voted for, and what is common, is `common_state.py`. A round without a commit changes nothing and is tried again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ...protocol.averaging.averaging import Outcome, OuterAverager, Status
from ...protocol.averaging.cadence import Cadence, Grace
from ...protocol.averaging.merging import digest as digest_of
from ...protocol.averaging.rounds import fragment_of
from ...protocol.directory.records import MAX_MEMBERS
from ...protocol.directory.standing import ACTIVE_PHASES
from ...protocol.errors import RoundFailed
from ...protocol.messages import RoundOpen
from ..learning.composer import Composer, Entry
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import NEWS_TOPIC, Links
from ..watching.state import Count
from .common_state import SPLIT_SECONDS, CommonState, Held

log = get_logger(__name__)

# Votes travel by gossip in milliseconds: who saw a round fail looks so long for the votes of those who did not.
DECISION_SECONDS = 10.0
# Who has voted keeps to it for longer than a split lasts before it is mended. Another vote for the same round could
# commit a second state of it, where somebody else counts the first one's votes late.
HOLD_SECONDS = SPLIT_SECONDS + 15.0
# A composer that has finished keeps joining rounds until its last steps are merged; this is how often it looks.
IDLE_POLL_SECONDS = 0.25
RETRY_SECONDS = 1.0
MAX_ATTEMPT = 1 << 15
ATTEMPTS_AHEAD = 64  # how far one message may advance the attempt; nobody may take it to its end at once


@dataclass
class _Lane:
    """One fragment's rounds.

    Between rounds the loop may commit what others merged, in a round only what the round brings. `in_flight`, which
    the training thread sets, and `catching_up`, the loop's, keep the two apart: each side sets its own before it looks
    at the other's.
    """

    index: int
    cadence: Cadence
    in_flight: bool = False
    catching_up: bool = False
    done: int | None = None  # the due step that the last round stood for
    not_before: float = 0.0  # monotonic seconds; a failed round waits a little before it is tried again
    opened: int = -1  # the highest round that some peer, or this one, is looking for members for
    attempts: dict[int, int] = field(default_factory=dict)  # by round: the attempt to make next
    heed_from: dict[str, float] = field(default_factory=dict)  # by sender, monotonic seconds: its attempts count again

    def failed(self, number: int) -> None:
        """The group that met was no good."""
        self.attempts[number] = min(self.attempts.get(number, 0) + 1, MAX_ATTEMPT)


class OuterDriver:
    """Drives all rounds of one composer. `after_step` runs on the training thread, the rest on the asyncio loop.

    Args:
        common: the state that rounds start from and end in.
        cadences: of each fragment.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Composer],
        averager: OuterAverager,
        common: CommonState,
        cadences: Sequence[Cadence],
    ) -> None:
        self._links, self._trainer, self._averager, self.common = links, trainer, averager, common
        self._lanes = [_Lane(index, cadence) for index, cadence in enumerate(cadences)]
        spec = links.manifest.outer
        overlap = spec.overlap_steps or max(1, spec.in_flight * spec.every_steps // spec.fragments)
        self._grace = Grace(overlap, spec.matchmaking_seconds)
        self._in_flight_limit = spec.in_flight
        self._stepped: tuple[float, int] | None = None  # monotonic seconds when the last step ended, and its number
        self._polled: Future[None] | None = None

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Begin the rounds that are due: this peer's own cadence came round, or another peer opened one."""
        now = time.monotonic()
        if self._stepped is not None:
            began, step = self._stepped  # an island takes several at once
            self._grace.took_step((now - began) / max(1, composer.step - step))
        self._stepped = now, composer.step
        self._begin_due(composer)

    def _begin_due(self, composer: Composer) -> None:
        if self._links.num_active < 2 or self._links.state.phase not in ACTIVE_PHASES:
            return  # who leaves begins nothing that its going would cut off
        due = sorted(
            (not awaited, number, lane.index)
            for lane in self._lanes
            if not lane.in_flight and time.monotonic() >= lane.not_before
            for number in [self.common.next_round(lane.index)]
            for awaited in [lane.opened >= number]
            if awaited or self._is_due(composer, lane)
        )
        # All choose alike, so that nobody waits in one fragment's round for who waits in another's.
        for _, number, index in due[: max(0, self._in_flight_limit - sum(lane.in_flight for lane in self._lanes))]:
            self._begin(composer, self._lanes[index], number)

    @staticmethod
    def _is_due(composer: Composer, lane: _Lane) -> bool:
        if composer.step >= composer.train.steps:
            return composer.steps_since_commit(lane.index) > 0
        if lane.done is None:
            lane.done = lane.cadence.before(composer.step - 1)
        return composer.step >= lane.cadence.after(lane.done)

    def _begin(self, composer: Composer, lane: _Lane, number: int) -> None:
        lane.in_flight = True
        if lane.catching_up:
            lane.in_flight = False
            return
        lane.done = lane.cadence.nearest(composer.step)
        lane.opened = max(lane.opened, number)
        entry = composer.begin_round(lane.index)
        self._links.loop.call_soon_threadsafe(lambda: self._links.spawn(self._round(lane, number, entry)))

    @staticmethod
    def _give_up(composer: Composer, lane: _Lane, told: bool) -> None:
        """The next round may begin only after this: it must not be given up in its place."""
        if told:
            composer.doubt_round(lane.index)
        else:
            composer.withdraw_round(lane.index)
        lane.in_flight = False

    def unmerged_steps(self, composer: Composer) -> int:
        """Inner steps that some fragment's common state does not have yet."""
        return max(composer.steps_since_commit(lane.index) for lane in self._lanes)

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def on_round_open(self, sender: str, message: RoundOpen) -> None:
        """Another composer is looking for members: join between two steps, at its attempt."""
        if sender not in self._links.active_composers() or sender in self.common.shunned:
            return
        parts = len(self._lanes)
        lane = self._lanes[fragment_of(message.round, parts)]
        number = self.common.next_round(lane.index)
        if message.round < number:
            self.common.remind(sender, lane.index)  # it has missed a commit
        elif message.round <= number + parts:
            lane.opened = max(lane.opened, message.round)
            known, now = lane.attempts.get(message.round, 0), time.monotonic()
            if message.attempt > known and now >= lane.heed_from.get(sender, -math.inf):
                # Once in the time of a meeting: whoever names another one all the time would keep others from meeting.
                lane.heed_from[sender] = now + self._links.manifest.outer.matchmaking_seconds
                lane.attempts[message.round] = min(message.attempt, known + ATTEMPTS_AHEAD, MAX_ATTEMPT)
            else:
                lane.attempts[message.round] = known

    async def _round(self, lane: _Lane, number: int, entry: Entry) -> None:
        began, index = time.monotonic(), lane.index
        outcome, members, detail, told = "failed", 0, "", False
        try:
            result = await self._average(lane, number, entry)
            outcome, members, detail = result.status.value, len(result.members), result.detail
            self._links.state.count(Count.BYTES, "outer", "out", by=result.bytes_sent)
            self._links.state.count(Count.BYTES, "outer", "in", by=result.bytes_received)
            told = result.status not in (Status.NO_GROUP, Status.REFUSED)
            if not told:  # what others have committed meanwhile is without it
                await asyncio.wrap_future(self._trainer.ask(lambda composer: composer.withdraw_round(index)))
            if result.status is Status.COMPLETE:
                await self._propose(index, number, result)
            elif result.status is Status.REFUSED and not result.members:
                await self._go_back(index, result.detail)  # to be met at the same attempt
            elif result.status is not Status.NO_GROUP:
                lane.failed(number)
            # Others may have completed what this peer saw fail: look for their votes either way.
            wait = {Status.COMPLETE: HOLD_SECONDS, Status.PARTIAL: DECISION_SECONDS}.get(result.status, 0.0)
            if await self.common.decided(index, number, wait):
                outcome = "committed"
                self._grace.took_round(
                    result.quorum_seconds, max(0.0, time.monotonic() - began - result.matchmaking_seconds)
                )
            elif result.status is Status.COMPLETE:
                outcome = "no_quorum"
                lane.failed(number)
            self._judge(result, committed=outcome == "committed")
        except (RoundFailed, ValueError) as error:  # the averager is gone, or the average is too large to be one
            log.warning("outer.round_failed", round=number, error=str(error))
        finally:
            if outcome == "committed":
                lane.in_flight = False
            else:
                lane.not_before = time.monotonic() + RETRY_SECONDS
                self._trainer.ask(lambda composer: self._give_up(composer, lane, told))
            seconds = time.monotonic() - began
            self._links.state.record_round(
                outcome=outcome, round=number, fragment=index, members=members, seconds=seconds
            )
            log.info(
                "outer.round", round=number, fragment=index, outcome=outcome, members=members,
                steps=entry.steps, seconds=round(seconds, 2), detail=detail,
            )  # fmt: skip

    async def _go_back(self, index: int, why: str) -> None:
        """To a fragment's common state, which is sound: what was learned here since then can go nowhere."""
        await asyncio.wrap_future(
            self._trainer.ask(
                lambda composer: composer.reset_fragment(index, composer.common[index], composer.momentum[index])
            )
        )
        error = RoundFailed(
            f"what fragment {index} of the backbone learned here is lost: {why}",
            fix="it goes on from what was merged last; if it happens again, test this machine's memory",
        )
        self._links.state.note_error(error)
        log.error("outer.went_back", fragment=index, error=str(error))

    def _judge(self, result: Outcome, *, committed: bool) -> None:
        """Remember what the round says about its members."""
        reputation = self.common.reputation
        if committed:
            reputation.committed(result.members)
        spare = len(set(self._links.active_composers()) - self.common.shunned) - self._links.quorum()
        for peer in reputation.failed(result.proven, result.suspicion, time.monotonic(), spare):
            self._links.state.count(Count.REFUSALS, "round-spoiled")
            log.warning("outer.shunned", peer=peer, reason=result.failed.get(peer, "keeps rounds from completing"))

    async def _average(self, lane: _Lane, number: int, entry: Entry) -> Outcome:
        index, shunned = lane.index, self.common.shunned
        composers, quorum = set(self._links.active_composers()), self._links.quorum()
        if quorum > MAX_MEMBERS:
            raise RoundFailed(
                f"{quorum} composers have to agree, and a round holds {MAX_MEMBERS}",
                fix="let some of them leave, or own experts without text (`--role worker`)",
            )
        attempt = lane.attempts.get(number, 0)
        lane.attempts = {n: a for n, a in lane.attempts.items() if n >= number}
        opening = RoundOpen(round=number, attempt=attempt, fragment=index, step=entry.steps)
        await self._links.gossip(NEWS_TOPIC, opening)
        # Who has finished has nothing new to say, but its vote counts towards the quorum: with one token it weighs
        # nothing.
        future = self._averager.submit(
            number,
            attempt,
            entry.vector,
            tokens=max(1, entry.tokens),
            steps=max(1, entry.steps),
            expected=max(2, len(composers - shunned)),
            quorum=quorum,
            grace=self._grace.seconds,
            base=self.common.held[index].digest,
            avoid=shunned,
            norms=entry.norms,
        )
        result = asyncio.wrap_future(future)
        while not result.done():
            changed = asyncio.ensure_future(self._links.news.next_change().wait())
            if self.common.committed_elsewhere(index, number):
                self._averager.abandon(number)
            either: set[asyncio.Future[Any]] = {result, changed}
            await asyncio.wait(either, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return result.result()

    async def _propose(self, index: int, number: int, result: Outcome) -> None:
        average = result.average
        assert average is not None
        fragment, momentum = await asyncio.wrap_future(
            self._trainer.ask(lambda composer: composer.propose(index, average, result.facts))
        )
        held = Held(number, digest_of(fragment, momentum), tuple(result.members))
        await self.common.propose(index, held, fragment, momentum)

    async def run(self) -> None:
        """Until cancelled: keep up with what others committed, each fragment by itself, and keep own votes alive in the
        directory meanwhile: fetching a fragment may take longer than a vote lives."""
        works = [self._stay_heard(), *(self._keep_up(lane) for lane in self._lanes)]
        tasks = [asyncio.ensure_future(work) for work in works]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _stay_heard(self) -> None:
        while True:
            changed = self._links.news.next_change()
            if self._polled is None or self._polled.done():
                self._polled = self._trainer.ask(self._poll_idle)
            self.common.repeat_votes(after=self._links.record_seconds / 3)
            await self._links.news.wait(changed, IDLE_POLL_SECONDS)

    async def _keep_up(self, lane: _Lane) -> None:
        while True:
            changed = self._links.news.next_change()
            lane.catching_up = True
            try:
                if not lane.in_flight:
                    await self.common.catch_up(lane.index)
            finally:
                lane.catching_up = False
            await self._links.news.wait(changed, IDLE_POLL_SECONDS)

    def _poll_idle(self, composer: Composer) -> None:
        """A finished composer takes no steps that could call `after_step`."""
        if composer.step >= composer.train.steps:
            self._begin_due(composer)
