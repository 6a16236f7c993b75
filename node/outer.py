"""Outer steps as a peer lives them: when a round is due, what it sends, how a result becomes the common state.

Rounds are numbered across the swarm; round r merges fragment r mod P. One round goes like this, for every member:

    due -> begin_round (trainer) -> all-reduce (averager process) -> proposal -> vote -> quorum -> commit (trainer)

Training never waits: the trainer hands over a copy and goes on; the commit is posted to it between two steps. A vote
names the sha256 of (fragment, momentum). The digest that a quorum of active composers backs is the common state; who
holds another one, or none, fetches it from a backer. A round without a commit changes nothing and is tried again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..protocol import resources
from ..protocol.averaging import Outcome, OuterAverager, Status
from ..protocol.errors import FetchFailed, PeerUnreachable, Refused, RoundFailed
from ..protocol.fragments import Fragment
from ..protocol.merging import digest as digest_of
from ..protocol.messages import RoundOpen
from ..protocol.records import VoteRecord
from ..protocol.reputation import Reputation
from ..protocol.rounds import fragment_of, latest_commit, most_held, tally
from ..protocol.standing import ACTIVE_PHASES
from .blobs import fragment_from_bytes
from .composer import Composer, Entry
from .links import NEWS_TOPIC, Links
from .logs import get_logger
from .state import Count
from .trainer import Trainer

log = get_logger(__name__)

FETCH_SECONDS = 60.0
# Votes travel by gossip in milliseconds; what has no quorum after this long had no quorum.
DECISION_SECONDS = 10.0
# A composer that has finished keeps joining rounds until its last steps are merged; this is how often it looks.
IDLE_POLL_SECONDS = 0.25
RETRY_SECONDS = 1.0
REPEAT_SECONDS = 0.5
MAX_ATTEMPT = 1 << 15
ATTEMPTS_AHEAD = 64  # how far one message may advance the attempt; nobody may take it to its end at once
# Composers that came back from disk with different rounds have no quorum for any; this long they look for one.
SPLIT_SECONDS = 30.0


@dataclass(frozen=True)
class Held:
    """The common state of one fragment that this peer has."""

    round: int  # that made it; -1: the seed
    digest: bytes
    members: tuple[str, ...] = ()  # who is known to have contributed


@dataclass(frozen=True)
class _Proposal:
    fragment: Tensor
    momentum: Tensor
    held: Held  # what this peer has if it is committed


class OuterDriver:
    """Drives all rounds of one composer. `after_step` runs on the training thread, the rest on the asyncio loop.

    Between rounds the loop may commit what others merged, in rounds only what the round brings. `_in_flight` and
    `_catching_up` keep the two apart: each side sets its own before it looks at the other's.

    Args:
        fragments: of the backbone, as given to the averager.
        held: per fragment, the common state that the composer starts from.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Composer],
        averager: OuterAverager,
        fragments: Sequence[Fragment],
        held: list[Held],
    ) -> None:
        self._links, self._trainer, self._averager, self._fragments = links, trainer, averager, fragments
        self.held = held
        links.state.set_held((state.round, state.digest) for state in held)
        spec = links.manifest.outer
        self._due_steps = max(1, spec.every_steps // spec.fragments)
        self._last_round_step = 0
        self._in_flight = False
        self._catching_up = False
        self._polled: Future[None] | None = None
        self._split_since: dict[int, float] = {}  # by fragment: monotonic seconds
        self._not_before = 0.0  # monotonic seconds; a failed round waits a little before it is tried again
        self._attested = -math.inf  # monotonic seconds; when own votes were last repeated
        self._opened = -1  # the highest round that some peer was heard to open
        self._attempts: dict[int, int] = {}  # by round: the attempt to make next
        self._proposals: dict[int, _Proposal] = {}  # by fragment: voted for, not committed yet
        self._reputation = Reputation(links.peer_id)

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Begin a round if one is due: this peer's own cadence came round, or another peer opened it."""
        if self._in_flight or self._links.num_active < 2 or time.monotonic() < self._not_before:
            return
        if self._links.state.phase not in ACTIVE_PHASES:
            return  # who leaves begins nothing that its going would cut off
        number = self.next_round
        pending = composer.step >= composer.train.steps and self.unmerged_steps(composer) > 0
        due = composer.step - self._last_round_step >= self._due_steps
        if not (due or pending or self._opened >= number):
            return
        index = fragment_of(number, len(self.held))
        self._in_flight = True
        if self._catching_up:
            self._in_flight = False
            return
        self._last_round_step = composer.step
        entry = composer.begin_round(index)
        self._links.loop.call_soon_threadsafe(lambda: self._links.spawn(self._round(number, index, entry)))

    def _give_up(self, composer: Composer, index: int) -> None:
        """The next round may begin only after this: it must not be abandoned in its place."""
        composer.abandon_round(index)
        self._in_flight = False

    def unmerged_steps(self, composer: Composer) -> int:
        """Inner steps that some fragment's common state does not have yet."""
        return max(composer.steps_since_commit(index) for index in range(len(self.held)))

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    @property
    def next_round(self) -> int:
        """The number of the round to come."""
        return 1 + max(held.round for held in self.held)

    def on_round_open(self, sender: str, message: RoundOpen) -> None:
        """Another composer is looking for members: join between two steps, at its attempt."""
        if sender not in self._links.active_composers() or sender in self._shunned:
            return
        if message.round < self.next_round:
            self._repeat_votes()  # its sender has missed a commit
        elif message.round <= self.next_round + len(self.held):
            self._opened = max(self._opened, message.round)
            known = self._attempts.get(message.round, 0)
            self._attempts[message.round] = max(known, min(message.attempt, known + ATTEMPTS_AHEAD, MAX_ATTEMPT))

    async def _round(self, number: int, index: int, entry: Entry) -> None:
        began = time.monotonic()
        outcome, members, detail = "failed", 0, ""
        try:
            result = await self._average(number, entry)
            outcome, members, detail = result.status.value, len(result.members), result.detail
            self._links.state.count(Count.BYTES, "outer", "out", by=result.bytes_sent)
            self._links.state.count(Count.BYTES, "outer", "in", by=result.bytes_received)
            if result.status is Status.COMPLETE:
                await self._propose(index, number, result)
            elif result.status is not Status.NO_GROUP:
                self._attempts[number] = min(self._attempts.get(number, 0) + 1, MAX_ATTEMPT)
            # Others may have completed what this peer saw fail: look for their votes either way.
            wait = DECISION_SECONDS if result.status in (Status.COMPLETE, Status.PARTIAL) else 0.0
            if await self._decided(index, number, wait):
                outcome = "committed"
            elif result.status is Status.COMPLETE:
                outcome = "no_quorum"
                self._attempts[number] = min(self._attempts.get(number, 0) + 1, MAX_ATTEMPT)
            self._judge(result, committed=outcome == "committed")
        except (RoundFailed, ValueError) as error:  # the averager is gone, or the average is too large to be one
            log.warning("outer.round_failed", round=number, error=str(error))
        finally:
            if outcome == "committed":
                self._in_flight = False
            else:
                self._not_before = time.monotonic() + RETRY_SECONDS
                self._trainer.ask(lambda composer: self._give_up(composer, index))
            seconds = time.monotonic() - began
            self._links.state.record_round(
                outcome=outcome, round=number, fragment=index, members=members, seconds=seconds
            )
            log.info(
                "outer.round", round=number, fragment=index, outcome=outcome, members=members,
                steps=entry.steps, seconds=round(seconds, 2), detail=detail,
            )  # fmt: skip

    @property
    def _shunned(self) -> frozenset[str]:
        return self._reputation.shunned(time.monotonic())

    def _votes(self, index: int) -> dict[str, VoteRecord]:
        shunned = self._shunned
        return {peer: vote for peer, vote in self._links.votes(index).items() if peer not in shunned}

    def _judge(self, result: Outcome, *, committed: bool) -> None:
        """Remember what the round says about its members."""
        if committed:
            self._reputation.committed(result.members)
        for peer in self._reputation.failed(result.proven, result.suspicion, time.monotonic()):
            self._links.state.count(Count.REFUSALS, "round-spoiled")
            log.warning("outer.shunned", peer=peer, reason=result.failed.get(peer, "keeps rounds from completing"))

    async def _average(self, number: int, entry: Entry) -> Outcome:
        index = fragment_of(number, len(self.held))
        composers, shunned = set(self._links.active_composers()), self._shunned
        attempt = self._attempts.get(number, 0)
        self._attempts = {n: a for n, a in self._attempts.items() if n >= number}
        opening = RoundOpen(round=number, attempt=attempt, fragment=index, step=entry.steps)
        await self._links.gossip(NEWS_TOPIC, opening)
        # Who has finished has nothing new to say, but its vote counts towards the quorum: it joins at the least weight.
        future = self._averager.submit(
            number,
            attempt,
            entry.vector,
            tokens=max(1, entry.tokens),
            steps=max(1, entry.steps),
            expected=max(2, len(composers - shunned)),
            quorum=self._links.quorum(),
            base=self.held[index].digest,
            avoid=shunned,
            norms=entry.norms,
        )
        result = asyncio.wrap_future(future)
        while not result.done():
            changed = asyncio.ensure_future(self._links.news.next_change().wait())
            if self._committed_elsewhere(index, number):
                self._averager.abandon(number)
            either: set[asyncio.Future[Any]] = {result, changed}
            await asyncio.wait(either, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        return result.result()

    def _committed_elsewhere(self, index: int, number: int) -> bool:
        """A quorum has this round, or a later one of its fragment, already: nobody will come to average it again."""
        votes = self._votes(index)
        newest = latest_commit([votes], len(self.held), self._links.quorum())
        return newest is not None and newest >= number

    def _repeat_votes(self) -> None:
        now = time.monotonic()
        if now - self._attested > REPEAT_SECONDS:
            self._attested = now
            for index, held in enumerate(self.held):
                proposal = self._proposals.get(index)
                latest = held if proposal is None else proposal.held
                if latest.round >= 0:
                    self._links.spawn(self._vote(index, latest))

    async def _propose(self, index: int, number: int, result: Outcome) -> None:
        average = result.average
        assert average is not None
        fragment, momentum = await asyncio.wrap_future(
            self._trainer.ask(lambda composer: composer.propose(index, average, result.facts))
        )
        held = Held(number, digest_of(fragment, momentum), tuple(result.members))
        self._proposals[index] = _Proposal(fragment, momentum, held)
        await self._vote(index, held)

    async def _vote(self, index: int, held: Held) -> None:
        now = self._links.clock()
        record = VoteRecord(
            round=held.round,
            fragment=index,
            digest=held.digest,
            members=list(held.members),
            issued_at=now,
            expires_at=now + self._links.record_seconds,
        )
        await self._links.announce(record)
        self._links.news.changed()

    async def _decided(self, index: int, number: int, seconds: float) -> bool:
        """Wait until this peer has the common state of round `number` or a later one; False if that does not come."""
        deadline = time.monotonic() + seconds
        while True:
            changed = self._links.news.next_change()
            await self.catch_up(index)
            if self.held[index].round >= number:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await self._links.news.wait(changed, left)

    async def catch_up(self, index: int) -> None:
        """Take the newest state of a fragment that a quorum backs: the proposal at hand, or fetched from a backer."""
        votes = self._votes(index)
        need, parts = self._links.quorum(), len(self.held)
        number = latest_commit([votes], parts, need)
        if number is None:
            await self._mend_split(index, votes)
            return
        self._split_since.pop(index, None)
        if number < self.held[index].round:
            return
        verdict = tally(votes, number, parts, need)
        if verdict.committed is None or (number, verdict.committed) == (
            self.held[index].round, self.held[index].digest
        ):  # fmt: skip
            return
        proposal = self._proposals.get(index)
        if proposal is not None and (proposal.held.round, proposal.held.digest) == (number, verdict.committed):
            await self._commit(index, proposal.held, proposal.fragment, proposal.momentum)
            return
        await self._refetch(index, number, verdict.committed, votes)

    async def _mend_split(self, index: int, votes: Mapping[str, VoteRecord]) -> None:
        """No quorum holds any state. If that lasts, all go on from the one that most hold."""
        state = most_held(votes)
        if state is None or state[0] < self.held[index].round:
            self._split_since.pop(index, None)
            return
        since = self._split_since.setdefault(index, time.monotonic())
        if time.monotonic() - since > SPLIT_SECONDS and state != (self.held[index].round, self.held[index].digest):
            self._split_since[index] = time.monotonic()  # if the fetch fails, it waits as long again
            await self._refetch(index, *state, votes)

    async def _refetch(self, index: int, number: int, digest: bytes, votes: Mapping[str, VoteRecord]) -> None:
        backing = {p: v for p, v in votes.items() if (v.round, v.digest) == (number, digest)}
        members = max((tuple(vote.members) for vote in backing.values()), key=len, default=())
        backers = [peer for peer in sorted(backing) if peer != self._links.peer_id]
        if await self.fetch_fragment(index, Held(number, digest, members), backers):
            log.info("outer.refetched", round=number, fragment=index)

    async def fetch_fragment(self, index: int, wanted: Held, backers: Sequence[str]) -> bool:
        """Download one fragment's common state from any of `backers`; whoever sends another digest is passed over."""
        numel = self._fragments[index].numel
        for peer in backers:
            try:
                resource = await self._links.fetch(
                    peer, resources.backbone(index), max_bytes=8 * numel + 4096, deadline_seconds=FETCH_SECONDS
                )
                fragment, momentum = fragment_from_bytes(resource.data, numel)
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.info("outer.fetch_failed", fragment=index, peer=peer, error=str(error))
                continue
            if digest_of(fragment, momentum) == wanted.digest:
                await self._commit(index, wanted, fragment, momentum)
                return True
        return False

    async def _commit(self, index: int, state: Held, fragment: Tensor, momentum: Tensor) -> None:
        def commit(composer: Composer) -> None:
            if self._links.peer_id not in state.members:
                composer.abandon_round(index)  # made without this peer: its work is not in it
            composer.commit_round(index, fragment, momentum)
            self.held[index] = state  # here, so that a checkpoint or a round never sees one without the other
            self._links.state.set_held((held.round, held.digest) for held in self.held)

        await asyncio.wrap_future(self._trainer.ask(commit))
        proposal = self._proposals.get(index)
        if proposal is not None and proposal.held.round <= state.round:
            del self._proposals[index]

    async def run(self) -> None:
        """Until cancelled: keep up with what others committed, and keep own votes alive in the directory."""
        while True:
            changed = self._links.news.next_change()
            await self._keep_up()
            if self._polled is None or self._polled.done():
                self._polled = self._trainer.ask(self._poll_idle)
            if time.monotonic() - self._attested > self._links.record_seconds / 3:
                self._repeat_votes()
            await self._links.news.wait(changed, IDLE_POLL_SECONDS)

    async def _keep_up(self) -> None:
        self._catching_up = True
        try:
            for index in range(len(self.held)):
                if self._in_flight:
                    return
                await self.catch_up(index)
        finally:
            self._catching_up = False

    def _poll_idle(self, composer: Composer) -> None:
        """A finished composer takes no steps that could call `after_step`."""
        if composer.step >= composer.train.steps:
            self.after_step(composer)
