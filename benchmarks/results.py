"""Outcomes of training methods, and the table of them: means over seeds, with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KINDS = ("sketches", "deltas", "rounds")  # of bytes; all else is summed up
OTHER = "other"


@dataclass(frozen=True)
class Result:
    """One method's outcome with one seed; loss in nats per byte on held-out text."""

    method: str
    loss: float
    seconds: float
    seed: int = 0
    tokens: int = 0  # that all participants trained on together
    up: Mapping[str, float] = field(default_factory=dict)  # bytes by kind, of all participants, sent
    down: Mapping[str, float] = field(default_factory=dict)  # the same, received
    flops_per_token: float = 0.0  # of all participants together, over all their tokens; in the last steps
    state_bytes: int = 0  # tensors between two steps, of the participant that holds most
    expert_bytes: int = 0  # those of them that are there for experts
    peak_bytes: int = 0  # tensors at the worst moment of a step
    resident_bytes: int = 0  # the most that a training process of its own ever had, libraries and all
    blocked_share: float | None = None  # of training's wall time, waited for the network; None: there was no network


def markdown(results: Sequence[Result]) -> str:
    """One line a method, in the order in which they come first, each with its gap to the first.

    A gap is taken seed by seed; `±` is half of the way from the least to the most of the seeds. Bytes are sent and
    received per token. Costs are those of the first seed; what was not measured stays empty.
    """
    methods = list(dict.fromkeys(result.method for result in results))
    of = {method: {r.seed: r for r in results if r.method == method} for method in methods}
    kinds = [*KINDS, *([OTHER] if any(set(r.up) - set(KINDS) for r in results) else [])]
    heads = [
        "method",
        "nats/byte",
        "bits/byte",
        f"vs {methods[0].split(':')[0]}",
        "MFLOPs/token",
        "state, MB",
        "experts, MB",
    ]
    heads += ["peak, MB", "process, MB", *(f"{kind}, B/token" for kind in kinds), "blocked", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in methods:
        runs = list(of[method].values())
        losses, first = [run.loss for run in runs], runs[0]
        gaps = gaps_to(of[methods[0]], runs)
        cells = [
            method,
            f"{statistics.mean(losses):.4f}{spread(losses, 4)}",
            f"{statistics.mean(losses) / math.log(2):.4f}",
            f"{statistics.mean(gaps):+.1f}%{spread(gaps, 1)}" if gaps else "",
            f"{first.flops_per_token / 1e6:.2f}" if first.flops_per_token else "",
            *(_megabytes(n) for n in (first.state_bytes, first.expert_bytes, first.peak_bytes, first.resident_bytes)),
            *(_per_token(first, kind) for kind in kinds),
            "" if first.blocked_share is None else f"{100 * first.blocked_share:.1f}%",
            f"{statistics.mean(run.seconds for run in runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gaps_to(base: Mapping[int, Result], runs: Sequence[Result]) -> list[float]:
    """Per cent above the loss of `base` (by seed) with the same seed, for each run whose seed is there."""
    return [100 * (run.loss / base[run.seed].loss - 1) for run in runs if run.seed in base]


def spread(values: Sequence[float], digits: int) -> str:
    """` ± ` half of the way from the least to the most; nothing for a single value."""
    return f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}" if nbytes else ""


def _per_token(result: Result, kind: str) -> str:
    def of(amounts: Mapping[str, float]) -> float:
        return sum(n for name, n in amounts.items() if name == kind or (kind == OTHER and name not in KINDS))

    sent, received = of(result.up), of(result.down)
    return f"{sent / result.tokens:.1f} / {received / result.tokens:.1f}" if sent or received else ""
