"""Rows for experts that others own, as one process of an island has them: raw, or encoded where they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...kernels.sketch import RowBuffer
from ..model.init import expert_shape
from ..model.shard import SketchTap
from ..run.manifest import Manifest
from ..sketches.sketching import Collector, SketchCollector

Encoded = dict[tuple[int, int], RowBuffer]  # by slot and layer
Raw = list[tuple[int, int, Tensor, Tensor, Tensor, Tensor]]  # layer, slot, x (N, D), dy (N, D), a (N, F), dh (N, 2F)
Wanted = Literal["no", "raw", "encoded"]


def wanted_by(collector: Collector | None) -> Wanted:
    """In what form a composer's collector takes rows of others."""
    return "no" if collector is None else "encoded" if isinstance(collector, SketchCollector) else "raw"


class StepRows:
    """Of one step at a time, or of some in a row."""

    def __init__(self, manifest: Manifest, seed: int) -> None:
        self._collector = SketchCollector(manifest.sketch, expert_shape(manifest.model), seed=seed)
        self._raw: Raw = []
        self._wanted: Wanted = "no"

    def tap(self, wanted: Wanted, tokens: int, *, more: bool = False) -> SketchTap | None:
        """For a step over whose `tokens` tokens the mean is taken. What was not taken of the last one is dropped, or,
        with `more`, comes together with this one's."""
        if not more:
            self._collector.drain()
            self._raw, self._wanted = [], wanted
        self._collector.begin_step(tokens)
        return {"no": None, "raw": self._keep, "encoded": self._collector.add}[wanted]

    def take(self) -> Raw | Encoded:
        """What has come together, in the form that was wanted; there may be no rows."""
        return self._collector.drain() if self._wanted == "encoded" else self._raw

    def _keep(self, layer: int, slot: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        x, dy, a, dh = (rows.to("cpu", copy=True) for rows in (x_ND, dy_ND, a_NF, dh_NH))
        self._raw.append((layer, slot, x, dy, a, dh))


def give(collector: Collector, parts: Sequence[Raw | Encoded], tokens: int, batches: int, device: torch.device) -> None:
    """Tell a composer's collector of a step of `tokens` tokens in `batches`, and what each process has found in it."""
    collector.begin_step(tokens, batches)
    for part in parts:
        put(collector, part, device)


def put(collector: Collector, part: Raw | Encoded, device: torch.device) -> None:
    """Into a composer's collector, which was told of the step, what one process has found in it."""
    if isinstance(part, dict):
        assert isinstance(collector, SketchCollector)
        collector.merge(part)
    else:
        for layer, slot, *tensors in part:
            collector.add(layer, slot, *(tensor.to(device) for tensor in tensors))
