"""Times of several things side by side.

What is compared runs interleaved, one after the other in every round, and a ratio is the median of the rounds' ratios:
a neighbour who takes a core away slows both sides of it. Times by themselves move with the machine's load.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(
    candidates: Mapping[str, Callable[[], object]], seconds: float, *, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Run all candidates in turn, round after round, for about `seconds`; the first round only warms up.

    Returns:
        milliseconds of every round, by candidate; the lists are equally long and in step.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = 0.0
    for round_number in range(most + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if round_number:
                times[name].append(1e3 * (time.perf_counter() - began))
        if not round_number:
            end = time.perf_counter() + seconds
        elif round_number >= least and time.perf_counter() > end:
            break
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median of each list."""
    return {name: statistics.median(values) for name, values in times.items()}
