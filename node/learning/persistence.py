"""A composer as named tensors and facts, and back: what goes into a checkpoint on disk.

    backbone.<name>            local weights of the backbone
    optimizer.<name>.<moment>  their optimizer state
    common.<f>, momentum.<f>   last common state of fragment f
    unmerged.<f>               int64 (2): inner steps and tokens that it does not have yet
    lost.<f>                   what a coarse codec has kept back of it
    slot.<s>.<...>             an owned slot, as in `Composer.saved`

Stand-ins of slots that others own, and which ones those of owned slots are, are beside these: `standins/saving.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..slots.slot_state import SlotTensors, under
from .composer import Composer
from .optimizer import checked_state, group_of, put_state, take_state


def composer_tensors(composer: Composer) -> dict[str, Tensor]:
    """Copies of everything, by name, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in composer.backbone.items():
        tensors[f"backbone.{name}"] = parameter.detach().to("cpu", copy=True)
        for key, value in take_state(composer.optimizer, parameter).items():
            tensors[f"optimizer.{name}.{key}"] = value
    for index, (common, momentum) in enumerate(zip(composer.common, composer.momentum, strict=True)):
        tensors[f"common.{index}"] = common.clone()
        tensors[f"momentum.{index}"] = momentum.clone()
        tensors[f"unmerged.{index}"] = torch.tensor(composer.unmerged(index))
        if index in composer.lost:
            tensors[f"lost.{index}"] = composer.lost[index].clone()
    for slot in composer.owned:
        for key, value in composer.saved(slot).items():
            tensors[f"slot.{slot}.{key}"] = value
    return tensors


def restore_backbone(composer: Composer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Put back the backbone, its optimizer state, and the step and token counts of `meta`.

    Raises:
        ValueError: the checkpoint is of another model or is damaged; nothing has changed then.
    """
    states = {}
    optimizer = composer.optimizer
    for name, parameter in composer.backbone.items():
        group = group_of(optimizer, parameter)
        _check(f"backbone.{name}", tensors, parameter.shape)
        states[name] = checked_state(optimizer, group, parameter.shape, under(f"optimizer.{name}.", tensors))
    for index, fragment in enumerate(composer.fragments):
        for kind in ("common", "momentum"):
            _check(f"{kind}.{index}", tensors, torch.Size([fragment.numel]))
        if f"lost.{index}" in tensors:
            _check(f"lost.{index}", tensors, torch.Size([fragment.numel]))
    step, tokens, places = int(meta["step"]), int(meta["tokens"]), range(len(composer.fragments))
    nothing = torch.zeros(2, dtype=torch.int64)  # of checkpoints that do not say it
    unmerged = []
    for i in places:
        steps_left, tokens_left = map(int, tensors.get(f"unmerged.{i}", nothing))
        if not (0 <= steps_left <= step and 0 <= tokens_left <= tokens):
            raise ValueError("the checkpoint has more unmerged than was trained")
        unmerged.append((steps_left, tokens_left))
    for name, parameter in composer.backbone.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"backbone.{name}"])
        put_state(composer.optimizer, parameter, states[name])
    composer.resume(
        step=step,
        tokens=tokens,
        common=[tensors[f"common.{i}"] for i in places],
        momentum=[tensors[f"momentum.{i}"] for i in places],
        unmerged=unmerged,
        lost={i: tensors[f"lost.{i}"] for i in places if f"lost.{i}" in tensors},
    )


def _check(name: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> None:
    saved = tensors.get(name)
    if saved is None or saved.shape != shape or not bool(torch.isfinite(saved).all()):
        raise ValueError(f"the checkpoint does not hold this model's {name}, or it is not finite")


def has_backbone(tensors: Mapping[str, Tensor]) -> bool:
    """Whether they are a composer's: workers have no backbone to save."""
    return any(name.startswith("backbone.") for name in tensors)


def saved_slots(tensors: Mapping[str, Tensor]) -> dict[int, SlotTensors]:
    """The owned slots that a checkpoint holds."""
    slots: dict[int, SlotTensors] = {}
    for name, value in tensors.items():
        if name.startswith("slot."):
            _, slot, key = name.split(".", 2)
            slots.setdefault(int(slot), {})[key] = value
    return slots
