"""Collecting gradient sketches: a composer adds up what its tokens teach the experts of others, in bounded memory.

Lives on the training thread. All sums since an interval began are under that interval's projections, so they can be
added to those of other composers of the same interval, and to nothing else: what is not delivered with it is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.gradient_sketch import GradientSketcher, Projections, sketch_numel
from ...protocol.experts.sketch_intervals import interval_seed
from ..run.manifest import ExpertShape


@dataclass(frozen=True, kw_only=True)
class GradientForm:
    """What all peers of a run agree on: how the sketch of a slot is made and laid out."""

    run_id: str
    shape: ExpertShape
    rank: int

    @property
    def expert_numel(self) -> int:
        """Numbers in one expert's sketch."""
        return sketch_numel(self.shape.hidden, self.shape.width, self.rank)

    @property
    def numel(self) -> int:
        """Numbers in a slot's vector: its experts' sketches one after another, in the wire's order."""
        return self.shape.num_layers * self.expert_numel

    def projections(self, interval: int, device: torch.device | str = "cpu") -> Projections:
        """Those of one interval, for all experts."""
        seed = interval_seed(self.run_id, interval)
        return Projections(self.shape.hidden, self.shape.width, self.rank, seed, device=device)


@dataclass(frozen=True)
class CollectedGradient:
    """One slot's vector, float32 (numel,): sums over `tokens` of gradients of each token's own loss."""

    flat: Tensor
    tokens: int


@dataclass(frozen=True)
class GradientInterval:
    """What another process of a composer needs to add up rows for it."""

    form: GradientForm
    interval: int


@dataclass(frozen=True)
class DrainedGradients:
    """What one collector has for another one of the same interval."""

    interval: int
    flats: dict[tuple[int, int], tuple[Tensor, int]]  # by slot and layer: sketch on the CPU, rows left out of it


class GradientCollector:
    """Sums of one interval."""

    def __init__(self, form: GradientForm, interval: int = 0) -> None:
        self._form = form
        self._of_step = 0
        self._refused = 0
        self.begin(interval)

    @property
    def collecting(self) -> GradientInterval:
        """What it collects now."""
        return GradientInterval(self._form, self.interval)

    def begin(self, interval: int) -> None:
        """Drop everything and collect for `interval` from now on."""
        self.interval = interval
        self.tokens = self.steps = 0  # since it began
        self._before: dict[int, int] = {}  # by slot, tokens of the interval that do not count for it
        self._projections: dict[torch.device, Projections] = {}
        self._sketchers: dict[tuple[int, int], GradientSketcher] = {}  # by slot and layer

    def begin_step(self, tokens: int, batches: int = 1) -> None:
        """A forward over `tokens` tokens, of whose losses the mean is taken, comes next."""
        self._of_step = tokens
        self.tokens += tokens
        self.steps += 1

    def also(self, tokens: int) -> None:
        """Another process's batch of `tokens` tokens, with a mean of its own; rows of it come next."""
        self._of_step = tokens
        self.tokens += tokens

    def withdraw(self, tokens: int, batches: int = 1) -> None:
        """The step that has begun has taught nothing: its tokens do not count. Rows that are not finite never do."""
        self.tokens -= tokens

    def add(self, layer: int, slot: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """Rows of one expert; the shard's `SketchTap`. dy and dh are of the mean loss."""
        sketcher = self._sketcher(slot, layer, x_ND.device)
        sketcher.add(x_ND, dy_ND * self._of_step, a_NF, dh_NH * self._of_step)

    def drain(self) -> DrainedGradients:
        """All sums; there are none here then. For a collector that collects for another one: sketches are linear."""
        flats = {at: (sketcher.flat().cpu(), sketcher.refused) for at, sketcher in self._sketchers.items()}
        self._sketchers = {}
        return DrainedGradients(self.interval, flats)

    def merge(self, drained: DrainedGradients, device: torch.device) -> None:
        """Take in what another collector has drained, of steps that have begun here, into sums on `device`.

        Raises:
            ValueError: it is of another interval, under other projections; nothing is added.
        """
        if drained.interval != self.interval:
            raise ValueError(f"sums of interval {drained.interval} do not add up with those of {self.interval}")
        for (slot, layer), (flat, refused) in drained.flats.items():
            self._sketcher(slot, layer, device).merge(flat, refused)

    def _sketcher(self, slot: int, layer: int, device: torch.device) -> GradientSketcher:
        sketcher = self._sketchers.get((slot, layer))
        if sketcher is None:
            sketcher = self._sketchers[slot, layer] = GradientSketcher(self._on(device))
        return sketcher

    def _on(self, device: torch.device) -> Projections:
        if device not in self._projections:
            self._projections[device] = self._form.projections(self.interval, device)
        return self._projections[device]

    def take(self, orders: Mapping[int, Sequence[int]]) -> dict[int, CollectedGradient]:
        """What has come together for some slots; everything else is dropped, and the next interval begins.

        Args:
            orders: by slot, its layers in the wire's order. A slot for which no token counts is left out.
        """
        taken = {
            slot: CollectedGradient(torch.cat([self._flat(slot, layer) for layer in order]), tokens)
            for slot, order in orders.items()
            if (tokens := self.tokens - self._before.get(slot, 0))
        }
        self._refused += sum(sketcher.refused for sketcher in self._sketchers.values())
        self.begin(self.interval + 1)
        return taken

    def _flat(self, slot: int, layer: int) -> Tensor:
        """One expert's sketch; zero if no token came to it, which the mean has to know."""
        sketcher = self._sketchers.get((slot, layer))
        return torch.zeros(self._form.expert_numel) if sketcher is None else sketcher.flat().cpu()

    def take_refused(self) -> int:
        """Rows left out of what was taken since the last call: a value was not finite, or too large."""
        refused, self._refused = self._refused, 0
        return refused

    def forget(self, slot: int) -> None:
        """Drop what has been collected for a slot: it changes hands, its tokens taught it here or not at all."""
        for layer in range(self._form.shape.num_layers):
            self._sketchers.pop((slot, layer), None)
        self._before[slot] = self.tokens
