"""Loss curves of training methods, drawn into one PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

SMOOTH = 0.05  # of all steps: the window of the running mean


def draw(curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Write a PNG.

    Args:
        curves: by method, for each of its seeds the training loss of every step, nats per token. Drawn is their running
            mean, and where there are several seeds the range between the least and the most.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120)
    for method, seeds in curves.items():
        steps = min(map(len, seeds))
        smooth = [running_mean(seed[:steps], max(1, round(SMOOTH * steps))) for seed in seeds]
        columns = list(zip(*smooth, strict=True))
        mean = [math.fsum(column) / len(column) for column in columns]
        [line] = axes.plot(range(1, steps + 1), mean, label=method, linewidth=1.4)
        if len(seeds) > 1:
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(range(1, steps + 1), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="inner step", ylabel="training loss, nats per token", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them at most."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means
