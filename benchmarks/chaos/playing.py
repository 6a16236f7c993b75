"""Plays a tape to a swarm and notes what became of it: who took over what, what was lost, what was committed."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from .network import Network
from .peers import Peer, Peers
from .relay import Relays
from .tape import LIARS, Fault, Tape, left

POLL_SECONDS = 0.5
AGREE_SECONDS = 60.0
COPY = re.compile(r"version=(\d+)")  # as the node logs the copy that it went on from


@dataclass
class Orphan:
    """A slot whose owner was killed. Lost steps are those of its owner after the copy that its heir went on from."""

    slot: int
    owner: str
    epoch: int
    died: float  # seconds into the run
    owner_step: int  # the last that was seen
    heir: str = ""
    seconds: float | None = None  # from death to the heir's lease; None: nobody until the end
    lost_steps: int | None = None  # None: not known, or the slot restarted without any copy


@dataclass
class Life:
    """What one life of a composer came to."""

    peer: str
    tokens: int = 0
    committed_tokens: int = 0  # without the steps that the common backbone did not have when it was last seen
    blocked_seconds: float = 0.0  # training stood still for the network
    training_seconds: float = 0.0
    rounds: dict[str, float] = field(default_factory=dict)


@dataclass
class Played:
    """One run with a tape, or without."""

    seconds: float
    lives: list[Life]
    orphans: list[Orphan]
    lost_slots: float  # restarted without any copy
    agreed_after: float | None  # seconds until all who live held equal digests of every fragment; None: not in time
    forks: list[str]  # a fragment's rounds in which composers held different digests
    events: list[str]
    left: float  # of all time to train, by the tape
    nats_per_token: float | None = None

    @property
    def committed_tokens(self) -> int:
        return sum(life.committed_tokens for life in self.lives)

    @property
    def blocked_share(self) -> float:
        """Of all training time."""
        training = sum(life.training_seconds for life in self.lives)
        return sum(life.blocked_seconds for life in self.lives) / training if training else 0.0

    def told(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "committed_tokens": self.committed_tokens, "blocked_share": self.blocked_share}


class Player:
    """Acts on a swarm whose composers have begun to merge.

    Args:
        tokens_per_step: of one composer.
        say: tells people what happens.
    """

    def __init__(
        self,
        network: Network,
        peers: Peers,
        relays: Relays | None,
        *,
        tokens_per_step: int,
        latency_ms: float,
        rate_mbit: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._network, self._peers, self._relays = network, peers, relays
        self._tokens_per_step, self._latency_ms, self._rate_mbit, self._say = (
            tokens_per_step,
            latency_ms,
            rate_mbit,
            say,
        )
        self._began = time.monotonic()
        self._lives: dict[tuple[str, int], Life] = {}
        self._before: dict[tuple[str, int], Life] = {}  # what lives had done when the tape began
        self._orphans: list[Orphan] = []
        self._held: dict[tuple[int, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._events: list[str] = []
        self._lost: dict[tuple[str, int], float] = {}

    def play(self, tape: Tape, seconds: float) -> Played:
        """Play the whole tape, then stop looking at tokens and wait until all agree."""
        self._began, pause = time.monotonic(), threading.Event()
        self.look()
        self._before = {key: Life(**asdict(life)) for key, life in self._lives.items()}
        deeds = self._deeds(tape)
        while self._now() < seconds:
            while deeds and deeds[0][0] <= self._now():
                _, what, deed = deeds.pop(0)
                self._note(what)
                deed()
            pause.wait(POLL_SECONDS)
            self.look()
        for _, what, deed in deeds:  # a fault may end after the run, but not stay
            if what.startswith("end of"):
                self._note(what)
                deed()
        lives = [self._since_start(key, life) for key, life in self._lives.items()]
        return Played(
            seconds,
            lives,
            self._orphans,
            sum(self._lost.values()),
            self._agreement(),
            self._forks(),
            self._events,
            left(tape, [peer.name for peer in self._peers.composers], seconds),
        )

    def _since_start(self, key: tuple[str, int], life: Life) -> Life:
        before = self._before.get(key, Life(life.peer))
        return Life(
            life.peer,
            life.tokens - before.tokens,
            life.committed_tokens - before.committed_tokens,
            life.blocked_seconds - before.blocked_seconds,
            life.training_seconds - before.training_seconds,
            {what: count - before.rounds.get(what, 0) for what, count in life.rounds.items()},
        )

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _note(self, what: str) -> None:
        self._events.append(f"{self._now():.1f} s: {what}")
        self._say(self._events[-1])

    # -- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read all peers and write down what counts."""
        self._peers.poll()
        for peer in self._peers.composers:
            status = peer.status
            if not status:
                continue
            key = (peer.name, peer.lives)
            open_steps = int(status["unmerged_steps"]) * self._tokens_per_step
            earlier = self._lives.get(key, Life(peer.name))
            self._lives[key] = Life(
                peer.name,
                status["tokens"],
                max(earlier.committed_tokens, status["tokens"] - open_steps),
                status["blocked_seconds"],
                sum(part["sum"] for part in status["step_seconds"].values()),
                status["outer"]["rounds"],
            )
            self._lost[key] = status["slots"]["lost"]
            for fragment, (round_, digest) in enumerate(peer.held):
                if round_ >= 0:
                    self._held[fragment, round_][digest].add(peer.name)
        for orphan in self._orphans:
            if orphan.seconds is None:
                self._look_for_heir(orphan)

    def _look_for_heir(self, orphan: Orphan) -> None:
        for peer in self._peers.composers:
            if peer.alive and peer.leases.get(orphan.slot, 0) > orphan.epoch:
                orphan.heir, orphan.seconds = peer.name, self._now() - orphan.died
                for entry in peer.said("slot.taken_over"):
                    copy = COPY.search(str(entry["copy"]))
                    if entry["slot"] == orphan.slot and copy is not None:
                        orphan.lost_steps = max(0, orphan.owner_step - int(copy[1]))

    def _forks(self) -> list[str]:
        return [
            f"fragment {fragment}, round {round_}: " + " against ".join(", ".join(sorted(p)) for p in digests.values())
            for (fragment, round_), digests in sorted(self._held.items())
            if len(digests) > 1
        ]

    def _agreement(self) -> float | None:
        began, pause = time.monotonic(), threading.Event()
        while time.monotonic() - began < AGREE_SECONDS:
            self.look()
            held = {tuple(peer.held) for peer in self._peers.composers if peer.alive}
            if len(held) == 1:
                return time.monotonic() - began
            pause.wait(POLL_SECONDS)
        return None

    # -- acting ----------------------------------------------------------------------------------------------------

    def _deeds(self, tape: Tape) -> list[tuple[float, str, Callable[[], None]]]:
        """Beginnings and ends of all faults, in order of their times."""
        deeds: list[tuple[float, str, Callable[[], None]]] = []
        for number, fault in enumerate(tape):
            if fault.fault in LIARS:
                continue
            what = f"{fault.fault} of {', '.join(fault.peers)}"
            begin, end = self._acts(fault, number)
            deeds.append((fault.at, what, begin))
            if fault.seconds:
                deeds.append((fault.at + fault.seconds, f"end of {what}", end))
        return sorted(deeds, key=lambda deed: deed[0])

    def _acts(self, fault: Fault, number: int) -> tuple[Callable[[], None], Callable[[], None]]:
        peers = [self._peers.all[name] for name in fault.peers]

        def each(act: Callable[[Peer], None]) -> Callable[[], None]:
            def all_of_them() -> None:
                for peer in peers:
                    act(peer)

            return all_of_them

        network, value = self._network, fault.value
        if fault.fault == "partition":
            return lambda: network.partition(fault.peers, f"cut{number}"), lambda: network.heal(fault.peers)
        begin, end = {
            "kill": (self._kill, self._restart),
            "stop": (lambda p: self._peers.stop(p, signal.SIGSTOP), lambda p: self._peers.stop(p, signal.SIGCONT)),
            "rate": (lambda p: network.set_rate(p.name, value), lambda p: network.set_rate(p.name, self._rate_mbit)),
            "latency": (lambda p: self._slow_link(p, value), lambda p: self._slow_link(p, 0)),
            "loss": (lambda p: network.set_loss(p.name, round(value)), lambda p: network.set_loss(p.name, 0)),
            "straggler": (lambda p: self._peers.slow_down(p, value), self._peers.speed_up),
            "clock": (lambda p: self._peers.set_clock(p, value), lambda p: self._peers.set_clock(p, 0)),
            "disk": (self._peers.fill_disk, self._peers.free_disk),
        }[fault.fault]
        return each(begin), each(end)

    def _slow_link(self, peer: Peer, more_ms: float) -> None:
        assert self._relays is not None
        self._relays.set_latency(peer.name, self._latency_ms + more_ms)

    def _kill(self, peer: Peer) -> None:
        self.look()
        if not peer.alive:
            return
        self._peers.kill(peer)
        step, now = int(peer.status.get("step", 0)), self._now()
        self._orphans += [Orphan(slot, peer.name, epoch, now, step) for slot, epoch in peer.leases.items()]

    def _restart(self, peer: Peer) -> None:
        if not peer.alive:
            self._peers.start(peer)
