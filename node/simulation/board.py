"""The directory as different peers see it: late, with gaps, and cut in two by a partition.

Peers of one **cohort** hear everything at the same moments, so they share one view. Up to COHORTS peers are a cohort
each; more are dealt out. A record travels by gossip, which takes the cohort's lag; what gossip loses is read from the
DHT, at the next look. While a cohort is cut off from a writer nothing passes; what was missed comes when both are
together again.

A peer renews its records all the time; no event stands for that. When a record was last renewed, as far as a cohort can
know, is computed when somebody looks. Until then a peer's record never expires.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from ...protocol.directory.records import LeaseRecord, PeerRecord, VoteRecord
from ...protocol.directory.standing import Standing, active_composers, standing_of
from ...protocol.directory.view import LeaseClaim, View, remember, resolve
from .engine import Engine
from .wire import lease_record

COHORTS = 32
MANY_COHORTS = 8  # for more than MANY peers, who would need too many views
MANY = 128
VIEW_SECONDS = 1.0  # how old a shared view may get, as `node/peer/links.py` has it
NEVER = math.inf


@dataclass
class Writer:
    """What is true about one peer's records."""

    peer: str
    cohort: int
    born: float
    silent_from: float = NEVER  # when it stopped to renew


@dataclass
class Cohort:
    """What some peers have heard."""

    index: int
    lag: float  # seconds
    members: set[str] = field(default_factory=set)
    cut_since: float | None = None
    peers: dict[str, PeerRecord] = field(default_factory=dict)
    leases: dict[str, LeaseRecord] = field(default_factory=dict)
    votes: dict[int, dict[str, VoteRecord]] = field(default_factory=dict)  # by fragment, then voter
    backing: Counter[tuple[int, int, bytes]] = field(default_factory=Counter)  # voters by fragment, round and digest
    strongest: dict[int, LeaseClaim] = field(default_factory=dict)
    faded: set[str] = field(default_factory=set)  # silent writers whose last renewal is in `peers`
    missed: list[PeerRecord | LeaseRecord | tuple[str, VoteRecord]] = field(default_factory=list)
    view: View | None = None
    standing: Standing | None = None
    decided: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # by fragment: what a quorum was seen for last
    active: int | None = None  # composers that take part in rounds; None when it has to be counted anew
    need: int = 0  # how many must agree on a state; 0 when it has to be counted anew


class Board:
    """All cohorts. `lease_seconds`: how long records live; peers renew them as `node/` does."""

    def __init__(self, engine: Engine, peers: int, lags: Iterable[float], lease_seconds: float, loss: float) -> None:
        self._engine = engine
        self._rng = engine.rng("board")
        self._lease, self._loss = lease_seconds, loss
        count = min(peers, COHORTS) if peers <= MANY else MANY_COHORTS
        self.cohorts = [Cohort(index, lag) for index, lag in zip(range(count), lags, strict=False)]
        self.writers: dict[str, Writer] = {}
        self._fading: set[str] = set()  # writers that have fallen silent
        self._dealt = 0
        self.on_votes: Callable[[Cohort, VoteRecord], None] = lambda cohort, record: None  # with the last one heard

    def admit(self, peer: str) -> Cohort:
        """Give a newcomer its place."""
        cohort = self.cohorts[self._dealt % len(self.cohorts)]
        self._dealt += 1
        self.writers[peer] = Writer(peer, cohort.index, self._engine.now)
        self._fading.discard(peer)
        cohort.members.add(peer)
        return cohort

    def silence(self, peer: str) -> None:
        """It renews nothing any more."""
        writer = self.writers[peer]
        writer.silent_from = self._engine.now
        self._fading.add(peer)
        self.cohorts[writer.cohort].members.discard(peer)

    # -- partitions ------------------------------------------------------------------------------------------------

    def cut(self, share: float) -> list[Cohort]:
        """Cut off about this share of the cohorts from all others."""
        count = min(len(self.cohorts) - 1, max(1, round(share * len(self.cohorts))))
        chosen = self._rng.sample(self.cohorts, count) if share and len(self.cohorts) > 1 else []
        for cohort in chosen:
            cohort.cut_since = self._engine.now
        return chosen

    def heal(self) -> None:
        """All are together again, and hear what they have missed."""
        for cohort in self.cohorts:
            cohort.cut_since = None
        for cohort in self.cohorts:
            missed, cohort.missed = cohort.missed, []
            for item in missed:
                self._engine.after(self._delay(cohort), self._deliver, cohort, item)
            self._engine.after(cohort.lag, self._hear_again, cohort)

    def _hear_again(self, cohort: Cohort) -> None:
        for peer, record in cohort.peers.items():
            if record.expires_at < NEVER and peer in self.writers and peer not in self._fading:
                cohort.peers[peer] = msgspec.structs.replace(record, expires_at=NEVER)
        cohort.view = None

    def together(self, one: Cohort, other: Cohort) -> bool:
        """Whether they are on the same side."""
        return (one.cut_since is None) == (other.cut_since is None)

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish(self, writer: str, item: PeerRecord | LeaseRecord) -> None:
        """Tell all cohorts, each in its time."""
        self._send(self.cohorts[self.writers[writer].cohort], item)

    def vote(self, votes: Sequence[tuple[str, VoteRecord]]) -> None:
        """Tell all cohorts what some peers hold from now on: the same state of one fragment."""
        for cohort in self.cohorts:
            heard = []
            for voter, record in votes:
                home = self.cohorts[self.writers[voter].cohort]
                if not self.together(home, cohort):
                    cohort.missed.append((voter, record))
                elif self._rng.random() < self._loss and home is not cohort:
                    self._engine.after(self._delay(cohort, lost=True), self._deliver, cohort, (voter, record))
                else:
                    heard.append((voter, record))
            if heard:
                self._engine.after(cohort.lag, self._hear_votes, cohort, heard)

    def _hear_votes(self, cohort: Cohort, votes: Sequence[tuple[str, VoteRecord]]) -> None:
        for voter, record in votes:
            self._keep_vote(cohort, voter, record)
        self.on_votes(cohort, votes[0][1])

    def _keep_vote(self, cohort: Cohort, voter: str, record: VoteRecord) -> None:
        kept = cohort.votes.setdefault(record.fragment, {})
        known = kept.get(voter)
        if known is None or known.issued_at < record.issued_at:
            if known is not None:
                cohort.backing[known.fragment, known.round, known.digest] -= 1
            kept[voter] = record
            cohort.backing[record.fragment, record.round, record.digest] += 1

    def _send(self, home: Cohort, item: PeerRecord | LeaseRecord | tuple[str, VoteRecord]) -> None:
        for cohort in self.cohorts:
            if not self.together(home, cohort):
                cohort.missed.append(item)
            elif cohort is home and len(cohort.members) == 1:
                self._deliver(cohort, item)  # its own
            else:
                self._engine.after(self._delay(cohort), self._deliver, cohort, item)

    def _delay(self, cohort: Cohort, *, lost: bool = False) -> float:
        lost = lost or self._rng.random() < self._loss
        return cohort.lag + (self._rng.uniform(0, self._lease / 5) if lost else 0.0)

    def _deliver(self, cohort: Cohort, item: PeerRecord | LeaseRecord | tuple[str, VoteRecord]) -> None:
        if isinstance(item, PeerRecord):
            known = cohort.peers.get(item.peer_id)
            if known is None or known.issued_at < item.issued_at:
                cohort.peers[item.peer_id] = item
                cohort.faded.discard(item.peer_id)
        elif isinstance(item, LeaseRecord):
            lease = cohort.leases.get(item.owner)
            if lease is None or lease.issued_at < item.issued_at:
                cohort.leases[item.owner] = item
                remember(cohort.strongest, item)
        else:
            self._keep_vote(cohort, *item)
            self.on_votes(cohort, item[1])
            return
        if len(cohort.members) == 1:
            cohort.view = None

    # -- reading ---------------------------------------------------------------------------------------------------

    def look(self, cohort: Cohort) -> View:
        """What the cohort knows now, by the directory's own rules, without votes; at most VIEW_SECONDS old."""
        now = self._engine.now
        if cohort.view is not None and now - cohort.view.time <= VIEW_SECONDS:
            return cohort.view
        for writer in self._unheard(cohort):
            record = cohort.peers.get(writer)
            if record is not None:
                renewed = max(record.issued_at, self._renewed(cohort, writer, self._lease / 5))
                cohort.peers[writer] = msgspec.structs.replace(
                    record, issued_at=renewed, expires_at=renewed + self._lease
                )
        leases = []
        for owner, claimed in cohort.leases.items():
            if not claimed.leases:
                continue
            issued = max(claimed.issued_at, self._renewed(cohort, owner, self._lease / 4))
            current = lease_record(owner, claimed.leases, issued, self._lease)
            remember(cohort.strongest, current)
            leases.append(current)
        cohort.view = resolve(
            now,
            peers=cohort.peers.values(),
            leases=leases,
            votes=(),
            strongest=cohort.strongest,
        )
        cohort.standing, cohort.need, cohort.active = None, 0, None
        self._forget(now)
        return cohort.view

    def standing(self, cohort: Cohort) -> Standing:
        """Who can own slots, as the cohort sees it."""
        view = self.look(cohort)
        if cohort.standing is None:
            cohort.standing = standing_of(view)
        return cohort.standing

    def num_active(self, cohort: Cohort) -> int:
        """How many composers take part in rounds, as the cohort sees it."""
        view = self.look(cohort)
        if cohort.active is None:
            cohort.active = len(active_composers(view))
        return cohort.active

    def with_votes(self, cohort: Cohort, fragment: int) -> View:
        """The view, with the votes on one fragment."""
        view = self.look(cohort)
        return View(
            time=view.time,
            peers=view.peers,
            absent=view.absent,
            votes={fragment: cohort.votes.get(fragment, {})},
        )

    def _unheard(self, cohort: Cohort) -> list[str]:
        """Writers whose renewals do not come; of the silent ones those whose end the cohort has not noted yet."""
        silent = [peer for peer in self._fading if peer not in cohort.faded]
        heard = self._engine.now - cohort.lag
        cohort.faded.update(peer for peer in silent if self.writers[peer].silent_from <= heard)
        if not self._any_cut:
            return silent
        return silent + [w.peer for w in self.writers.values() if not self.together(self.cohorts[w.cohort], cohort)]

    @property
    def _any_cut(self) -> bool:
        return any(cohort.cut_since is not None for cohort in self.cohorts)

    def _renewed(self, cohort: Cohort, writer: str, interval: float) -> float:
        """When the last renewal that the cohort heard was issued."""
        truth = self.writers[writer]
        until = min(self._engine.now - cohort.lag, truth.silent_from)
        home = self.cohorts[truth.cohort]
        if not self.together(home, cohort):
            cut = [c.cut_since for c in (home, cohort) if c.cut_since is not None]
            until = min(until, *cut)
        return truth.born + math.floor(max(0.0, until - truth.born) / interval) * interval

    def _forget(self, now: float) -> None:
        """Records that ran out long ago, so that a long run does not slow down."""
        old = [peer for peer in self._fading if now - self.writers[peer].silent_from > 1000.0]
        for peer in old:
            for each in self.cohorts:
                each.peers.pop(peer, None)
                each.leases.pop(peer, None)
                each.faded.discard(peer)
                for votes in each.votes.values():
                    vote = votes.pop(peer, None)
                    if vote is not None:
                        each.backing[vote.fragment, vote.round, vote.digest] -= 1
            self._fading.discard(peer)
            del self.writers[peer]
