"""What a method costs whoever takes part: FLOPs, counted as they happen, and bytes of tensors, as they lie.

Held is what is there between two steps, found by walking from object to object; a peak is what torch's allocator then
hands out on top of it, as its profiler records it. Neither has what Python and libraries take: for a process of its own
that is a hundred times what these small models do, and `bench swarm` says how much.
"""

from __future__ import annotations

import gc
import os
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..node.learning.composer import Composer
from ..node.learning.owning import ExpertOwner

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _added_product(into: Shape, a: Shape, b: Shape, *_: object, **__: object) -> int:
    return 2 * a[0] * a[1] * b[1]


# What torch's counter has no formula for, and passes over without a word.
_MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
}

_NOT_HELD = (types.ModuleType, types.FunctionType, types.MethodType, type)  # code, and the text behind `next_batch`


@dataclass
class Flops:
    """Of the products in a `counting` block; a product of (m, k) and (k, n) is 2 m k n."""

    total: int = 0


@contextmanager
def counting() -> Iterator[Flops]:
    """Counts all that torch multiplies in the block on this thread: forward, backward, fits, sketches, merges.

    Attention is counted over all pairs of a window's tokens, masked ones too, as torch counts it on a GPU. What works
    element by element (activations, optimizers, codecs) is not counted, nor are factorisations (a delta's of low rank,
    the rebuilding of gradient sketches); at experts' sizes it is little.
    """
    flops = Flops()
    with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        yield flops
    flops.total = counter.get_total_flops()


def held_bytes(*roots: object, without: Collection[object] = ()) -> int:
    """Bytes of all tensors that can be reached from `roots` and not through any of `without`, each storage once."""
    storages: dict[int, int] = {}
    seen = {id(each) for each in without}
    todo = list(roots)
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, _NOT_HELD):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        todo.extend(gc.get_referents(each))
    return sum(storages.values())


def state_bytes(owner: ExpertOwner, *, publishes: bool = True) -> int:
    """Of a participant between two steps: weights, optimizer state, stand-ins, what publishers keep to fit them and
    their last versions, if it `publishes` any, and the backbone as last merged. Neither activations nor gradients."""
    return held_bytes(owner, without=() if publishes else (owner.publishers, owner.past))


def expert_bytes(owner: ExpertOwner, *, publishes: bool = True) -> int:
    """That part of `state_bytes` that is there for experts, its own and those of others, and for sketches."""
    own = [expert for slot in owner.owned for expert in owner.experts_of(slot)]
    held: list[object] = [
        own,
        owner.shares,
        [owner.optimizer.state.get(weight) for expert in own for weight in expert.trained],
    ]
    if publishes:
        held += [owner.publishers, owner.past]
    if isinstance(owner, Composer):
        held += [owner.standins(slot) for slot in range(owner.num_slots) if slot not in owner.owned]
        held.append(owner.collector)
    return held_bytes(*held)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at one time while `work` ran, of what it allocated itself.

    What was there before and is given back meanwhile is not taken off: where `work` replaces tensors, this is a little
    too much, never too little.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces itself on stderr
    with profile(use_cpu=True, profile_memory=True) as recorded:
        work()
    result = recorded.kineto_results
    assert result is not None
    events = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    held = most = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        held += nbytes
        most = max(most, held)
    return most
