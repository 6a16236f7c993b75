"""The outer step: how much each member counts, and what its average does to the common state.

    v_i  = common - local_i                 pseudo-gradient of member i: like a gradient, it points away from progress
    v    = sum_i w_i v_i / sum_i w_i        the all-reduce's result, the same bytes for every member
    m'   = mu m + v                         momentum
    common' = common - lr (v + mu m')       Nesterov's form of SGD;  mu = 0, lr = 1 gives sum_i w_i local_i / sum_i w_i

    w_i  = min(tokens_i^2 / steps_i, 3 * median)        of sketches of gradients, per token: min(tokens_i, 3 * median)

Every member runs the step on the same bytes and must end with the same bytes, on whatever CPU. So each operation rounds
on its own: a product, then a sum, never `add(alpha=)`, which a compiler may fuse into one rounding on some machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

SHARE_TOTAL = 1 << 20  # shares are integers, so their sums are exact in any order and in float64
WEIGHT_CAP = 3.0


class Weighting(Enum):
    """What a member's claims are worth, before the cap."""

    PROGRESS = "progress"  # tokens^2 / steps (tokens, times tokens a step): of pseudo-gradients
    TOKENS = "tokens"  # of means over tokens; a member without tokens weighs nothing and only receives

    @property
    def receivers(self) -> bool:
        """Whether members without tokens may take part."""
        return self is Weighting.TOKENS


class Claims(Protocol):
    """What a weight is made of: `facts.RoundFacts` has it."""

    @property
    def peer_id(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def steps(self) -> int: ...


@dataclass(frozen=True)
class Facts:
    """The least that `weights` needs, for callers without signed facts."""

    peer_id: str
    tokens: int
    steps: int
    norms: tuple[float, ...] = ()  # for `radial.combine`


def weights(facts: Sequence[Claims], weighting: Weighting = Weighting.PROGRESS) -> dict[str, float]:
    """Weight by peer id, at most WEIGHT_CAP times the lower median of the members that have tokens.

    Who claims one token has finished: it is there for its vote, and its zeros must neither be in the average nor in
    the median, or they would undo what those learn that are still training. It weighs nothing beside others that have
    more.

    The lower median is one member's own number. With two members it is the smaller one, so that neither can outweigh
    the other by more than that; a mean of the two would follow a liar anywhere. Raises ValueError on no members,
    duplicates, counts below 1 (tokens: below 0 if the weighting has receivers), or if nobody has tokens.
    """
    fewest = 0 if weighting.receivers else 1
    raw: dict[str, float] = {}
    for fact in facts:
        if fact.peer_id in raw:
            raise ValueError(f"{fact.peer_id} appears twice")
        if fact.tokens < fewest or fact.steps < 1:
            raise ValueError(f"{fact.peer_id} claims {fact.tokens} tokens in {fact.steps} steps")
        progress = fact.tokens * fact.tokens / fact.steps
        raw[fact.peer_id] = progress if weighting is Weighting.PROGRESS else float(fact.tokens)
    if weighting is Weighting.PROGRESS and any(fact.tokens > 1 for fact in facts):
        raw |= {fact.peer_id: 0.0 for fact in facts if fact.tokens == 1}
    counted = sorted(value for value in raw.values() if value)
    if not counted:
        raise ValueError("no members with tokens")
    limit = WEIGHT_CAP * counted[(len(counted) - 1) // 2]
    return {peer_id: min(value, limit) for peer_id, value in raw.items()}


def shares(weight_by_peer: Mapping[str, float]) -> dict[str, int]:
    """Weights as integers that sum to about SHARE_TOTAL; 0 only for a weight of 0. A subset's sum equals the whole's
    only if nobody is missing but members without a weight, which is how a partial average shows."""
    total = sum(weight_by_peer[peer_id] for peer_id in sorted(weight_by_peer))
    return {
        peer_id: max(1, round(weight / total * SHARE_TOTAL)) if weight else 0
        for peer_id, weight in weight_by_peer.items()
    }


def outer_step(common: Tensor, average: Tensor, momentum: Tensor, lr: float, mu: float) -> tuple[Tensor, Tensor]:
    """(new common, new momentum), see the module's formulas. All float32 on the CPU, shape (numel,); inputs unchanged.

    Raises ValueError on another dtype, device or shape, or if the result is not finite.
    """
    for name, tensor in (("common", common), ("average", average), ("momentum", momentum)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != common.shape:
            raise ValueError(f"{name} must be float32 on the CPU like common, got {tensor.dtype} {tuple(tensor.shape)}")
    new_momentum = torch.add(torch.mul(momentum, mu), average)
    direction = torch.add(average, torch.mul(new_momentum, mu))
    new_common = torch.sub(common, torch.mul(direction, lr))
    if not bool(torch.isfinite(new_common).all() & torch.isfinite(new_momentum).all()):
        raise ValueError("the outer step overflowed")
    return new_common, new_momentum


def digest(fragment: Tensor, momentum: Tensor) -> bytes:
    """sha256, 32 bytes, over both tensors' little-endian float32 bytes. Two zeros of different sign differ."""
    if fragment.dtype != torch.float32 or momentum.dtype != torch.float32 or fragment.shape != momentum.shape:
        raise ValueError("fragment and momentum must be float32 of one shape")
    sha = hashlib.sha256(b"shoal/fragment/1\0" + fragment.numel().to_bytes(8, "little"))
    for tensor in (fragment, momentum):
        sha.update(tensor.detach().contiguous().numpy().astype("<f4", copy=False).data)
    return sha.digest()
