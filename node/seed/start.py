"""First weights out of a seed's parts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec
import torch
from safetensors.torch import load
from torch import Tensor

from ...kernels.standin import StandIn, standin_from_bytes
from ..manifest import ModelSpec
from ..model.init import materialise
from .store import BACKBONE, SeedStore, experts_of, standins_of

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

    def standin(self, layer: int, slot: int, kind: str, width: int) -> StandIn:
        return standin_from_bytes(self._standins(slot)[layer])
