"""One owned expert as named tensors, in the form in which it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels.lora import LoraExpert
from ..learning.expert_mode import SAVED
from ..learning.optimizer import take_state

if TYPE_CHECKING:
    from ..learning.owning import ExpertOwner

SlotTensors = dict[str, Tensor]


def weights_as_trained(owner: ExpertOwner, slot: int, position: int) -> SlotTensors:
    """All weights of one owned expert in the form in which they are trained. Copies, by name."""
    expert = owner.experts_of(slot)[position]
    if isinstance(expert, LoraExpert):
        return {SAVED + name: value.to("cpu", copy=True) for name, value in expert.tensors.items()}
    named = zip(("gate_up", "down"), expert.masters(), strict=True)
    return {name: weights.detach().to("cpu", copy=True) for name, weights in named}


def optimizer_state(owner: ExpertOwner, slot: int, position: int) -> SlotTensors:
    """Of one owned expert, `<name>.<moment>`. Copies."""
    expert = owner.experts_of(slot)[position]
    prefix = SAVED if isinstance(expert, LoraExpert) else ""
    return {
        f"{prefix}{name}.{key}": value
        for name, parameter in zip(expert.names, expert.trained, strict=True)
        for key, value in take_state(owner.optimizer, parameter).items()
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> SlotTensors:
    """The tensors whose name starts with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
