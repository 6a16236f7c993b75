"""A member's model: somebody else trains it, and tells it what changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.build import MoEModel
from ..model.init import expert_shape
from ..model.shard import ExpertShard
from ..standins.standin_menu import menu_of
from .orders import Setup, Slot
from .rows import StepRows

Answer = Callable[[object], None]  # puts a message into the leader's pipe; may wait until the leader takes it


class Replica(ABC):
    """What a member's process computes with; one for each form of island.

    Args:
        model: all of the run's, or what one stage takes.
    """

    def __init__(self, setup: Setup, model: MoEModel) -> None:
        self.setup, self.device = setup, torch.device(setup.device)
        self.train = setup.manifest.train
        self.model = model
        self.model.place(self.device)
        self.owned: set[int] = set()
        self.rows = StepRows(setup.manifest, setup.rank)
        shape = expert_shape(setup.manifest.model)
        self._menu = menu_of(setup.manifest.standin, shape.hidden, shape.width, setup.bases)

    @abstractmethod
    def step(self, order: Any, answer: Answer) -> None:
        """Take part in what the leader has ordered."""

    def change(self, slots: Mapping[int, Slot]) -> None:
        """Take in what is another slot from now on."""
        for slot, now in slots.items():
            standins = [self._menu.load(data) for data in now.standins]
            for position, shard in enumerate(self.model.shards):
                if slot in self.owned:
                    shard.release(slot, standins[position])
                if now.experts is None:
                    shard.set_standin(slot, standins[position])
                else:
                    shard.hold(slot, now.experts[position])
            self.owned.discard(slot)
            if now.experts is not None:
                self.owned.add(slot)


def experts_in(shards: Sequence[ExpertShard], owned: Iterable[int]) -> list[nn.Parameter]:
    """What is trained of owned slots' experts, in an order that both sides know."""
    trained = (t for slot in sorted(owned) for shard in shards for t in shard.expert(slot).trained)
    return list(trained)  # type: ignore[arg-type]  # what a shard holds are parameters


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All of them in one, copied."""
    with torch.no_grad():
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def numel(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@torch.no_grad()
def fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Write what `flat` made back into tensors of the same sizes."""
    for tensor, piece in zip(tensors, torch.split(values, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(piece.view_as(tensor))
