"""Bounded summaries of a stream of numbers: a histogram, a rate over a window, a history that covers the whole run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
VERSION_BOUNDS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0)


class Histogram:
    """Counts per bucket, cumulative only when read, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS_BOUNDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is +Inf
        self._sum = 0.0

    def observe(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"a histogram cannot hold {value}")
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> dict[str, object]:
        """`{"buckets": [[upper bound or "+Inf", cumulative count], ...], "sum": ...}`."""
        buckets: list[list[object]] = []
        total = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            buckets.append(["+Inf" if bound == math.inf else repr(bound), total])
        return {"buckets": buckets, "sum": self._sum}


class Rate:
    """Amount per second over the last `window_seconds`; falls to zero by itself when nothing more arrives."""

    def __init__(self, window_seconds: float = 30.0) -> None:
        self._window = window_seconds
        self._samples: deque[tuple[float, float]] = deque(maxlen=4096)

    def add(self, now: float, amount: float) -> None:
        self._samples.append((now, amount))

    def per_second(self, now: float) -> float:
        while self._samples and self._samples[0][0] < now - self._window:
            self._samples.popleft()
        if len(self._samples) < 2:
            return 0.0
        # The first sample marks when the span begins: its own amount was earned before that.
        span = now - self._samples[0][0]
        return sum(amount for _, amount in list(self._samples)[1:]) / span if span > 0 else 0.0


class History:
    """A whole run in bounded memory: when full, neighbouring points are averaged and later ones cover twice as much.

    A point is a tuple of `width` numbers. NaN marks an unknown number; it is skipped in averages.
    """

    def __init__(self, width: int, capacity: int = 512) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be even and at least 2, got {capacity}")
        self._width = width
        self._capacity = capacity
        self._stride = 1  # pushes per point
        self._points: list[tuple[float, ...]] = []
        self._begun = _Point(width)

    def push(self, *values: float) -> None:
        assert len(values) == self._width
        self._begun.add(values)
        if self._begun.pushes < self._stride:
            return
        self._points.append(self._begun.mean())
        self._begun = _Point(self._width)
        if len(self._points) == self._capacity:
            self._points = [_mean(self._points[i : i + 2]) for i in range(0, self._capacity, 2)]
            self._stride *= 2

    def columns(self) -> list[list[float]]:
        """One list per number of the point, oldest first; the unfinished last point is included."""
        points = [*self._points, self._begun.mean()] if self._begun.pushes else self._points
        return [[point[i] for point in points] for i in range(self._width)]


class _Point:
    """One in the making: sums, for it may become of millions of pushes."""

    def __init__(self, width: int) -> None:
        self.pushes = 0
        self._sums, self._known = [0.0] * width, [0] * width

    def add(self, values: tuple[float, ...]) -> None:
        self.pushes += 1
        for i, value in enumerate(values):
            if math.isfinite(value):
                self._sums[i] += value
                self._known[i] += 1

    def mean(self) -> tuple[float, ...]:
        return tuple(total / n if n else math.nan for total, n in zip(self._sums, self._known, strict=True))


def _mean(points: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    whole = _Point(len(points[0]))
    for point in points:
        whole.add(point)
    return whole.mean()
