"""Which proposals become the common state: votes through the real count, and a check that no history forks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...protocol.averaging.merging import digest, outer_step
from ...protocol.averaging.rounds import latest_commit, majority, most_held, quorum, tally
from ...protocol.directory.records import VoteRecord
from ...protocol.directory.standing import electorate, votes_of
from .board import NEVER, Cohort
from .wire import sealed_bytes, vote_record
from .world import Held, VirtualPeer, World

NUMEL = 256
SPLIT_SECONDS = 30.0  # as in `node/backbone/common_state.py`
MAX_LISTED = 64  # members in a vote: more than a record holds are those of one's own row
MEMBER_BYTES = 54  # of one of them


@dataclass
class State:
    """One possible common state of a fragment. Peers name it by its digest."""

    fragment: int
    round: int
    parent: bytes
    tensor: Tensor
    momentum: Tensor
    tokens: dict[str, int]  # by member
    until: dict[str, float]  # by member: the time up to which its work is in it
    coverage: float  # weight in it, of all members' weight
    opened: float


class Commits:
    """All states of all fragments, and what each peer makes of the votes.

    Attributes:
        on_commit: called with each peer that has taken a new common state.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._parts = world.manifest.outer.fragments
        self.states: dict[bytes, State] = {}
        self.chains = [[self._seed(fragment)] for fragment in range(self._parts)]  # committed digests, oldest first
        self.on_commit: Callable[[VirtualPeer], None] = lambda peer: None
        world.board.on_votes = self._heard
        for cohort in world.board.cohorts:
            world.engine.after(world.lease / 4, self._wake, cohort)

    def _seed(self, fragment: int) -> bytes:
        tensor, momentum = torch.full((NUMEL,), float(fragment)), torch.zeros(NUMEL)
        name = digest(tensor, momentum)
        self.states[name] = State(fragment, -1, name, tensor, momentum, {}, {}, 1.0, 0.0)
        return name

    def first(self) -> list[Held]:
        """What the run starts from."""
        return [Held(-1, chain[0]) for chain in self.chains]

    def need(self, cohort: Cohort) -> int:
        """How many must agree, in the eyes of a cohort."""
        view = self._world.board.look(cohort)
        if not cohort.need:
            cohort.need = quorum(electorate(view))
        return cohort.need

    def newest(self, cohort: Cohort, fragment: int, need: int | None = None) -> Held | None:
        """The newest state that a quorum backs, or `need` of its peers, by the votes that a cohort has heard."""
        votes = votes_of(self._world.board.with_votes(cohort, fragment), fragment)
        need = self.need(cohort) if need is None else need
        number = latest_commit([votes], self._parts, need)
        if number is None:
            return None
        found = tally(votes, number, self._parts, need).committed
        return None if found is None else Held(number, found)

    def for_newcomer(self, cohort: Cohort) -> list[Held]:
        """What a newcomer starts from: the state of more than half of the active ones (`node/run/joining.py`)."""
        need = majority(self._world.board.num_active(cohort))
        found = [self.newest(cohort, fragment, need) for fragment in range(self._parts)]
        return [held or first for held, first in zip(found, self.first(), strict=True)]

    def joined(self, peer: VirtualPeer) -> None:
        """It says what it holds, as all do again and again."""
        for fragment in range(self._parts):
            self._repeat_vote(peer, fragment)

    # -- voting ----------------------------------------------------------------------------------------------------

    def propose(self, state: State, average: Tensor, voters: Sequence[VirtualPeer]) -> None:
        """All voters have the average: they take the outer step, and vote for what they get.

        Args:
            state: as the members have it before the step.
        """
        spec = self._world.manifest.outer
        base = self.states[state.parent]
        tensor, momentum = outer_step(base.tensor, average, base.momentum, spec.learning_rate, spec.momentum)
        held = Held(state.round, digest(tensor, momentum))
        self.states.setdefault(held.digest, replace(state, tensor=tensor, momentum=momentum))
        for peer in voters:
            peer.proposals[state.fragment] = held
        self._vote(voters, state.fragment, held, min(len(state.tokens), MAX_LISTED))

    def _vote(self, voters: Sequence[VirtualPeer], fragment: int, held: Held, listed: int) -> None:
        if not voters:
            return
        world = self._world
        record = vote_record(held.round, fragment, held.digest, world.now, NEVER)
        world.gossiped("votes", sealed_bytes(record) + listed * MEMBER_BYTES, len(voters))
        world.board.vote([(peer.id, record) for peer in voters])

    def _heard(self, cohort: Cohort, record: VoteRecord) -> None:
        """If a vote may make a quorum, count; if it does, all of the cohort take the state."""
        fragment = record.fragment
        known = cohort.decided.get(fragment) == (record.round, record.digest)
        if known or cohort.backing[fragment, record.round, record.digest] < self.need(cohort):
            return
        newest = self.newest(cohort, fragment)
        if newest is not None:
            cohort.decided[fragment] = (newest.round, newest.digest)
            for peer_id in sorted(cohort.members):
                self._take(self._world.peers[peer_id], fragment, newest)

    # -- committing ------------------------------------------------------------------------------------------------

    def catch_up(self, peer: VirtualPeer, fragment: int) -> None:
        """Take what a quorum backs, if there is something newer."""
        newest = self.newest(peer.cohort, fragment)
        if newest is not None:
            self._take(peer, fragment, newest)

    def _take(self, peer: VirtualPeer, fragment: int, state: Held) -> None:
        """The own proposal if it is that, else a fetch from a backer."""
        held = peer.held[fragment]
        if peer.phase == "syncing" or state.round < held.round or state == held:
            return
        if peer.proposals.get(fragment) == state:
            self._commit(peer, fragment, state)
        elif fragment not in peer.fetching:
            self._refetch(peer, fragment, state, by_quorum=True)

    def _refetch(self, peer: VirtualPeer, fragment: int, state: Held, *, by_quorum: bool) -> None:
        world = self._world
        for voter, vote in sorted(peer.cohort.votes.get(fragment, {}).items()):
            backer = world.peers.get(voter)
            if vote.digest == state.digest and backer is not None and world.together(backer, peer):
                peer.fetching.add(fragment)
                world.sent("fragments", world.wire.states[fragment])
                seconds = world.transfer_seconds(backer, peer, world.wire.states[fragment])
                world.engine.after(seconds, self._refetched, peer, fragment, state, by_quorum)
                return

    def _refetched(self, peer: VirtualPeer, fragment: int, state: Held, by_quorum: bool) -> None:
        peer.fetching.discard(fragment)
        if peer.alive and state.round >= peer.held[fragment].round:
            self._world.measures.refetched += by_quorum
            self._world.measures.mended += not by_quorum
            self._commit(peer, fragment, state, by_quorum=by_quorum)

    def _commit(self, peer: VirtualPeer, fragment: int, held: Held, *, by_quorum: bool = True) -> None:
        if by_quorum and held.digest not in self.chains[fragment]:
            self._record(fragment, held)
        peer.held[fragment] = held
        proposal = peer.proposals.get(fragment)
        if proposal is not None and proposal.round <= held.round:
            del peer.proposals[fragment]
        if proposal != held:  # when votes are repeated next, its own says so
            self._world.engine.after(self._world.lease / 3, self._repeat_vote, peer, fragment)
        self.on_commit(peer)

    def _repeat_vote(self, peer: VirtualPeer, fragment: int) -> None:
        held = peer.proposals.get(fragment, peer.held[fragment])
        if peer.alive and held.round >= 0:
            self._vote([peer], fragment, held, 0)

    def _record(self, fragment: int, held: Held) -> None:
        """The first commit of a state: it must be the round's only one, and go on from the one committed before.

        Between the two there may be states that no quorum ever backed, which a split swarm went on from together: they
        are committed with it.
        """
        world, chain = self._world, self.chains[fragment]
        world.engine.note("round.committed", round=held.round, digest=held.digest.hex()[:8])
        rival = any(self.states[name].round == held.round for name in chain)
        world.engine.require(not rival, f"round {held.round} is committed as two states: a fork")
        line, last = [held.digest], self.states[chain[-1]].round
        while self.states[parent := self.states[line[-1]].parent].round > last:
            line.append(parent)
        world.engine.require(
            parent == chain[-1], f"round {held.round} does not go on from round {last}: a committed state is lost"
        )
        for name in reversed(line):
            chain.append(name)
            self._count(fragment, self.states[name])

    def _count(self, fragment: int, state: State) -> None:
        world, measures = self._world, self._world.measures
        measures.commits += 1
        measures.last_commit = world.now
        measures.rounds["committed"] += 1
        measures.round_seconds.append(world.now - state.opened)
        measures.coverage.append(state.coverage)
        measures.committed_tokens += sum(state.tokens.values()) / self._parts
        for member in state.tokens:
            peer = world.peers.get(member)
            if peer is not None and peer.trains_from <= state.until[member]:
                peer.merged_until[fragment] = max(peer.merged_until[fragment], state.until[member])

    # -- repairing -------------------------------------------------------------------------------------------------

    def _wake(self, cohort: Cohort) -> None:
        """Now and then peers look whether they have missed something, or whether the swarm is split for long."""
        world = self._world
        world.engine.after(world.lease / 4, self._wake, cohort)
        if not cohort.members:
            return
        for fragment in range(self._parts):
            newest = self.newest(cohort, fragment)
            peers = [world.peers[peer_id] for peer_id in sorted(cohort.members)]
            for peer in (p for p in peers if self._waits(p, fragment)):
                if newest is not None:
                    peer.split_since.pop(fragment, None)
                    self._take(peer, fragment, newest)
                else:
                    self._mend(peer, fragment)

    @staticmethod
    def _waits(peer: VirtualPeer, fragment: int) -> bool:
        """In no round, or in one that it has voted in."""
        return fragment not in peer.fetching and (fragment not in peer.in_round or fragment in peer.proposals)

    def _mend(self, peer: VirtualPeer, fragment: int) -> None:
        """No quorum holds any state. If that lasts, go on from the one that most hold."""
        now = self._world.now
        votes = votes_of(self._world.board.with_votes(peer.cohort, fragment), fragment)
        state = most_held(votes)
        if peer.phase == "syncing" or state is None or state[0] < peer.held[fragment].round:
            peer.split_since.pop(fragment, None)
            return
        since = peer.split_since.setdefault(fragment, now)
        if now - since > SPLIT_SECONDS and Held(*state) != peer.held[fragment]:
            peer.split_since[fragment] = now
            if peer.proposals.get(fragment) == Held(*state):
                self._world.measures.mended += 1
                self._commit(peer, fragment, Held(*state), by_quorum=False)
            else:
                self._refetch(peer, fragment, Held(*state), by_quorum=False)
