"""The one place where a running peer says how it is.

The trainer and the asyncio side write, the HTTP server reads; every method takes the same lock and holds it for
microseconds. Nothing here acts on what it is told: metrics, the status page and the health checks are all readings of
`PeerState.snapshot()`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from ... import __version__
from ...protocol.directory.sight import Sight
from ...protocol.errors import ShoalError
from .series import VERSION_BOUNDS, Histogram, History, Rate

LOSS_DECAY = 0.95  # of the moving average of the loss, per step


class Phase(StrEnum):
    """Where in its life a peer is."""

    RESTING = "resting"  # not now: see --hours
    STARTING = "starting"  # reading its configuration, starting its children
    JOINING = "joining"  # reaching the swarm, verifying the manifest
    SYNCING = "syncing"  # fetching backbone, stand-ins and owned experts
    READY = "ready"  # in the run, not training: a bootstrap peer, or waiting for others
    TRAINING = "training"
    FINISHED = "finished"  # all its steps done; still serves what it has
    LEAVING = "leaving"  # handing over
    STOPPED = "stopped"
    FAILED = "failed"


IN_THE_RUN = frozenset({Phase.READY, Phase.TRAINING, Phase.FINISHED})


class Count(StrEnum):
    """What a peer counts, and the labels of each count."""

    BYTES = "bytes"  # (kind, direction): direction is "in" or "out"
    ROUNDS = "rounds"  # (outcome,)
    REFUSALS = "refusals"  # (reason,): messages and records that broke a rule
    GOSSIP_DROPPED = "gossip_dropped"  # (reason,)
    TRANSPORT_RESTARTS = "transport_restarts"  # ()
    CUT_OFF = "cut_off"  # (): times that this peer lost sight of most others
    MEETINGS = "meetings"  # (outcome,): peers behind routers that were dialled, "direct" or "relayed"
    LOST_SLOTS = "lost_slots"  # (): slots that no peer had a copy of and that restarted from the run's seed
    BLOCKED_SECONDS = "blocked_seconds"  # (): training stood still for the network, see StepPart.WAITING
    SKETCH_ROWS = "sketch_rows"  # (direction,): rows sent to owners, or learned from
    SKETCH_ROUNDS = "sketch_rounds"  # (outcome,): rounds of one slot's gradient sketches that this peer was in
    SKETCHES_LOST = "sketches_lost"  # (reason,): slots' sketches that were sent and not taken
    AUDITS = "audits"  # (outcome,): of other peers' slots, see protocol/experts/auditing.py
    STEPS_SKIPPED = "steps_skipped"  # (reason,): e.g. non-finite gradients
    FIT_SECONDS = "fit_seconds"  # (): stand-ins were fitted, and their deltas made, beside training
    FITS_SKIPPED = "fits_skipped"  # (): of a slot, due again before they had begun


class StepPart(StrEnum):
    """What the time of one training step is spent on."""

    FORWARD_BACKWARD = "forward_backward"
    OPTIMIZER = "optimizer"
    EXCHANGE = "exchange"  # in a step, for others: publishing own deltas, handing over and taking in sketches
    WAITING = "waiting"  # between steps, asked for by the network's side: stand-ins put in place, commits, copies taken


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A slot this peer owns."""

    slot: int
    epoch: int
    version: int  # the owner's step of the last snapshot
    updates: int = 0  # optimizer steps that its experts have had, under all owners


@dataclass(frozen=True, kw_only=True)
class PeerSeen:
    """A peer as the directory shows it, this one included."""

    peer_id: str
    role: str
    phase: str
    version: str = ""
    step: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    loss: float | None = None  # nats a token; None before the first step
    fidelity: float | None = None  # mean over layers of its published stand-ins
    slots: tuple[int, ...] = ()
    round: int = 0
    metrics_url: str = ""


class PeerState:
    """What a running peer knows of itself and of the others. Thread-safe.

    Args:
        role: the peer's role.
        clock: monotonic seconds, for ages and rates.
        wall: unix seconds, for points in time that leave the process.
    """

    def __init__(
        self, role: str, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._wall = wall
        self._started = self._beat = self._phase_since = clock()
        self._started_at = wall()
        self._facts: dict[str, Any] = {
            "role": role, "run_id": "", "peer_id": "", "invite": "", "steps_total": 0, "slots_total": 0,
            "unmerged_steps": 0, "processes": 1, "sight": None,
        }  # fmt: skip
        self._phase = Phase.STARTING
        self._detail = ""
        self._last_error: dict[str, Any] | None = None
        self._step = self._steps_done = self._tokens = 0
        self._loss_sum = self._loss_weight = 0.0
        self._rate, self._row_rate = Rate(), Rate()
        self._history = History(3)  # step, loss, tokens per second
        self._parts = {part: Histogram() for part in StepPart}
        self._leases: tuple[Lease, ...] = ()
        self._standby: tuple[int, ...] = ()
        self._fidelity: dict[int, float] = {}
        self._peers: tuple[PeerSeen, ...] = ()
        self._counts: dict[Count, dict[tuple[str, ...], float]] = {count: {} for count in Count}
        self._absorbed: dict[tuple[str, Count], dict[tuple[str, ...], float]] = {}
        self._round_seconds = Histogram()
        self._sketch_ages = Histogram(VERSION_BOUNDS)
        self._last_round: dict[str, Any] | None = None
        self._committed_at: float | None = None
        self._held: tuple[tuple[int, str], ...] = ()
        self._checkpoint_seconds = Histogram()
        self._checkpoint: dict[str, Any] | None = None
        self._clock_offset: float | None = None

    # Writing: life.

    def identify(
        self,
        *,
        run_id: str | None = None,
        peer_id: str | None = None,
        role: str | None = None,
        invite: str | None = None,
        steps_total: int | None = None,
        slots_total: int | None = None,
    ) -> None:
        """Say who this is and in which run, as far as known; None leaves what was said before."""
        told = {
            "run_id": run_id, "peer_id": peer_id, "role": role, "invite": invite,
            "steps_total": steps_total, "slots_total": slots_total,
        }  # fmt: skip
        with self._lock:
            self._facts.update({name: value for name, value in told.items() if value is not None})

    def enter(self, phase: Phase, detail: str = "") -> None:
        """Begin a phase, or change the detail of the present one (progress of a fetch, for example)."""
        with self._lock:
            now = self._clock()
            if phase != self._phase:
                self._phase, self._phase_since = phase, now
            self._detail, self._beat = detail, now

    @property
    def phase(self) -> Phase:
        with self._lock:
            return self._phase

    def beat(self) -> None:
        """The peer's main loop is alive. A step counts as a beat; call this while waiting."""
        with self._lock:
            self._beat = self._clock()

    def note_error(self, error: BaseException) -> None:
        """Remember an error for people to see. Does not change the phase: use `enter(Phase.FAILED, ...)` for that."""
        cause, fix, code = str(error) or type(error).__name__, "", ""
        if isinstance(error, ShoalError):
            cause, fix, code = error.cause, error.fix, error.code
        with self._lock:
            self._last_error = {"code": code, "cause": cause, "fix": fix, "at": self._wall()}

    # Writing: training.

    def resume(self, *, step: int) -> None:
        """Continue at `step` from a checkpoint; the counters of this process start at zero all the same."""
        with self._lock:
            self._step = step

    def record_step(
        self, *, step: int, tokens: int, loss: float, seconds: Mapping[StepPart, float], rows: int = 0, steps: int = 1
    ) -> None:
        """One inner step is done, or `steps` between which nothing else could be.

        Args:
            step: its number in the run, counting from 1.
            tokens: tokens trained on in this step.
            loss: mean loss in nats a token; a non-finite one is shown as such but not averaged.
            seconds: how long the parts of the step took. WAITING is also added to BLOCKED_SECONDS.
            rows: of sketches that a worker learned from in this step.
        """
        with self._lock:
            now = self._clock()
            self._beat, self._step = now, step
            self._steps_done += steps
            self._tokens += tokens
            self._rate.add(now, tokens)
            self._row_rate.add(now, rows)
            if math.isfinite(loss):
                self._loss_sum = LOSS_DECAY * self._loss_sum + (1 - LOSS_DECAY) * loss
                self._loss_weight = LOSS_DECAY * self._loss_weight + (1 - LOSS_DECAY)
            for part, value in seconds.items():
                self._parts[part].observe(value / steps)
            self._add(Count.BLOCKED_SECONDS, (), seconds.get(StepPart.WAITING, 0.0))
            self._history.push(float(step), self._loss(), self._rate.per_second(now))

    def set_processes(self, number: int) -> None:
        """How many processes of an island took the last step together."""
        with self._lock:
            self._facts["processes"] = number

    def set_unmerged(self, steps: int) -> None:
        """Own inner steps that the common backbone does not have yet."""
        with self._lock:
            self._facts["unmerged_steps"] = steps

    def record_round(self, *, outcome: str, round: int, fragment: int, members: int, seconds: float) -> None:
        """An outer round ended. `outcome` is "committed" or a short label of why it was not."""
        with self._lock:
            self._add(Count.ROUNDS, (outcome,), 1)
            self._round_seconds.observe(seconds)
            now = self._wall()
            if outcome == "committed":
                self._committed_at = now
            self._last_round = {
                "round": round, "fragment": fragment, "members": members, "outcome": outcome,
                "seconds": seconds, "at": now,
            }  # fmt: skip

    def set_held(self, held: Iterable[tuple[int, bytes]]) -> None:
        """By fragment, the round that made the common state that this peer has, and its digest."""
        with self._lock:
            self._held = tuple((round, digest.hex()) for round, digest in held)

    def record_sketch_age(self, versions: int) -> None:
        """A slot's sketches were taken in; so many stand-ins were published since the one that they were taken at."""
        with self._lock:
            self._sketch_ages.observe(versions)

    def record_checkpoint(self, *, step: int, seconds: float, nbytes: int) -> None:
        """A checkpoint is complete on disk."""
        with self._lock:
            self._checkpoint_seconds.observe(seconds)
            self._checkpoint = {"step": step, "seconds": seconds, "bytes": nbytes, "at": self._wall()}

    # Writing: the swarm.

    def set_slots(self, *, leases: Iterable[Lease], standby: Iterable[int] = ()) -> None:
        """The slots this peer owns and those it keeps a copy of, all of them each time."""
        with self._lock:
            self._leases = tuple(sorted(leases, key=lambda lease: lease.slot))
            self._standby = tuple(sorted(standby))

    def set_fidelity(self, by_layer: Mapping[int, float]) -> None:
        """How well the published stand-ins of own experts answer, per MoE layer, 1 = like the expert."""
        with self._lock:
            self._fidelity = dict(by_layer)

    def set_peers(self, peers: Iterable[PeerSeen]) -> None:
        """All live peers of the run, this one included."""
        with self._lock:
            self._peers = tuple(sorted(peers, key=lambda peer: peer.peer_id))

    def set_sight(self, sight: Sight) -> None:
        """How much of the swarm this peer sees."""
        with self._lock:
            self._facts["sight"] = {**asdict(sight), "cut_off": sight.cut_off}

    def set_clock_offset(self, seconds: float) -> None:
        """This clock minus the swarm's."""
        with self._lock:
            self._clock_offset = seconds

    def count(self, what: Count, *labels: str, by: float = 1) -> None:
        """Add to a count. `Count` names the labels each one takes."""
        with self._lock:
            self._add(what, labels, by)

    def absorb(self, source: str, what: Count, totals: Mapping[tuple[str, ...], float]) -> None:
        """Add what `source` has counted since it last reported.

        `totals` are the source's own running totals (the transport process, the directory's refusals). One that went
        down means the source has restarted and counts from zero again.
        """
        with self._lock:
            last = self._absorbed.setdefault((source, what), {})
            for labels, total in totals.items():
                before = last.get(labels, 0)
                self._add(what, labels, total - before if total >= before else total)
                last[labels] = total

    def _add(self, what: Count, labels: tuple[str, ...], by: float) -> None:
        counts = self._counts[what]
        counts[labels] = counts.get(labels, 0) + by

    # Reading.

    def _total(self, what: Count) -> float:
        return sum(self._counts[what].values())

    def _loss(self) -> float:
        return self._loss_sum / self._loss_weight if self._loss_weight else math.nan

    def _labelled(self, what: Count) -> dict[str, float]:
        return {labels[0]: value for labels, value in sorted(self._counts[what].items())}

    def snapshot(self) -> dict[str, Any]:
        """Everything, JSON-ready: no NaN or infinity (None stands for what is not known), keys are strings."""
        with self._lock:
            now, wall = self._clock(), self._wall()
            steps, losses, rates = self._history.columns()
            last_round = self._last_round and {**self._last_round, "seconds_ago": wall - self._last_round["at"]}
            snapshot = {
                **self._facts,
                "version": __version__,
                "phase": self._phase.value,
                "phase_detail": self._detail,
                "phase_seconds": now - self._phase_since,
                "in_the_run": self._phase in IN_THE_RUN,
                "started_at": self._started_at,
                "uptime_seconds": now - self._started,
                "heartbeat_age_seconds": now - self._beat,
                "last_error": self._last_error and {**self._last_error, "seconds_ago": wall - self._last_error["at"]},
                "step": self._step,
                "steps_done": self._steps_done,
                "tokens": self._tokens,
                "tokens_per_second": self._rate.per_second(now),
                "rows_per_second": self._row_rate.per_second(now),
                "loss": self._loss(),
                "step_seconds": {part.value: histogram.snapshot() for part, histogram in self._parts.items()},
                "fits": {"seconds": self._total(Count.FIT_SECONDS), "skipped": self._total(Count.FITS_SKIPPED)},
                "steps_skipped": self._labelled(Count.STEPS_SKIPPED),
                "slots": {
                    "owned": [lease.slot for lease in self._leases],
                    "standby": list(self._standby),
                    "leases": [asdict(lease) for lease in self._leases],
                    "lost": self._total(Count.LOST_SLOTS),
                },
                "fidelity": {str(layer): value for layer, value in sorted(self._fidelity.items())},
                "outer": {
                    "rounds": self._labelled(Count.ROUNDS),
                    "last": last_round,
                    "committed_at": self._committed_at,
                    "held": [{"round": round, "digest": digest} for round, digest in self._held],
                    "seconds": self._round_seconds.snapshot(),
                },
                "peers": [asdict(peer) for peer in self._peers],
                "bytes": [
                    {"kind": kind, "direction": direction, "bytes": value}
                    for (kind, direction), value in sorted(self._counts[Count.BYTES].items())
                ],
                "cut_off": self._total(Count.CUT_OFF),
                "transport_restarts": self._total(Count.TRANSPORT_RESTARTS),
                "gossip_dropped": self._labelled(Count.GOSSIP_DROPPED),
                "sketch_ages": self._sketch_ages.snapshot(),
                "refusals": self._labelled(Count.REFUSALS),
                "sketch_rows": self._labelled(Count.SKETCH_ROWS),
                "sketch_rounds": self._labelled(Count.SKETCH_ROUNDS),
                "audits": self._labelled(Count.AUDITS),
                "meetings": self._labelled(Count.MEETINGS),
                "sketches_lost": self._labelled(Count.SKETCHES_LOST),
                "blocked_seconds": self._total(Count.BLOCKED_SECONDS),
                "checkpoint": self._checkpoint,
                "checkpoint_seconds": self._checkpoint_seconds.snapshot(),
                "clock_offset_seconds": self._clock_offset,
                "history": {"step": steps, "loss": losses, "tokens_per_second": rates},
            }
        result: dict[str, Any] = _jsonable(snapshot)
        return result


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value
