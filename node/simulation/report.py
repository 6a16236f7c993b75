"""What a simulation came to, as numbers and as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from .swarm import Swarm


@dataclass(frozen=True, kw_only=True)
class Report:
    """One simulated run. Bytes are sent ones, per peer."""

    peers: int
    hours: float
    seed: int
    seconds_to_simulate: float
    fingerprint: str  # of the history
    goodput: float  # committed tokens, of those that peers could have trained that join at once and merge everything
    commits: int
    rounds: dict[str, int]  # by outcome; `no_quorum` counts peers, the others count rounds
    round_seconds: float  # from opening to the first commit; median
    coverage: float  # mean share of all members' weight that a committed round has
    bytes_per_second: dict[str, float]  # per peer, by kind
    bytes_per_round: float  # per peer, of merging alone
    settling_seconds: float | None  # from a join until the joiner owns its slots; median
    settling_seconds_p95: float | None
    joins: int
    crashes: int
    leaves: int
    moves: int
    orphaned_slot_seconds: float
    doubly_owned_slot_seconds: float
    lost_slots: int
    claimed_back: int
    avoidable_losses: int
    lost_slot_steps: float
    refetched: int
    mended: int

    @property
    def total_bytes_per_second(self) -> float:
        return sum(self.bytes_per_second.values())

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"total_bytes_per_second": self.total_bytes_per_second}


def report_of(swarm: Swarm, seconds_to_simulate: float) -> Report:
    """Of a swarm that has run to its end."""
    world, measured = swarm.world, swarm.world.measures
    settling = sorted(measured.settling_seconds)
    finished = max(1, measured.commits)
    return Report(
        peers=world.scenario.peers,
        hours=world.now / 3600,
        seed=world.scenario.seed,
        seconds_to_simulate=round(seconds_to_simulate, 1),
        fingerprint=world.engine.fingerprint,
        goodput=measured.committed_tokens / max(1.0, measured.possible_tokens),
        commits=measured.commits,
        rounds=dict(sorted(measured.rounds.items())),
        round_seconds=statistics.median(measured.round_seconds) if measured.round_seconds else 0.0,
        coverage=statistics.fmean(measured.coverage) if measured.coverage else 0.0,
        bytes_per_second={k: v / measured.peer_seconds for k, v in sorted(measured.sent.items())},
        bytes_per_round=measured.sent["merging"] / finished / (measured.peer_seconds / world.now),
        settling_seconds=statistics.median(settling) if settling else None,
        settling_seconds_p95=settling[int(0.95 * len(settling))] if settling else None,
        joins=measured.joins,
        crashes=measured.crashes,
        leaves=measured.leaves,
        moves=measured.moves,
        orphaned_slot_seconds=measured.orphaned_slot_seconds,
        doubly_owned_slot_seconds=measured.doubly_owned_slot_seconds,
        lost_slots=measured.lost_slots,
        claimed_back=measured.claimed_back,
        avoidable_losses=measured.avoidable_losses,
        lost_slot_steps=measured.lost_slot_steps,
        refetched=measured.refetched,
        mended=measured.mended,
    )


def table(reports: Sequence[Report]) -> Table:
    """One column per run."""
    out = Table(title="simulated swarms", show_lines=False)
    out.add_column("peers")
    for report in reports:
        out.add_column(str(report.peers), justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        out.add_row(name, *values)

    row("simulated hours", [f"{r.hours:.2f}" for r in reports])
    row("goodput", [f"{r.goodput:.3f}" for r in reports])
    row("commits", [str(r.commits) for r in reports])
    outcomes = sorted({outcome for r in reports for outcome in r.rounds} - {"committed"})
    for outcome in outcomes:
        row(f"  {outcome}", [str(r.rounds.get(outcome, 0)) for r in reports])
    row("round, s (median)", [f"{r.round_seconds:.1f}" for r in reports])
    row("weight in a commit", [f"{r.coverage:.4f}" for r in reports])
    row("sent per peer, kB/s", [f"{r.total_bytes_per_second / 1e3:.1f}" for r in reports])
    for kind in sorted({kind for r in reports for kind in r.bytes_per_second}):
        row(f"  {kind}", [f"{r.bytes_per_second.get(kind, 0.0) / 1e3:.1f}" for r in reports])
    row("merging per peer and round, kB", [f"{r.bytes_per_round / 1e3:.0f}" for r in reports])
    row("joins / crashes / leaves", [f"{r.joins} / {r.crashes} / {r.leaves}" for r in reports])
    row("owner after a join, s (median)", [_seconds(r.settling_seconds) for r in reports])
    row("  95 of 100", [_seconds(r.settling_seconds_p95) for r in reports])
    row("slots moved", [str(r.moves) for r in reports])
    row("orphaned slot-seconds", [f"{r.orphaned_slot_seconds:.0f}" for r in reports])
    row("doubly owned slot-seconds", [f"{r.doubly_owned_slot_seconds:.1f}" for r in reports])
    row("slots lost (copy in reach)", [f"{r.lost_slots} ({r.avoidable_losses})" for r in reports])
    row("of these claimed back by their owner", [f"{r.claimed_back}" for r in reports])
    row("slot-steps lost with owners", [f"{r.lost_slot_steps:.0f}" for r in reports])
    row("fragments fetched / mended", [f"{r.refetched} / {r.mended}" for r in reports])
    row("seconds to simulate", [f"{r.seconds_to_simulate:.1f}" for r in reports])
    return out


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
