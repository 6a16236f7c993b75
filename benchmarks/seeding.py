"""A common start: what everybody begins with when a run goes on from a trained model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..node.learning.composer import Composer
from ..node.learning.worker import Worker
from ..node.slots.slot_state import SlotTensors


@dataclass(frozen=True)
class Seed:
    """A model without optimizer state: the backbone's fragments, each slot's masters, and the steps it has had."""

    backbone: list[Tensor]
    slots: dict[int, SlotTensors]
    step: int

    @classmethod
    def of(cls, composer: Composer) -> Seed:
        """What a composer that owns everything, or nothing yet, has now; a slot that it does not own is as seeded."""
        slots = {}
        for slot in range(composer.num_slots):
            experts = composer.experts_of(slot) if slot in composer.owned else composer.first_experts(slot)
            slots[slot] = {
                f"{layer}.{name}": weights.detach().clone()
                for layer, expert in enumerate(experts)
                for name, weights in zip(("gate_up", "down"), expert.masters(), strict=True)
            }
        return cls([composer.local_fragment(i) for i in range(len(composer.fragments))], slots, composer.step)

    def save(self, path: Path) -> None:
        """Keep it in a file that is whole or not there."""
        torn = path.with_suffix(".torn")
        torch.save(asdict(self), torn)
        torn.replace(path)

    @classmethod
    def load(cls, path: Path) -> Seed:
        """What `save` wrote. Raises OSError."""
        return cls(**torch.load(path, weights_only=True))

    def start(self, composer: Composer, owned: Collection[int]) -> None:
        """Make a composer that owns nothing go on from here: `owned` in full, stand-ins of all others."""
        composer.go_to(self.step)
        for index, flat in enumerate(self.backbone):
            composer.reset_fragment(index, flat.clone(), torch.zeros_like(flat))
        menu = composer.menu
        for slot, tensors in self.slots.items():
            composer.set_standins(
                slot,
                [
                    menu.make(menu.forms[0], tensors[f"{layer}.gate_up"], tensors[f"{layer}.down"])
                    for layer in range(composer.shape.num_layers)
                ],
            )
        for slot in owned:
            composer.adopt(slot, self.slots[slot])

    def start_worker(self, worker: Worker, owned: Collection[int], composer: Composer) -> None:
        """Make a worker the owner of slots for which `composer` runs stand-ins."""
        worker.step = self.step
        for slot in owned:
            worker.adopt(slot, self.slots[slot], composer.standins(slot))
