"""Rows for experts that others own, as one process of an island has them: encoded or summed where they were made.

Never raw: in float32 those of a block of steps may be gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch

from ...kernels.sketch import RowBuffer
from ..logs import get_logger
from ..model.init import expert_shape
from ..model.shard import SketchTap
from ..run.manifest import Manifest
from ..sketches.gradient_collecting import DrainedGradients, GradientCollector, GradientInterval
from ..sketches.row_memory import rows_held
from ..sketches.sign_collecting import SignCollector, SignSums
from ..sketches.sketching import Collector, SketchCollector

log = get_logger(__name__)

Encoded = dict[tuple[int, int], RowBuffer]  # by slot and layer
Rows = Encoded | SignSums | DrainedGradients
Wanted = Literal["no", "encoded", "signs"] | GradientInterval


def wanted_by(collector: Collector | None) -> Wanted:
    """In what form a composer's collector takes rows of others."""
    if isinstance(collector, GradientCollector):
        return collector.collecting
    if isinstance(collector, SignCollector):
        return "signs"
    return "no" if collector is None else "encoded"


class StepRows:
    """Of one step at a time, or of some in a row."""

    def __init__(self, manifest: Manifest, seed: int) -> None:
        shape, most = expert_shape(manifest.model), rows_held(manifest)
        self._encoding = SketchCollector(manifest.sketch, shape, seed=seed, max_rows=most)
        self._signs = SignCollector(shape, seed=seed)
        self._summing: GradientCollector | None = None
        self._wanted: Wanted = "no"

    def tap(self, wanted: Wanted, tokens: int, *, more: bool = False) -> SketchTap | None:
        """For a step over whose `tokens` tokens the mean is taken. What was not taken of the last one is dropped, or,
        with `more`, comes together with this one's."""
        if not more:
            self._wanted = wanted
            collector = self._collector()
            if collector is not None:
                collector.drain()
        collector = self._collector()
        if collector is None:
            return None
        collector.begin_step(tokens)
        return collector.add

    def take(self) -> Rows:
        """What has come together, in the form that was wanted; there may be no rows."""
        collector = self._collector()
        return {} if collector is None else collector.drain()

    def _collector(self) -> SketchCollector | SignCollector | GradientCollector | None:
        if not isinstance(self._wanted, GradientInterval):
            return {"no": None, "encoded": self._encoding, "signs": self._signs}[self._wanted]
        if self._summing is None or self._summing.collecting != self._wanted:  # else its projections are there
            self._summing = GradientCollector(self._wanted.form, self._wanted.interval)
        return self._summing


def give(collector: Collector, parts: Sequence[Rows], tokens: int, batches: int, device: torch.device) -> None:
    """Tell a composer's collector of a step of `tokens` tokens in `batches`, and what each process has found in it."""
    collector.begin_step(tokens, batches)
    for part in parts:
        _put(collector, part, device)


def give_also(collector: Collector, part: Rows, tokens: int, steps: int, device: torch.device) -> None:
    """Tell a composer's collector, in a step that has begun, of `steps` of another process, each of `tokens` tokens.

    Sums of an interval that has ended since those steps began are lost, and so their tokens do not count."""
    if isinstance(part, DrainedGradients):
        assert isinstance(collector, GradientCollector)
        if part.interval != collector.interval:
            log.info("sketch.interval_missed", collected=part.interval, next=collector.interval)
            return
    for _ in range(steps):
        collector.also(tokens)
    _put(collector, part, device)


def _put(collector: Collector, part: Rows, device: torch.device) -> None:
    """Into a composer's collector, which was told of the step, what one process has found in it."""
    if isinstance(part, DrainedGradients):
        assert isinstance(collector, GradientCollector)
        collector.merge(part, device)
    elif isinstance(collector, SignCollector):
        collector.merge(cast(SignSums, part), device)
    else:
        assert isinstance(collector, SketchCollector)
        collector.merge(cast(Encoded, part))
