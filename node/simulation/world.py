"""What all parts of a simulation share: the clock, the directory, the peers, and what is counted."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field

from ...protocol.averaging.cadence import Grace
from ...protocol.averaging.rounds import next_round
from ...protocol.directory.records import Lease
from ...protocol.experts.ownership import Copy, Watch
from ..run.manifest import Manifest
from .board import NEVER, Board, Cohort
from .engine import Engine
from .scenario import Scenario
from .wire import Wire, lease_record, peer_record

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# How often each peer hears a message of gossip: every link of a mesh of degree 6 carries it about once. Of a large one
# neighbours are told in time that it is here already.
GOSSIP_COPIES, LARGE_COPIES = 3.0, 1.5
LARGE_BYTES = 16_384


@dataclass(frozen=True)
class Held:
    """The common state of one fragment that a peer has."""

    round: int
    digest: bytes


@dataclass(eq=False)
class VirtualPeer:
    """One composer.

    Times are seconds of the simulated run.
    """

    id: str
    name: str  # short, for traces
    capacity: int  # slots
    cohort: Cohort
    latency: float  # seconds, one way
    uplink: float  # bytes a second
    step_seconds: float
    joined: float
    held: list[Held]  # by fragment
    merged_until: list[float]  # by fragment: when the work began that the common state does not have yet
    watch: Watch = field(init=False)
    phase: str = "syncing"
    alive: bool = True
    trains_from: float = NEVER
    first_step: int = 0  # of the swarm's steps when it began to train
    slots: dict[int, int] = field(default_factory=dict)  # owned: epoch
    versions: dict[int, int] = field(default_factory=dict)  # by owned slot: step of the newest snapshot
    copies: dict[int, Copy] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    announcing: bool = False
    grace: Grace | None = None  # once it trains
    in_round: dict[int, int] = field(default_factory=dict)  # by fragment: the round that it is in
    met: dict[int, tuple[float, float]] = field(default_factory=dict)  # by fragment: seconds to a quorum, start time
    done: dict[int, int] = field(default_factory=dict)  # by fragment: the due step that its last round stood for
    not_before: dict[int, float] = field(default_factory=dict)  # by fragment
    attempts: dict[int, int] = field(default_factory=dict)  # by round
    proposals: dict[int, Held] = field(default_factory=dict)  # by fragment
    fetching: set[int] = field(default_factory=set)  # fragments
    split_since: dict[int, float] = field(default_factory=dict)  # by fragment

    def __post_init__(self) -> None:
        self.watch = Watch(self.id)

    @property
    def leaving(self) -> bool:
        return self.phase == "leaving"

    @property
    def active(self) -> bool:
        """Whether it takes part in rounds."""
        return self.alive and self.phase == "training"

    def next_round(self, fragment: int) -> int:
        return next_round(fragment, self.held[fragment].round, len(self.held))

    def steps(self, seconds: float) -> int:
        """Inner steps that it takes in so long."""
        return max(0, int(seconds / self.step_seconds))

    def step(self, now: float) -> int:
        """The step that it says it is at."""
        return self.first_step + (self.steps(now - self.trains_from) if now > self.trains_from else 0)


@dataclass
class Measures:
    """What is counted. Sums over all peers; seconds and bytes."""

    committed_tokens: float = 0.0
    possible_tokens: float = 0.0  # of peers that join at once and merge everything
    peer_seconds: float = 0.0
    commits: int = 0
    last_commit: float = 0.0  # when
    rounds: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # by outcome
    round_seconds: list[float] = field(default_factory=list)  # from opening to the first commit
    coverage: list[float] = field(default_factory=list)  # of committed rounds: weight in it, of all members' weight
    sent: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # bytes by kind
    orphaned_slot_seconds: float = 0.0
    doubly_owned_slot_seconds: float = 0.0
    moves: int = 0  # slots that changed their owner
    lost_slots: int = 0  # restarted without a copy
    claimed_back: int = 0  # of these, by an owner that had been cut off
    avoidable_losses: int = 0  # of them, while somebody in reach had a copy
    lost_slot_steps: float = 0.0  # of owners that died, after their last snapshot
    settling_seconds: list[float] = field(default_factory=list)  # from a join until the joiner has its slots
    refetched: int = 0  # fragments fetched from others' commits
    mended: int = 0  # states adopted without a quorum, after a split
    joins: int = 0
    crashes: int = 0
    leaves: int = 0


@dataclass
class World:
    """One simulation's parts."""

    scenario: Scenario
    manifest: Manifest
    wire: Wire
    engine: Engine
    board: Board
    num_slots: int
    peers: dict[str, VirtualPeer] = field(default_factory=dict)  # alive, by id
    measures: Measures = field(default_factory=Measures)

    @property
    def now(self) -> float:
        return self.engine.now

    @property
    def lease(self) -> float:
        return self.scenario.lease_seconds

    @property
    def tokens_per_step(self) -> int:
        return self.manifest.train.batch_size * self.manifest.data.context_length

    def together(self, one: VirtualPeer, other: VirtualPeer) -> bool:
        """Whether they reach each other."""
        return one.alive and other.alive and self.board.together(one.cohort, other.cohort)

    def transfer_seconds(self, sender: VirtualPeer, receiver: VirtualPeer, nbytes: float) -> float:
        """How long a download takes."""
        return 2 * (sender.latency + receiver.latency) + nbytes / sender.uplink

    def sent(self, kind: str, nbytes: float) -> None:
        """Some peer has sent something to another one."""
        self.measures.sent[kind] += nbytes

    def gossiped(self, kind: str, nbytes: float, times: float = 1.0) -> None:
        """Messages that every peer hears, and passes on."""
        copies = GOSSIP_COPIES if nbytes < LARGE_BYTES else LARGE_COPIES
        self.measures.sent[kind] += nbytes * times * copies * len(self.peers)

    def announce_phase(self, peer: VirtualPeer, phase: str) -> None:
        """Enter a phase and tell everybody."""
        peer.phase = phase
        capacity = 0 if phase == "leaving" else peer.capacity
        self.board.publish(peer.id, peer_record(peer.id, phase, capacity, sorted(peer.slots), self.now, math.inf))

    def announce_slots(self, peer: VirtualPeer) -> None:
        """Tell everybody what a peer owns, in one record however much changes at one moment."""
        if not peer.announcing:
            peer.announcing = True
            self.engine.after(0.0, self._announce_slots, peer)

    def _announce_slots(self, peer: VirtualPeer) -> None:
        peer.announcing = False
        if peer.alive:
            leases = [Lease(slot, epoch, peer.versions[slot]) for slot, epoch in sorted(peer.slots.items())]
            self.board.publish(peer.id, lease_record(peer.id, leases, self.now, self.lease))


def peer_id(seed: int, number: int) -> str:
    """A name that peers would accept, of the usual length."""
    digest = int.from_bytes(hashlib.sha512(f"{seed}/{number}".encode()).digest())
    return "12D3KooW" + "".join(_BASE58[digest // 58**place % 58] for place in range(44))
