"""Outer rounds as virtual peers live them, with vectors of a few hundred floats through the real merge.

    open -> meet -> average in one group, or in rows and columns -> vote -> quorum -> commit

What is due when, who may join, and what follows from an outcome is `node/backbone/outer.py` without its waiting;
groups, sums, weights and the outer step are the very functions of `protocol/`. Up to 64 members average as the node
does: who dies in it fails it for all. More of them average as `protocol/averaging/grouping.py` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...protocol.averaging.cadence import Grace
from ...protocol.averaging.grouping import Grid, Sums, add, contributions, plan, sent_bytes
from ...protocol.averaging.merging import Facts, shares, weights
from ...protocol.averaging.robust import robust_mean
from ...protocol.averaging.rounds import fragment_of
from .commits import NUMEL, SPLIT_SECONDS, Commits, State
from .world import VirtualPeer, World

DECISION_SECONDS = 10.0  # these three as in `node/backbone/outer.py`
HOLD_SECONDS = SPLIT_SECONDS + 15.0
RETRY_SECONDS = 1.0
PROGRESS = 0.01  # of the way to where training leads, in one step
HANDSHAKES = 6  # one-way delays that an all-reduce takes beside its bytes


@dataclass
class Meeting:
    """One attempt at one round, on one side."""

    round: int
    attempt: int
    leader: VirtualPeer
    opened: float
    quorum_seconds: float = 0.0  # until one was there
    arrivals: dict[str, tuple[float, VirtualPeer]] = field(default_factory=dict)  # by peer id; when it is there


@dataclass
class Averaging:
    """A meeting that has become a group, or a grid of groups."""

    meeting: Meeting
    fragment: int
    base: bytes
    grid: Grid
    members: dict[str, VirtualPeer]  # by peer id
    facts: dict[str, Facts]
    slow: set[str]  # cannot send in time
    until: dict[str, float]  # by peer id: the time up to which its work is in what it sends
    rows: list[Sums | None] = field(default_factory=list)  # what each came to

    def is_there(self, world: World, peer_id: str) -> bool:
        """Whether a member still is."""
        peer = self.members[peer_id]
        return peer.alive and world.board.together(peer.cohort, self.meeting.leader.cohort)

    def state(self, members: Iterable[str], coverage: float) -> State:
        """What its members are about to vote for, but for the outer step."""
        empty = torch.empty(0)
        tokens = {peer: self.facts[peer].tokens for peer in members}
        number, opened = self.meeting.round, self.meeting.opened
        until = {peer: self.until[peer] for peer in tokens}
        return State(self.fragment, number, self.base, empty, empty, tokens, until, coverage, opened)


class RoundLife:
    """All rounds of all peers."""

    def __init__(self, world: World, commits: Commits) -> None:
        self._world, self._commits = world, commits
        spec, self._cadences = world.manifest.outer, world.wire.cadences
        self._parts, self._in_flight = spec.fragments, spec.in_flight
        self._overlap = spec.overlap_steps or max(1, spec.in_flight * spec.every_steps // spec.fragments)
        self._generator = torch.Generator().manual_seed(world.engine.seed)
        self._target = torch.randn(NUMEL, generator=self._generator)
        self._meetings: dict[tuple[int, int, bool], Meeting] = {}
        commits.on_commit = self._committed

    # -- beginning -------------------------------------------------------------------------------------------------

    def starts(self, peer: VirtualPeer) -> None:
        """It trains from now on."""
        peer.merged_until = [self._world.now] * self._parts
        peer.grace = Grace(self._overlap, self._world.manifest.outer.matchmaking_seconds)
        peer.grace.took_step(peer.step_seconds)
        for fragment, cadence in enumerate(self._cadences):
            peer.done[fragment] = cadence.before(peer.first_step)
            self._schedule(peer, fragment)

    def _committed(self, peer: VirtualPeer) -> None:
        for fragment, number in list(peer.in_round.items()):
            if number < peer.next_round(fragment):
                del peer.in_round[fragment]
                quorum_seconds, started = peer.met[fragment]
                if peer.grace is not None:
                    peer.grace.took_round(quorum_seconds, self._world.now - started)
                self._schedule(peer, fragment)

    def _schedule(self, peer: VirtualPeer, fragment: int) -> None:
        if peer.active:
            due = self._cadences[fragment].after(peer.done[fragment]) - peer.first_step
            when = max(peer.trains_from + due * peer.step_seconds, peer.not_before.get(fragment, 0.0), self._world.now)
            self._world.engine.at(when, self._due, peer, fragment, peer.done[fragment])

    def _due(self, peer: VirtualPeer, fragment: int, done: int) -> None:
        """Its own cadence has come round, unless another round came first."""
        world = self._world
        if not peer.active or fragment in peer.in_round or peer.done[fragment] != done:
            return
        if world.now < peer.not_before.get(fragment, 0.0):
            return
        if world.board.num_active(peer.cohort) < 2 or len(peer.in_round) >= self._in_flight:
            world.engine.after(peer.step_seconds, self._due, peer, fragment, done)
        else:
            self._open(peer, peer.next_round(fragment))

    def _open(self, peer: VirtualPeer, number: int) -> None:
        """Look for members, and tell everybody in reach. Others join between two of their steps."""
        world, fragment = self._world, fragment_of(number, self._parts)
        attempt = peer.attempts.get(number, 0)
        key = (number, attempt, peer.cohort.cut_since is None)
        world.gossiped("openings", world.wire.opening)
        if key in self._meetings:
            self._meetings[key].arrivals[peer.id] = (world.now, peer)
            return
        meeting = self._meetings[key] = Meeting(number, attempt, peer, world.now)
        meeting.arrivals[peer.id] = (world.now, peer)
        for other in world.peers.values():
            if other is peer or not other.active or not world.together(other, peer):
                continue
            if fragment not in other.in_round and 0 <= number - other.next_round(fragment) <= self._parts:
                heard = world.now + other.cohort.lag
                into_step = math.fmod(max(0.0, heard - other.trains_from), other.step_seconds)
                there = max(heard + other.step_seconds - into_step, other.not_before.get(fragment, 0.0))
                meeting.arrivals[other.id] = (there, other)
                other.attempts[number] = max(attempt, other.attempts.get(number, 0))
        times = sorted(when for when, _ in meeting.arrivals.values())
        expected, need = world.board.num_active(peer.cohort), self._commits.need(peer.cohort)
        start = world.now + world.manifest.outer.matchmaking_seconds
        if len(times) >= need:
            assert peer.grace is not None
            meeting.quorum_seconds = times[need - 1] - world.now
            start = min(start, times[need - 1] + peer.grace.seconds)
        if len(times) >= expected:
            start = min(start, times[expected - 1])
        world.engine.at(start, self._assemble, key)

    def _assemble(self, key: tuple[int, int, bool]) -> None:
        """All are there, or nobody waits any more."""
        world, meeting = self._world, self._meetings.pop(key)
        fragment = fragment_of(meeting.round, self._parts)
        base = meeting.leader.held[fragment].digest
        there = [
            peer
            for when, peer in meeting.arrivals.values()
            if when <= world.now
            and peer.active
            and fragment not in peer.in_round
            and (peer.cohort.cut_since is None) == key[2]
        ]
        members = [p for p in there if p.next_round(fragment) <= meeting.round and p.held[fragment].digest == base]
        enough = bool(members) and len(members) >= max(self._commits.need(peer.cohort) for peer in members)
        for peer in there:  # the steps until its next round count from here
            peer.done[fragment] = self._cadences[fragment].nearest(peer.step(world.now))
        if not enough:
            world.measures.rounds["no_group"] += 1
            world.engine.note("round.no_group", round=meeting.round, attempt=meeting.attempt, members=len(members))
            for peer in there:
                self._retry_soon(peer, fragment)
            return
        world.engine.note("round.met", round=meeting.round, attempt=meeting.attempt, members=len(members))
        for peer in members:
            peer.in_round[fragment] = meeting.round
            peer.met[fragment] = (meeting.quorum_seconds, world.now)
        for peer in there:
            if fragment not in peer.in_round:
                self._schedule(peer, fragment)
        self._average(meeting, members, fragment, base)

    def _retry_soon(self, peer: VirtualPeer, fragment: int) -> None:
        peer.not_before[fragment] = self._world.now + RETRY_SECONDS
        self._world.engine.at(peer.not_before[fragment], self._due, peer, fragment, peer.done[fragment])

    # -- averaging -------------------------------------------------------------------------------------------------

    def _average(self, meeting: Meeting, members: Sequence[VirtualPeer], fragment: int, base: bytes) -> None:
        """Send all off; what comes of it is known when the slowest row is through."""
        world, wire = self._world, self._world.wire
        grid = plan([peer.id for peer in members], meeting.round)
        facts, until = {}, {}
        for peer in members:
            since = peer.merged_until[fragment]
            steps = peer.steps(world.now - since)
            facts[peer.id] = Facts(peer.id, max(1, steps * world.tokens_per_step), max(1, steps))
            until[peer.id] = since + steps * peer.step_seconds
        world.sent("merging", sent_bytes(grid, wire.fragments[fragment], wire.sums[fragment]) * len(members))
        world.sent("facts", sum(len(row) ** 2 for row in grid.rows) * wire.facts)
        limit = world.manifest.outer.timeout_seconds
        seconds = {peer.id: self._seconds(peer, wire.fragments[fragment]) for peer in members}
        slow = {peer for peer, needed in seconds.items() if needed > limit}
        run = Averaging(meeting, fragment, base, grid, {peer.id: peer for peer in members}, facts, slow, until)
        done = self._rows_done if grid.num_columns else self._group_done
        world.engine.after(min(limit, max(seconds.values())), done, run)

    @staticmethod
    def _seconds(peer: VirtualPeer, nbytes: float) -> float:
        """Of an all-reduce, for one member: the parts of its vector to all others, and its part's average too."""
        return HANDSHAKES * peer.latency + 2 * nbytes / peer.uplink

    def _vectors(self, run: Averaging, members: Sequence[str]) -> dict[str, Tensor]:
        """Pseudo-gradients: away from where training leads, and the noise of each member's own text."""
        common = self._commits.states[run.base].tensor
        noise = 0.1 * torch.randn(len(members), NUMEL, generator=self._generator)
        return {
            peer: (common - self._target + noise[index]) * min(1.0, PROGRESS * run.facts[peer].steps)
            for index, peer in enumerate(members)
        }

    def _group_done(self, run: Averaging) -> None:
        """One group: complete only if all are still there, as the node's all-reduce has it."""
        world, (row,) = self._world, run.grid.rows
        missing = [peer for peer in row if not run.is_there(world, peer) or peer in run.slow]
        if missing:
            world.measures.rounds["partial"] += 1
            world.engine.note("round.partial", round=run.meeting.round, missing=len(missing))
            for peer in run.members.values():
                self._again(peer, run.meeting.round)
            return
        vectors, share = self._vectors(run, row), shares(weights([run.facts[peer] for peer in row]))
        if world.manifest.outer.robust:
            average = robust_mean([vectors[peer] for peer in row], [share[peer] for peer in row])
        else:
            total = torch.stack([vectors[peer].double() * share[peer] for peer in row]).sum(0)
            average = (total / sum(share.values())).float()
        self._propose(run, average, run.state(row, 1.0), row)

    def _rows_done(self, run: Averaging) -> None:
        """Rows have their sums; who was too slow, or has gone, is not in them. Then the columns."""
        world = self._world
        for row in run.grid.rows:
            here = [peer for peer in row if run.is_there(world, peer) and peer not in run.slow]
            parts = contributions([run.facts[peer] for peer in here], self._vectors(run, here)) if here else []
            run.rows.append(add(parts) if parts else None)
        limit, nbytes = world.manifest.outer.timeout_seconds, world.wire.sums[run.fragment]
        seconds = max(self._seconds(peer, nbytes) for peer in run.members.values() if peer.id not in run.slow)
        world.engine.after(min(seconds, limit), self._columns_done, run)

    def _columns_done(self, run: Averaging) -> None:
        world, number = self._world, run.meeting.round
        row_of = {peer: index for index, row in enumerate(run.grid.rows) for peer in row}
        present = {peer for peer in run.members if peer not in run.slow and run.is_there(world, peer)}
        everybody = sum(sum(weights([run.facts[peer] for peer in row]).values()) for row in run.grid.rows)
        found: Tensor | None = None
        for index in range(run.grid.num_columns):
            column = run.grid.column(index, present)
            parts = [part for peer in column if (part := run.rows[row_of[peer]]) is not None]
            if not parts:
                continue
            total = add(parts)
            average = total.average()
            world.engine.require(found is None or torch.equal(found, average), f"columns of round {number} differ")
            found = average
            state = run.state(total.members, min(1.0, total.weight / everybody))
            self._propose(run, average, state, [p for p in run.grid.standing_in(index) if p in present])
        for peer_id, peer in run.members.items():  # who has no result looks for the others' votes
            if peer_id not in present:
                world.engine.after(DECISION_SECONDS, self._give_up, peer, number)

    def _propose(self, run: Averaging, average: Tensor, state: State, here: Sequence[str]) -> None:
        voters = [run.members[peer] for peer in here if run.members[peer].alive]
        for peer in voters:
            self._world.engine.after(HOLD_SECONDS, self._give_up, peer, state.round)
        self._commits.propose(state, average, voters)

    # -- failing ---------------------------------------------------------------------------------------------------

    def _give_up(self, peer: VirtualPeer, number: int) -> None:
        """No quorum has come in time, unless it has by now."""
        fragment = fragment_of(number, self._parts)
        if not peer.alive or peer.in_round.get(fragment) != number:
            return
        self._commits.catch_up(peer, fragment)
        if peer.in_round.get(fragment) == number and fragment not in peer.fetching:
            self._world.measures.rounds["no_quorum"] += 1
            self._world.engine.note("round.no_quorum", peer=peer.name, round=number)
            self._again(peer, number)

    def _again(self, peer: VirtualPeer, number: int) -> None:
        """An attempt has failed: nothing has changed, and the next one follows soon."""
        fragment = fragment_of(number, self._parts)
        if peer.alive and peer.in_round.get(fragment) == number:
            del peer.in_round[fragment]
            peer.attempts = {
                n: attempt for n, attempt in peer.attempts.items() if n >= peer.next_round(fragment_of(n, self._parts))
            }
            peer.attempts[number] = peer.attempts.get(number, 0) + 1
            self._retry_soon(peer, fragment)
