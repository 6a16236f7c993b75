"""Where a run's first weights come from: everything that a model is filled with before it has learned anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ...kernels.bases import Bases
from ...kernels.standin import Menu, StandIn
from ..run.manifest import ModelSpec
from .init import expert_weights, materialise, private_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Start(Protocol):
    """The same for every peer of a run."""

    @property
    def bases(self) -> Bases:
        """Of shared stand-ins, if there are any."""

    def fill(self, network: PreTrainedModel) -> None:
        """Give memory and first values to all that is on the meta device: the backbone."""

    def private(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up and down of an expert of a private layer, which `layer` counts from 0."""

    def expert(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """gate_up (2F, D) and down (D, F), float32, of a slot; `layer` counts those that have slots."""

    def standin(self, layer: int, slot: int, menu: Menu) -> StandIn:
        """What runs in its place to begin with: the menu's first form."""


class Seeded:
    """A pure function of the manifest, and of a secret of the run's composers: nothing has to be fetched."""

    def __init__(self, spec: ModelSpec, secret: bytes = b"") -> None:
        self._spec, self._secret, self._bases = spec, secret, Bases()

    @property
    def bases(self) -> Bases:
        return self._bases

    def fill(self, network: PreTrainedModel) -> None:
        materialise(network, self._spec.seed)

    def private(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        return private_weights(self._spec, layer, expert, self._secret)

    def expert(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        return expert_weights(self._spec, layer, slot, self._secret)

    def standin(self, layer: int, slot: int, menu: Menu) -> StandIn:
        return menu.make(menu.forms[0], *self.expert(layer, slot))
