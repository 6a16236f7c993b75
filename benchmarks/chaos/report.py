"""A run with faults beside the same run without, as Markdown and JSON."""

from __future__ import annotations

from statistics import median
from typing import Any

from .playing import Played

CALM = "no faults"


def goodput(faulty: Played, calm: Played) -> float:
    """Committed tokens over those of the run without faults, in the same wall time."""
    return faulty.committed_tokens / calm.committed_tokens if calm.committed_tokens else 0.0


def markdown(runs: dict[str, Played], tape: str) -> str:
    """Runs by name; goodput is against the one called `CALM`, if that is among them."""
    calm = runs.get(CALM)
    lines = [
        "| run | committed tokens | goodput | of what faults leave | held-out nats per token | blocked by the network "
        "| slots lost | equal digests at the end | forked rounds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        loss = "-" if run.nats_per_token is None else f"{run.nats_per_token:.4f}"
        share = "-" if calm is None else f"{goodput(run, calm):.1%}"
        rest = "-" if calm is None else f"{goodput(run, calm) / run.left:.1%} of {run.left:.1%}"
        agreed = "no" if run.agreed_after is None else f"after {run.agreed_after:.1f} s"
        lines.append(
            f"| {name} | {run.committed_tokens:,} | {share} | {rest} | {loss} | {run.blocked_share:.1%} | "
            f"{run.lost_slots:.0f} | {agreed} | {len(run.forks)} |"
        )
    for name, run in runs.items():
        lines += ["", f"### {name}, {run.seconds:.0f} s", "", *_composers(run), *_orphans(run)]
        lines += ["", *(f"- {event}" for event in run.events), *(f"- forked: {fork}" for fork in run.forks)]
    return "\n".join([*lines, "", "```", tape.rstrip(), "```"])


def _composers(run: Played) -> list[str]:
    lines = ["| composer | tokens | committed | blocked s | training s | rounds |", "|---|---|---|---|---|---|"]
    for life in run.lives:
        rounds = ", ".join(f"{count:.0f} {outcome}" for outcome, count in life.rounds.items())
        lines.append(
            f"| {life.peer} | {life.tokens:,} | {life.committed_tokens:,} | {life.blocked_seconds:.1f} | "
            f"{life.training_seconds:.0f} | {rounds} |"
        )
    return lines


def _orphans(run: Played) -> list[str]:
    if not run.orphans:
        return []
    lines = [
        "",
        "| killed | slots | taken over | seconds: median, most | steps lost: median, most |",
        "|---|---|---|---|---|",
    ]
    for owner, died in sorted({(orphan.owner, orphan.died) for orphan in run.orphans}, key=lambda key: key[1]):
        theirs = [orphan for orphan in run.orphans if (orphan.owner, orphan.died) == (owner, died)]
        seconds = [orphan.seconds for orphan in theirs if orphan.seconds is not None]
        steps = [orphan.lost_steps for orphan in theirs if orphan.lost_steps is not None]
        lines.append(f"| {owner} | {len(theirs)} | {len(seconds)} | {_both(seconds, '.1f')} | {_both(steps, '.0f')} |")
    return lines


def _both(values: list[Any], spec: str) -> str:
    return f"{median(values):{spec}}, {max(values):{spec}}" if values else "-"
