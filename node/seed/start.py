"""First weights out of a seed's parts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec
import torch
from safetensors.torch import load
from torch import Tensor

from ...kernels.bases import Bases
from ...kernels.standin import Menu, StandIn
from ..model.init import expert_shape, materialise
from ..run.manifest import ModelSpec
from .store import BACKBONE, SeedStore, bases_from, experts_of, standins_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FromSeed:
    """`model.start.Start` of a run whose manifest names a seed. Raises SeedMissing for what is not in the store."""

    def __init__(self, spec: ModelSpec, store: SeedStore) -> None:
        self._spec, self._store = spec, store
        self._slot = functools.lru_cache(maxsize=1)(lambda slot: load(store.need(experts_of(slot))))
        self._standins = functools.lru_cache(maxsize=1)(
            lambda slot: msgspec.msgpack.decode(store.need(standins_of(slot)), type=list[bytes])
        )

    def fill(self, network: PreTrainedModel) -> None:
        materialise(network, self._spec.seed)  # memory, and buffers that are in no checkpoint
        weights = load(self._store.need(BACKBONE))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name])

    def private(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("a run with private layers starts from no seed")  # `founding` sees to it

    def expert(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        tensors = self._slot(slot)
        return tensors[f"{layer}.gate_up"], tensors[f"{layer}.down"]

    def standin(self, layer: int, slot: int, menu: Menu) -> StandIn:
        return menu.load(self._standins(slot)[layer])

    @functools.cached_property
    def bases(self) -> Bases:
        return bases_in(self._store, expert_shape(self._spec).num_experts)


def bases_in(store: SeedStore, num_slots: int) -> Bases:
    """All bases of a seed, which may be none. Raises SeedMissing for those that are not in the store."""
    numbers = range(bases_from(num_slots), len(store.digests or ()))
    return Bases.from_bytes(*map(store.need, numbers))
