"""A whole simulated swarm: peers come, train, fail and go; links are cut; and everything is counted."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ...protocol.averaging.grouping import plan, sent_bytes
from ...protocol.experts.ownership import Copy, Rules
from .board import Board
from .commits import Commits
from .engine import Engine
from .rounds import RoundLife
from .scenario import Scenario
from .slots import SlotLife
from .wire import Wire, lease_record, manifest_of, peer_record, sealed_bytes, vote_record
from .world import VirtualPeer, World, peer_id

DRAIN_SECONDS = 30.0
METER_SECONDS = 30.0
DOWNLINK = 5.0  # of an uplink
STRAGGLER_STEP, STRAGGLER_UPLINK = 4.0, 0.1
MESH_DEGREE = 6


Kind = Literal["join", "crash", "leave", "restart", "cut"]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a swarm.

    Attributes:
        at: seconds.
        kind: `restart` is a crash, and the same peer again after `seconds`, with its checkpoint; `cut` splits off a
            `share` of the peers for `seconds`.
        which: the peer, counted in the order of ids among those that are there; `join` needs none.
    """

    at: float
    kind: Kind
    which: int = 0
    seconds: float = 0.0
    share: float = 0.0


class Swarm:
    """Built from a scenario, run once.

    Args:
        tape: faults beside those that the scenario draws.
        ask_everybody: see `slots.py`.
    """

    def __init__(self, scenario: Scenario, *, tape: Iterable[Fault] = (), ask_everybody: bool = False) -> None:
        engine = Engine(scenario.seed)
        manifest = manifest_of(scenario.preset, scenario.lease_seconds, scenario.round_seconds)
        hops = max(1, math.ceil(math.log(max(2, scenario.peers), MESH_DEGREE)))
        rng = engine.rng("lags")
        lags = [hops * scenario.latency_ms / 1000 * rng.lognormvariate(0, 0.5) for _ in range(scenario.peers)]
        board = Board(engine, scenario.peers, lags, scenario.lease_seconds, scenario.loss)
        num_slots = int(manifest.model.config["num_experts"])
        self.world = World(scenario, manifest, Wire(manifest), engine, board, num_slots)
        self.slots = SlotLife(self.world, ask_everybody=ask_everybody)
        self.commits = Commits(self.world)
        self.rounds = RoundLife(self.world, self.commits)
        self._names = 0
        self._churn = engine.rng("churn")
        for _ in range(scenario.peers):
            self._join(at_start=True)
        for fault in tape:
            engine.at(fault.at, self._strike, fault)
        if scenario.mean_session_minutes:
            self._next_arrival()
        if scenario.partition_share and scenario.partition_minutes:
            minutes = 60 * scenario.partition_minutes
            middle = max(0.0, 1800 * scenario.hours - minutes / 2)
            engine.at(middle, self._strike, Fault(middle, "cut", 0, minutes, scenario.partition_share))
        engine.after(METER_SECONDS, self._meter)

    def run(self, seconds: float, progress: Callable[[float], None] = lambda seconds: None) -> None:
        """Go on until this time; `progress` hears it in every simulated minute."""
        engine = self.world.engine
        while engine.now < seconds:
            engine.run(min(seconds, engine.now + 60.0))
            progress(engine.now)

    # -- coming and going ------------------------------------------------------------------------------------------

    def _join(self, *, at_start: bool = False, returning: VirtualPeer | None = None) -> None:
        world, engine = self.world, self.world.engine
        number, self._names = self._names, self._names + 1
        rng = engine.rng(f"peer/{number}")
        peer = self._drawn(rng, number) if returning is None else self._as_before(returning)
        world.peers[peer.id] = peer
        world.measures.joins += not at_start
        engine.note("peer.joins", peer=peer.name, capacity=peer.capacity)
        world.announce_phase(peer, "syncing")
        fetched = 0.0 if at_start else world.wire.standins + sum(world.wire.states)
        world.sent("joining", fetched)
        seconds = rng.uniform(0, 5) if at_start else 2.0 + fetched / (DOWNLINK * peer.uplink)
        engine.after(seconds, self._starts, peer, at_start)
        minutes = world.scenario.mean_session_minutes
        if minutes:
            session = rng.expovariate(1 / (60 * minutes))
            ends = self._crash if rng.random() < world.scenario.crash_share else self._leave
            engine.after(max(1.0, session), ends, peer)

    def _drawn(self, rng: random.Random, number: int) -> VirtualPeer:
        world, scenario = self.world, self.world.scenario
        name = peer_id(scenario.seed, number)
        slow = rng.random() < scenario.straggler_share
        capacity = max(1, min(world.num_slots, round(rng.expovariate(1 / scenario.mean_capacity))))
        uplink = scenario.uplink_mbit * 1e6 / 8 * rng.lognormvariate(0, 0.7)
        return VirtualPeer(
            id=name,
            name=f"p{number}",
            capacity=capacity,
            cohort=world.board.admit(name),
            latency=scenario.latency_ms / 1000 * rng.lognormvariate(0, 0.5),
            uplink=uplink * (STRAGGLER_UPLINK if slow else 1.0),
            step_seconds=scenario.step_seconds * rng.lognormvariate(0, 0.4) * (STRAGGLER_STEP if slow else 1.0),
            joined=world.now,
            held=self.commits.first(),
            merged_until=[world.now] * world.manifest.outer.fragments,
        )

    def _as_before(self, old: VirtualPeer) -> VirtualPeer:
        """The same peer on its data directory: it goes on from its checkpoint."""
        peer = VirtualPeer(
            id=old.id,
            name=old.name,
            capacity=old.capacity,
            cohort=self.world.board.admit(old.id),
            latency=old.latency,
            uplink=old.uplink,
            step_seconds=old.step_seconds,
            joined=self.world.now,
            held=list(old.held),
            merged_until=[self.world.now] * len(old.held),
        )
        saved = {slot: Copy(epoch, old.versions[slot], mine=True) for slot, epoch in old.slots.items()}
        peer.copies = saved | old.copies
        peer.watch.remember(self.world.now, peer.copies, Rules(lease=self.world.lease))
        return peer

    def _starts(self, peer: VirtualPeer, at_start: bool) -> None:
        """It has all that it needs."""
        if not peer.alive or peer.leaving:
            return
        newest = self.commits.for_newcomer(peer.cohort)
        peer.held = [max(own, seen, key=lambda held: held.round) for own, seen in zip(peer.held, newest, strict=True)]
        if not at_start:
            others = [other.step(self.world.now) for other in self.world.peers.values() if other.active]
            peer.first_step = statistics.median_low(others) if others else 0
        peer.trains_from = self.world.now
        self.slots.joined(peer, at_start=at_start)
        self.world.announce_phase(peer, "training")
        self.commits.joined(peer)
        self.rounds.starts(peer)

    def _next_arrival(self) -> None:
        """Newcomers replace those that go, on average."""
        rate = self.world.scenario.peers / (60 * self.world.scenario.mean_session_minutes)
        self.world.engine.after(self._churn.expovariate(rate), self._arrive)

    def _arrive(self) -> None:
        self._join()
        self._next_arrival()

    def _crash(self, peer: VirtualPeer) -> None:
        if peer.alive and not peer.leaving:
            self.world.measures.crashes += 1
            self.world.engine.note("peer.crashes", peer=peer.name, slots=sorted(peer.slots))
            self._end(peer)

    def _leave(self, peer: VirtualPeer) -> None:
        if peer.alive and not peer.leaving:
            self.world.measures.leaves += 1
            self.world.engine.note("peer.leaves", peer=peer.name, slots=sorted(peer.slots))
            self.world.announce_phase(peer, "leaving")
            self._drain(peer, self.world.now + DRAIN_SECONDS)

    def _drain(self, peer: VirtualPeer, deadline: float) -> None:
        if not peer.alive:
            return
        if peer.slots and self.world.now < deadline:
            self.world.engine.after(1.0, self._drain, peer, deadline)
        else:
            self._end(peer)

    def _end(self, peer: VirtualPeer) -> None:
        world = self.world
        self.slots.gone(peer)
        self._account(peer)
        peer.alive = False
        peer.slots, peer.versions = dict(peer.slots), dict(peer.versions)  # what a checkpoint has
        del world.peers[peer.id]
        world.board.silence(peer.id)

    def _strike(self, fault: Fault) -> None:
        world = self.world
        if fault.kind == "join":
            self._join()
            return
        if fault.kind == "cut":
            if all(cohort.cut_since is None for cohort in world.board.cohorts):
                cut = world.board.cut(fault.share)
                names = [world.peers[p].name for cohort in cut for p in sorted(cohort.members)]
                world.engine.note("links.cut", peers=names[:20])
                world.engine.after(fault.seconds, self._heal)
            return
        there = sorted(world.peers)
        if len(there) < 2:
            return  # somebody has to stay
        peer = world.peers[there[fault.which % len(there)]]
        if fault.kind == "leave":
            self._leave(peer)
            return
        self._crash(peer)
        if fault.kind == "restart":
            world.engine.after(fault.seconds, self._return, peer)

    def _return(self, peer: VirtualPeer) -> None:
        if peer.id not in self.world.peers:
            self._join(returning=peer)

    def _heal(self) -> None:
        self.world.engine.note("links.healed")
        self.world.board.heal()

    # -- counting --------------------------------------------------------------------------------------------------

    def _account(self, peer: VirtualPeer) -> None:
        """What a peer could have done by now."""
        measures, seconds = self.world.measures, self.world.now - peer.joined
        measures.peer_seconds += seconds
        measures.possible_tokens += seconds / peer.step_seconds * self.world.tokens_per_step

    def finish(self) -> None:
        """Call once, after the last `run`."""
        for peer in self.world.peers.values():
            self._account(peer)
        self.slots.count()

    def _meter(self) -> None:
        """What all peers say all the time."""
        world, lease, seconds = self.world, self.world.lease, METER_SECONDS
        world.engine.after(seconds, self._meter)
        live, spec = len(world.peers), world.manifest
        if not live:
            return
        owned = sum(len(peer.slots) for peer in world.peers.values()) // live
        record = sealed_bytes(peer_record("p" * 52, "training", 8, list(range(owned)), world.now, lease))
        claims = sealed_bytes(lease_record("p" * 52, [], world.now, lease)) + 10 * owned
        vote = sealed_bytes(vote_record(1 << 10, 0, bytes(32), world.now, world.now + lease))
        votes = vote * spec.outer.fragments
        world.gossiped("records", record, live * seconds / (lease / 5))
        world.gossiped("records", claims, live * seconds / (lease / 4))
        world.gossiped("votes", votes, live * seconds / (lease / 3))
        world.sent("directory", live * seconds / (lease / 5) * live * (record + claims + votes))
        published = seconds / (spec.standin.publish_every * world.scenario.step_seconds)
        world.gossiped("deltas", world.wire.delta, world.num_slots * published)
        world.gossiped("counts", world.wire.counts, live * published)
        intervals = seconds / (spec.sketch.gradient_every * world.scenario.step_seconds)
        grid = plan(list(world.peers), 0)
        gradient = world.wire.gradient
        world.sent("sketches", live * intervals * sent_bytes(grid, gradient, 4 * gradient))
