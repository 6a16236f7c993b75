"""What a method costs whoever takes part: FLOPs, counted as they happen, and bytes of state, summed as they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..node.composer import Composer
from ..node.owning import ExpertOwner


@dataclass
class Flops:
    """Of the products in a `counting` block; a product of (m, k) and (k, n) is 2 m k n."""

    total: int = 0


@contextmanager
def counting() -> Iterator[Flops]:
    """Counts all that torch multiplies in the block on this thread: forward, backward, fits, sketches, merges.

    What works element by element (activations, optimizers, codecs) is not counted; at experts' sizes it is little.
    """
    flops = Flops()
    with FlopCounterMode(display=False) as counter:
        yield flops
    flops.total = counter.get_total_flops()


def state_bytes(owner: ExpertOwner) -> int:
    """Tensors that a participant holds between two steps: weights, optimizer state, stand-ins, what publishers keep to
    fit them, and the backbone as last merged. Neither activations nor gradients."""
    states = owner.optimizer.state.values()
    total: int = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
    for publishers in owner.publishers.values():
        total += sum(tensor.nbytes for publisher in publishers for tensor in publisher.state_dict().values())
    total += sum(expert.nbytes for slot in owner.owned for expert in owner.experts_of(slot))
    if not isinstance(owner, Composer):
        return total
    total += sum(parameter.nbytes for parameter in owner.backbone.values())
    total += sum(tensor.nbytes for tensor in (*owner.common, *owner.momentum))
    for slot in range(owner.num_slots):
        if slot not in owner.owned:
            total += sum(standin.nbytes for standin in owner.standins(slot))
    return total
