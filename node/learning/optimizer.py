"""The inner optimizer and its schedule; moving one parameter's state to another optimizer with its slot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.adamw import AdamW
from ...kernels.interface import check_tensor
from ...kernels.muon import ORTHOGONAL, Muon
from ...protocol.averaging.fragments import tier_of
from ..run.manifest import TrainSpec

_BLOCK = 256  # of the 8-bit optimizer's scales
_MAX_STEP = 1 << 24  # float32 counts no further; from long before that on, moments are not corrected any more
_ROUNDING = 1.01  # of float32, over many steps
_UNDERFLOW = 1e-18  # squares of what is smaller are lost in float32
_RATIO = "rate_ratio"  # of a group: its learning rate, over the schedule's


def decays(parameter: Tensor) -> bool:
    """Whether weight decay is for it: for matrices, not for norms and biases, which are vectors."""
    return parameter.ndim >= 2


def make_optimizer(spec: TrainSpec, backbone: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """Over the backbone, in groups: matrices, which are decayed, and the rest. The last takes experts.

    Args:
        backbone: by name; with "muon" the names say which matrices are embeddings, output head or routers, which AdamW
            steps as it does all that is no matrix.
    """
    muon = spec.optimizer == "muon"
    inner = [name for name, p in backbone.items() if muon and p.ndim == 2 and tier_of(name) == "body"]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in backbone.items() if decays(p) and name not in inner]},
        {"params": [p for p in backbone.values() if not decays(p)], "weight_decay": 0.0, _RATIO: spec.vector_rate},
        {"params": [backbone[name] for name in inner], ORTHOGONAL: muon},
        {"params": [], ORTHOGONAL: muon, _RATIO: spec.expert_rate},
    ]
    betas = (spec.beta1, spec.beta2)
    if spec.optimizer == "adamw8bit":
        from ...kernels.bnb import bitsandbytes

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            groups, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay
        )
        return optimizer
    kind = Muon if muon else AdamW
    return kind(groups, lr=spec.learning_rate, betas=betas, weight_decay=spec.weight_decay, fused=True)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Linear warm-up, then a cosine from `learning_rate` down to `final_lr_fraction` of it at `steps`."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps))
    scale = spec.final_lr_fraction + (1 - spec.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
    return spec.learning_rate * scale


def experts_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The group of what `make_optimizer` returned that experts' parameters come into, and leave."""
    return optimizer.param_groups[-1]


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The group that holds this parameter. KeyError if none does."""
    for group in optimizer.param_groups:
        if any(held is parameter for held in group["params"]):
            return group
    raise KeyError("the optimizer has no such parameter")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step: the backbone's, of which experts have their own share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATIO, 1.0)


def take_step(optimizer: torch.optim.Optimizer, rate: float, max_norm: float, loss: float) -> bool:
    """Clip the gradients that are set and step by them, unless they or the `loss` are not finite: a bad batch must not
    poison weights that others merge. No gradients are left. Returns whether it stepped."""
    set_rate(optimizer, rate)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    sound = math.isfinite(loss) and math.isfinite(norm.item())
    if sound:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sound


def take_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A copy of one parameter's optimizer state, by name. Empty before its first step."""
    state = optimizer.state.get(parameter, {})
    return {
        name: value.detach().to("cpu", copy=True) if torch.is_tensor(value) else torch.tensor(value)
        for name, value in state.items()
        if not name.startswith("qmap")  # constants of the 8-bit optimizer
    }


def checked_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], shape: torch.Size, state: Mapping[str, Tensor]
) -> dict[str, Tensor | int]:
    """What `take_state` returned elsewhere, ready for `put_state`. It may come from a peer.

    Args:
        group: of the optimizer's, that the parameter is in.
        shape: of the parameter.

    Raises:
        ValueError: it is not the whole state of one parameter of this shape and optimizer, or not finite.
    """
    if not state:
        return {}
    orthogonal = group.get(ORTHOGONAL, False)
    eight_bit = not isinstance(optimizer, torch.optim.AdamW)
    first, second = ("state1", "state2") if eight_bit else ("exp_avg", "exp_avg_sq")
    quantised = eight_bit and first in state and state[first].dtype == torch.uint8
    names = {"step", first, second} | ({"absmax1", "absmax2"} if quantised else set())
    if orthogonal:
        names = {"step", "momentum"}
    if set(state) != names:
        raise ValueError(f"the optimizer's state holds {sorted(names)}, not {sorted(state)}")
    blocks = (-(-shape.numel() // _BLOCK),)
    for name, value in state.items():
        if name == "step":
            continue
        dtype = torch.uint8 if quantised and name in (first, second) else torch.float32
        check_tensor(f"optimizer state {name}", value, dtype, blocks if name.startswith("absmax") else tuple(shape))
    if not orthogonal and bool((state["absmax2" if quantised else second] < 0).any()):
        raise ValueError("the second moment is negative")
    if not orthogonal and not quantised:
        _check_moments(state[first], state[second], *group["betas"])
    step = state["step"]
    if step.dtype not in (torch.float32, torch.int64) or step.numel() != 1 or not 1 <= float(step) < math.inf:
        raise ValueError("the optimizer's step is not one number from 1 up")
    step = step.clamp(max=_MAX_STEP)
    if not eight_bit:
        return {**state, "step": step.to(torch.float32).reshape(())}
    checked: dict[str, Tensor | int] = {**state, "step": int(step)}
    if quantised:
        maps: dict[str, Tensor] = optimizer.name2qmap  # type: ignore[attr-defined]
        checked |= {"qmap1": maps["dynamic"], "qmap2": maps["udynamic"]}
    return checked


def _check_moments(first: Tensor, second: Tensor, beta1: float, beta2: float) -> None:
    """Raise ValueError where no gradients can have left such moments: a step would be of any length.

    Both are sums over the same gradients, of g and of g²; so by Cauchy and Schwarz
    first² <= second (1 - beta1)² / ((1 - beta2) (1 - beta1² / beta2)), if the sums that this stands for end.
    """
    ratio = beta1**2 / beta2 if beta2 > 0 else 1.0
    if ratio >= 1.0:
        return
    most = second.sqrt() * ((1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio)))
    if bool((first.abs() > most * _ROUNDING + _UNDERFLOW).any()):
        raise ValueError("no gradients have these two moments")


def put_state(optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor | int]) -> None:
    """Give `parameter` a state from `checked_state`, copied. An empty one leaves it as before its first step."""
    if state:
        optimizer.state[parameter] = {
            name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }
