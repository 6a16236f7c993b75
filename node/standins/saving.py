"""All stand-ins on disk: the whole swarm may end at once, and some owners never come back with their experts.

standin.<slot>.<layer>.<name>   the state that ran here of a slot of others; not of those that are as seeded

Those of owned slots are among the state of their publishers: `slot.<slot>.<layer>.publisher.published.<name>`.

Copies of slots (`slots/copies.py`) are better, and rarer: every composer has all stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.standin import Menu, StandIn, standin_of
from ...protocol.experts.surrogates import SEED, Point
from ..slots.slot_state import under
from ..storage.checkpoint import Checkpoint
from .following import Running

FACTS = "standins"  # of a checkpoint: by slot [epoch, seq]
_PUBLISHED = ".publisher.published."


@dataclass(frozen=True)
class SavedStandIns:
    """Of one slot."""

    epoch: int  # the latest known
    seq: int
    layers: tuple[StandIn, ...]  # none where they are as seeded


def standins_to_save(
    running: Mapping[int, Running], own: Mapping[int, Point], epochs: Mapping[int, int]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Tensors, none of them copied, and facts of a checkpoint.

    Args:
        running: by slot of others what runs here.
        own: by owned slot what is published.
        epochs: by slot the latest that was known before.
    """
    tensors: dict[str, Tensor] = {}
    facts = {str(slot): (point.epoch, point.seq) for slot, point in own.items()}
    for slot, state in running.items():
        epoch = max(state.epoch, state.point.epoch, epochs.get(slot, 0))
        if epoch:
            facts[str(slot)] = epoch, state.point.seq
        if state.point != SEED:
            for layer, standin in enumerate(state.layers):
                tensors |= {f"standin.{slot}.{layer}.{name}": value for name, value in standin.tensors.items()}
    return tensors, facts


def saved_standins(checkpoint: Checkpoint, menu: Menu, num_layers: int) -> dict[int, SavedStandIns]:
    """By slot. ValueError, KeyError or TypeError if the checkpoint does not hold stand-ins of this run."""
    states: dict[str, dict[str, dict[str, Tensor]]] = {}
    own = under("slot.", checkpoint.tensors).items()
    published = {name.replace(_PUBLISHED, "."): value for name, value in own if _PUBLISHED in name}
    for name, value in (published | under("standin.", checkpoint.tensors)).items():
        slot, layer, key = name.split(".", 2)
        states.setdefault(slot, {}).setdefault(layer, {})[key] = value
    found = {}
    for slot, (epoch, seq) in checkpoint.meta.get(FACTS, {}).items():
        layers = states.get(slot)
        held = [layers[str(layer)] for layer in range(num_layers)] if layers else []
        standins = tuple(menu.check(standin_of(state, bases=menu.bases)) for state in held)
        found[int(slot)] = SavedStandIns(int(epoch), int(seq), standins)
    return found
