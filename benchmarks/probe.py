"""A trained model with other things in the place of some of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.experts import run_expert
from ..kernels.interface import float_weights, output_fidelity
from ..kernels.replay import ReplayBuffer
from ..kernels.standin import StandIn
from ..node.learning.data import Batches
from ..node.learning.evaluate import heldout_loss
from ..node.model.build import MoEModel

Rows = tuple[Tensor, Tensor]


class Probe:
    """A trained model, the rows that its experts see, and loss with anything in their place."""

    def __init__(
        self, model: MoEModel, act: str, batches: Batches, heldout: Tensor, *, rows: int, num_batches: int
    ) -> None:
        """
        Args:
            model: owns every slot.
            act: its experts' activation.
            batches: text that rows are taken from.
            heldout: (N, S) windows.
            rows: kept for each expert.
            num_batches: to run for them.
        """
        self.model, self.act, self._heldout = model, act, heldout
        hidden = model.expert_shapes[1][0]
        self._buffers = {key: ReplayBuffer(rows, hidden) for key in self._keys()}
        self._seen = dict.fromkeys(self._keys(), 0)
        model.set_tap(self._observe)
        with torch.no_grad():
            for _ in range(num_batches):
                model(batches.next())
        model.set_tap(None)
        self.exact = self.loss()

    def _keys(self) -> list[tuple[int, int]]:
        return [(layer, slot) for layer in range(len(self.model.shards)) for slot in range(self.model.num_slots)]

    def _observe(self, layer: int, slot: int, x_ND: Tensor, gate_N: Tensor) -> None:
        self._buffers[layer, slot].add(x_ND, gate_N)
        self._seen[layer, slot] += len(x_ND)

    def fitting(self, layer: int, slot: int) -> Rows:
        """Rows to make a stand-in from."""
        return self._buffers[layer, slot].fitting_rows()

    def fidelity(self, layer: int, slot: int, standin: StandIn) -> float:
        """On rows that nothing was fitted to."""
        expert = self.model.shards[layer].expert(slot)
        return output_fidelity(expert, standin, *self._buffers[layer, slot].held_out_rows(), self.act)

    def loss(self) -> float:
        """Held-out nats per token of the model as it is now."""
        return heldout_loss(self.model, self._heldout)

    def loss_with(self, standins: dict[tuple[int, int], StandIn]) -> float:
        """The same with `standins` by (layer, slot) in the place of experts, which come back afterwards."""
        kept = {}
        for (layer, slot), standin in standins.items():
            kept[layer, slot] = [m.detach().clone() for m in float_weights(self.model.shards[layer].expert(slot))]
            self.model.shards[layer].release(slot, standin)
        try:
            return self.loss()
        finally:
            for (layer, slot), weights in kept.items():
                self.model.shards[layer].adopt(slot, *weights)

    def output_error(self, layer: int, slot: int, standin: StandIn) -> float:
        """Squared error that the stand-in adds to its block's routed output, per token, over that output's own."""
        total = sum(self._energy(layer, each, None) for each in range(self.model.num_slots))
        return self._energy(layer, slot, standin) / total if total else 0.0

    def seen(self, layer: int, slot: int) -> int:
        """Tokens that were routed to an expert."""
        return self._seen[layer, slot]

    def squared_error(self, layer: int, slot: int, standin: StandIn) -> float:
        """Of the stand-in's output, gates applied, over all of these tokens."""
        return self._energy(layer, slot, standin)

    @torch.no_grad()
    def _energy(self, layer: int, slot: int, standin: StandIn | None) -> float:
        x_ND, gate_N = self._buffers[layer, slot].held_out_rows()
        if not len(x_ND):
            return 0.0
        y_ND = run_expert(x_ND, *float_weights(self.model.shards[layer].expert(slot)), self.act)
        if standin is not None:
            y_ND = y_ND - run_expert(x_ND, *standin.dense(), self.act)
        return float((y_ND * gate_N.unsqueeze(1)).square().sum(1).mean()) * self._seen[layer, slot]
