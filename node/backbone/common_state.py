"""The common backbone as one peer has it: per fragment the state that a quorum voted for, and how a peer gets there.

    vote      names the sha256 of (fragment, momentum) that this peer holds, or would hold after a round
    commit    the digest that a quorum of active composers backs is the common state
    catch up  who holds another one, or none, takes its own proposal if that has the digest, or fetches it from a backer

Rounds of different fragments have nothing to do with each other.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...protocol import resources
from ...protocol.averaging.fragments import Fragment
from ...protocol.averaging.merging import digest as digest_of
from ...protocol.averaging.reputation import Reputation
from ...protocol.averaging.rounds import latest_commit, most_held, next_round, possible, tally
from ...protocol.directory.records import VoteRecord
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused
from ...protocol.transport.downloads import Download
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..storage.blobs import fragment_from_bytes

log = get_logger(__name__)

FETCH_SECONDS = 60.0
HEADER_BYTES = 4096
# What one of several backers has for sending a state, before another goes on with it; twice as long each time that none
# of them was done. A fetch alone waits for an hour for what comes slowly enough.
BACKER_SECONDS = 30.0
REPEAT_SECONDS = 0.5
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


class CommonState:
    """What one composer holds and votes for. On the asyncio loop, but for `held`, which the training thread sets.

    Args:
        fragments: of the backbone.
        held: per fragment, the common state that the composer starts from.
    """

    def __init__(
        self, links: Links, trainer: Trainer[Composer], fragments: Sequence[Fragment], held: list[Held]
    ) -> None:
        self.held = held
        self.reputation = Reputation(links.peer_id)
        self._links, self._trainer, self._fragments = links, trainer, fragments
        self._proposals: dict[int, _Proposal] = {}  # by fragment: voted for, not committed yet
        self._downloads: dict[int, Download] = {}  # by fragment: what came of one that was not finished
        self._patience: dict[int, float] = {}  # by fragment: seconds for one of several backers
        self._split_since: dict[int, float] = {}  # by fragment: monotonic seconds
        self._reminded: list[set[str]] = [set() for _ in held]  # by fragment, of the state that is held now
        self._attested = -math.inf  # monotonic seconds; when own votes were last repeated
        links.state.set_held((state.round, state.digest) for state in held)

    def next_round(self, index: int) -> int:
        """The number of a fragment's round to come."""
        return next_round(index, self.held[index].round, len(self.held))

    def max_bytes(self, index: int) -> int:
        """A fragment's state as it travels is no larger; 0 if there is no such fragment."""
        return 8 * self._fragments[index].numel + HEADER_BYTES if index < len(self._fragments) else 0

    @property
    def shunned(self) -> frozenset[str]:
        """Whom this peer does not meet, and whose votes it does not count."""
        return self.reputation.shunned(time.monotonic())

    # -- votes -----------------------------------------------------------------------------------------------------

    def votes(self, index: int) -> dict[str, VoteRecord]:
        """By voter: those that count, for one fragment."""
        shunned = self.shunned
        return {peer: vote for peer, vote in self._links.votes(index).items() if peer not in shunned}

    async def propose(self, index: int, state: Held, fragment: Tensor, momentum: Tensor) -> None:
        """Vote for what a round came to."""
        self._proposals[index] = _Proposal(fragment, momentum, state)
        await self._vote(index, state)

    def repeat_votes(self, *, after: float = REPEAT_SECONDS) -> None:
        """Say again what this peer holds, unless it has within `after` seconds."""
        now = time.monotonic()
        if now - self._attested <= after:
            return
        self._attested = now
        for index, held in enumerate(self.held):
            proposal = self._proposals.get(index)
            latest = held if proposal is None else proposal.held
            if latest.round >= 0:
                self._links.spawn(self._vote(index, latest))

    def remind(self, peer: str, index: int) -> None:
        """Repeat the vote for what is held of a fragment for one who has missed it; once for each state.

        Should that be lost too, it will be repeated for everybody before long.
        """
        if peer not in self._reminded[index]:
            self._reminded[index].add(peer)
            self.repeat_votes()

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

    def committed_elsewhere(self, index: int, number: int) -> bool:
        """A quorum has this round, or a later one of its fragment, already: nobody will come to average it again."""
        newest = latest_commit([self.votes(index)], len(self.held), self._links.quorum())
        return newest is not None and newest >= number

    # -- following them --------------------------------------------------------------------------------------------

    async def decided(self, index: int, number: int, seconds: float) -> bool:
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
        votes = self.votes(index)
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
        await self._take(index, number, verdict.committed, votes)

    async def _mend_split(self, index: int, votes: Mapping[str, VoteRecord]) -> None:
        """No quorum holds any state. If that lasts, all go on from the one that most hold."""
        state = most_held(possible(votes, index, self.held[index].round, len(self.held)))
        if state is None or state[0] < self.held[index].round:
            self._split_since.pop(index, None)
            return
        since = self._split_since.setdefault(index, time.monotonic())
        if time.monotonic() - since > SPLIT_SECONDS and state != (self.held[index].round, self.held[index].digest):
            self._split_since[index] = time.monotonic()  # if the fetch fails, it waits as long again
            await self._take(index, *state, votes)

    async def _take(self, index: int, number: int, digest: bytes, votes: Mapping[str, VoteRecord]) -> None:
        proposal = self._proposals.get(index)
        if proposal is not None and (proposal.held.round, proposal.held.digest) == (number, digest):
            await self._commit(index, proposal.held, proposal.fragment, proposal.momentum)
            return
        backing = {p: v for p, v in votes.items() if (v.round, v.digest) == (number, digest)}
        members = max((tuple(vote.members) for vote in backing.values()), key=len, default=())
        backers = [peer for peer in sorted(backing) if peer != self._links.peer_id]
        if await self.fetch_fragment(index, Held(number, digest, members), backers):
            log.info("outer.refetched", round=number, fragment=index)

    async def fetch_fragment(self, index: int, wanted: Held, backers: Sequence[str]) -> bool:
        """Download one fragment's common state from any of `backers`; whoever sends another digest is passed over.

        They are asked in any order, so that one that is slow does not hold up all. What one of them sent before it went
        away, or another's turn came, is gone on with at the next, and at the next call.
        """
        numel = self._fragments[index].numel
        begun = self._downloads.setdefault(index, Download())
        patience = self._patience.get(index, BACKER_SECONDS) if len(backers) > 1 else None
        for peer in random.sample(backers, len(backers)):
            try:
                async with asyncio.timeout(patience):
                    resource = await self._links.fetch(
                        peer,
                        resources.backbone(index),
                        max_bytes=self.max_bytes(index),
                        deadline_seconds=FETCH_SECONDS,
                        begun=begun,
                    )
                begun.restart()
                fragment, momentum = fragment_from_bytes(resource.data, numel)
            except (FetchFailed, PeerUnreachable, Refused) as error:
                log.info("outer.fetch_failed", fragment=index, peer=peer, error=str(error))
                continue
            except TimeoutError:
                log.info("outer.fetch_slow", fragment=index, peer=peer, nbytes=len(begun.data))
                self._patience[index] = 2 * (patience or BACKER_SECONDS)
                continue
            if digest_of(fragment, momentum) == wanted.digest:
                self._patience.pop(index, None)
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
        self._reminded[index].clear()
        proposal = self._proposals.get(index)
        if proposal is not None and proposal.held.round <= state.round:
            del self._proposals[index]
