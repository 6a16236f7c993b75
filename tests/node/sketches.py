"""Sketches and workers for tests: rows of random tokens, and what autograd says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from shoal.kernels.experts import run_expert
from shoal.kernels.rows import RowCodec
from shoal.kernels.sketch import RowBuffer, RowSketch
from shoal.kernels.standin import initial_standin
from shoal.node.learning.owning import ExpertOwner
from shoal.node.learning.worker import Worker
from shoal.node.run.manifest import Manifest
from shoal.node.slots.slot_state import SlotTensors
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of
from torch import Tensor

OTHER = "12D3KooWother"
KINDS = ("composer", "worker")  # of owners


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rows(num: int) -> tuple[Tensor, Tensor]:
    """x and dy (num, D) of random tokens."""
    return torch.randn(num, HIDDEN), torch.randn(num, HIDDEN)


def sketch_of(x_ND: Tensor, dy_ND: Tensor, keep: int | None = None, codec: RowCodec = "float16") -> RowSketch:
    """A sketch of all these rows, or of `keep` of them."""
    buffer = RowBuffer(HIDDEN, codec)
    buffer.add(x_ND, dy_ND)
    return buffer.take(keep)


def gradient(gate_up: Tensor, down: Tensor, x_ND: Tensor, dy_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd's, in float64, of the sum over rows of dy · E(x)."""
    weights = [w.detach().double().requires_grad_() for w in (gate_up, down)]
    loss = (run_expert(x_ND.double(), *weights) * dy_ND.double()).sum()
    first, second = torch.autograd.grad(loss, weights)
    return first, second


def state_of(manifest: Manifest) -> tuple[SlotTensors, list[Any]]:
    """A slot's random weights, and the stand-ins that everybody would start with."""
    tensors: SlotTensors = {}
    standins = []
    for position in range(LAYERS):
        weights = 0.2 * torch.randn(2 * WIDTH, HIDDEN), 0.2 * torch.randn(HIDDEN, WIDTH)
        tensors[f"{position}.gate_up"], tensors[f"{position}.down"] = weights
        width = max(1, round(manifest.standin.width_fraction * WIDTH))
        standins.append(initial_standin(manifest.standin.kind, *weights, width))
    return tensors, standins


def worker_of(
    manifest: Manifest | None = None,
    *,
    slots: Any = (0, 1),
    composers: Mapping[str, int] | None = None,
    clock: Clock | None = None,
    fit_seed: int = 0,
) -> Worker:
    """A worker that owns `slots`. `composers` may be changed afterwards."""
    manifest = manifest or manifest_of()
    known = {OTHER: 0} if composers is None else composers
    worker = Worker(manifest, composers=lambda: known, clock=clock or Clock(), fit_seed=fit_seed)
    for slot in slots:
        worker.adopt(slot, *state_of(manifest))
    return worker


def weights_of(worker: Worker, slot: int) -> list[Tensor]:
    """Copies of a slot's masters."""
    return [t.detach().clone() for expert in worker.experts_of(slot) for t in (expert.gate_up, expert.down)]


def owner_of(kind: str, manifest: Manifest) -> ExpertOwner:
    """An owner of slots 0 and 1."""
    return composer_of(manifest, owned=(0, 1)) if kind == "composer" else worker_of(manifest)
