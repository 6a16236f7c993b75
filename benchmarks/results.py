"""Outcomes of training methods, and the table of them: means over seeds, with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One method's outcome with one seed; loss in nats per byte on held-out text."""

    method: str
    loss: float
    seconds: float
    delta_bytes: int = 0
    outer_bytes: int = 0
    sketch_bytes: int = 0
    seed: int = 0
    flops_per_token: float = 0.0  # of all participants together, over all their tokens; in the last steps
    state_bytes: int = 0  # of the participant that holds most


def markdown(results: Sequence[Result], *, tokens: int) -> str:
    """One line a method, in the order in which they come first, each with its gap to the first.

    A gap is taken seed by seed; `±` is half of the way from the least to the most of the seeds.

    Args:
        tokens: that all participants of a method train on together.
    """
    methods = list(dict.fromkeys(result.method for result in results))
    of = {method: {r.seed: r for r in results if r.method == method} for method in methods}
    base = of[methods[0]]
    lines = [
        f"| method | nats/byte | bits/byte | vs {methods[0]} | MFLOPs/token | state, MB | sketch bytes/token "
        "| delta bytes/token | outer bytes/token | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        runs = list(of[method].values())
        losses = [run.loss for run in runs]
        gaps = [100 * (run.loss / base[run.seed].loss - 1) for run in runs if run.seed in base]
        last, seconds = runs[-1], statistics.mean(run.seconds for run in runs)
        gap = f"{statistics.mean(gaps):+.1f}%{_spread(gaps, 1)}" if gaps else ""
        lines.append(
            f"| {method} | {statistics.mean(losses):.4f}{_spread(losses, 4)} "
            f"| {statistics.mean(losses) / math.log(2):.4f} | {gap} "
            f"| {last.flops_per_token / 1e6:.2f} | {last.state_bytes / 1e6:.1f} | {last.sketch_bytes / tokens:.1f} "
            f"| {last.delta_bytes / tokens:.1f} | {last.outer_bytes / tokens:.1f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    return f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
