"""Sketches between the owners of an in-process swarm, by function calls: nothing is lost or refused.

Those sent to owners pass through their wire bytes. Gradient sketches are added up in float32, as averaging without a
codec would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..node.learning.composer import Composer
from ..node.learning.owning import ExpertOwner
from ..node.run.manifest import Manifest
from ..node.sketches.gradient_collecting import CollectedGradient, GradientCollector, GradientForm
from ..node.sketches.sign_collecting import SignCollector
from ..node.sketches.sketching import Sketch, SketchCollector, reader_of

GRADIENT_BYTES = 2  # a number, at float16's width


@dataclass(frozen=True)
class SentSketches:
    """One composer's sketches of one slot, on their way."""

    owner: ExpertOwner
    sender: str
    slot: int
    sketches: Mapping[int, Sketch]
    tokens: int
    step: int

    def arrive(self, age: int) -> None:
        """`age`: versions published since the stand-ins that they were taken at."""
        self.owner.hear(self.sender, self.slot, self.sketches, tokens=self.tokens, step=self.step, age=age)


@dataclass(frozen=True)
class SentMean:
    """A slot's mean gradients, on their way."""

    owner: ExpertOwner
    slot: int
    gradients: Mapping[int, tuple[Tensor, Tensor]]
    tokens: int
    step: int

    def arrive(self, age: int) -> None:
        """Nothing is corrected, whatever `age`."""
        self.owner.hear_mean("0", self.slot, self.gradients, tokens=self.tokens, step=self.step)


Sent = SentSketches | SentMean


class DirectDelivery:
    """Row or sign sketches from every composer to the owner of each slot that is not its own."""

    def __init__(self, manifest: Manifest, composers: Sequence[Composer], owners: Mapping[int, ExpertOwner]) -> None:
        self.every = manifest.sketch.interval
        self._owners, self._read = owners, reader_of(manifest.sketch, composers[0].shape)
        self._collectors = [
            SignCollector(composer.shape, seed=i)
            if manifest.sketch.kind == "signs"
            else SketchCollector(manifest.sketch, composer.shape, seed=i)
            for i, composer in enumerate(composers)
        ]
        self._composers = composers
        for composer, collector in zip(composers, self._collectors, strict=True):
            composer.collector = collector

    def send(self) -> tuple[int, list[Sent]]:
        """What has been collected, and the bytes of its sketches."""
        sent = 0
        under_way: list[Sent] = []
        for i, (composer, collector) in enumerate(zip(self._composers, self._collectors, strict=True)):
            slots = [slot for slot in self._owners if slot not in composer.owned]
            for slot, collected in collector.take(dict.fromkeys(slots, 1.0)).items():
                wire = [sketch.to_bytes() for sketch in collected.layers]
                sent += sum(map(len, wire))
                sketches = {layer: self._read(data) for layer, data in enumerate(wire)}
                under_way.append(
                    SentSketches(self._owners[slot], str(i), slot, sketches, collected.tokens, composer.step)
                )
        return sent, under_way


class GradientDelivery:
    """One mean gradient per expert, over all composers that sent sketches, every `sketch.gradient_every` steps."""

    def __init__(self, manifest: Manifest, composers: Sequence[Composer], owners: Mapping[int, ExpertOwner]) -> None:
        self.every = manifest.sketch.interval
        self._composers, self._owners = composers, owners
        self._form = GradientForm(run_id=manifest.name, shape=composers[0].shape, rank=manifest.sketch.rank)
        self._collectors = [GradientCollector(self._form) for _ in composers]
        for composer, collector in zip(composers, self._collectors, strict=True):
            composer.collector = collector

    def send(self) -> tuple[int, list[Sent]]:
        """The interval's gradients. Bytes: every sketch once in, their mean once out."""
        layers = range(self._form.shape.num_layers)
        projections = self._form.projections(self._collectors[0].interval)
        arrived: dict[int, list[CollectedGradient]] = {slot: [] for slot in self._owners}
        for composer, collector in zip(self._composers, self._collectors, strict=True):
            slots = [slot for slot in self._owners if slot not in composer.owned]
            for slot, collected in collector.take(dict.fromkeys(slots, layers)).items():
                arrived[slot].append(collected)
        under_way: list[Sent] = []
        for slot, parts in arrived.items():
            if not parts:  # where costs are measured only one composer steps
                continue
            tokens = sum(part.tokens for part in parts)
            mean = torch.stack([part.flat for part in parts]).sum(0) / tokens
            gradients = {layer: projections.rebuild(mean.view(len(layers), -1)[layer]) for layer in layers}
            under_way.append(SentMean(self._owners[slot], slot, gradients, tokens, self._composers[0].step))
        vectors = sum(len(parts) + 1 for parts in arrived.values() if parts)
        return vectors * GRADIENT_BYTES * self._form.numel, under_way
