"""A directory that both roles of one run used: each finds the newest checkpoint of its own, or starts without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback_workers import HANDLES, worked_manifest, working
from shoal.node.learning.composer import Composer
from shoal.node.learning.data import Batches
from shoal.node.learning.persistence import composer_tensors
from shoal.node.peer.restoring import restore_composer, restore_worker
from shoal.node.slots.slot_order import LayerOrder
from shoal.node.storage.checkpoint import CheckpointStore
from tiny import BATCH, CONTEXT, LAYERS, SLOTS, backbone_bits, composer_of, train
from torch import Tensor

MANIFEST = worked_manifest()
ORDER = LayerOrder(HANDLES, LAYERS)


def text() -> Batches:
    return Batches(np.arange(1000, dtype=np.int32) % 256, BATCH, CONTEXT, seed=3)


def save_composer(store: CheckpointStore, composer: Composer, **changes: Any) -> None:
    """As a composer peer does, with other facts where `changes` names them."""
    meta = {
        "step": composer.step,
        "tokens": composer.tokens,
        "held": [7] * len(composer.fragments),
        "slots": {str(slot): 5 for slot in composer.owned},
        "batches": {"seed": 3, "position": 11},
    } | changes
    store.save(composer.step, composer_tensors(composer), {name: value for name, value in meta.items() if value})


@pytest.fixture(scope="module")
def a_workers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint that a real worker wrote of all slots."""
    with working(tmp_path_factory.mktemp("swarm"), MANIFEST, 1) as it:
        worker = it.join("first")
        it.swarm.until(lambda: set(worker.held) == set(range(SLOTS)), "the worker owns every slot")
        return worker.ask(worker.peer._checkpoint_of)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def test_a_composer_looks_past_what_a_worker_left(
    store: CheckpointStore, a_workers: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    source, target, batches = composer_of(MANIFEST, owned=[1, 3]), composer_of(MANIFEST, owned=()), text()
    train(source, 2)
    store.save(50, *a_workers)
    before = backbone_bits(target)
    assert restore_composer(store, target, batches, ORDER) is None
    assert (backbone_bits(target), target.step, batches.position) == (before, 0, 0)

    save_composer(store, source)
    store.save(60, *a_workers)
    found = restore_composer(store, target, batches, ORDER)
    assert found is not None
    assert backbone_bits(target) == backbone_bits(source)
    assert (target.step, batches.position, set(found.rounds), set(found.saved)) == (2, 11, {7}, {1, 3})
    assert found.saved[1].copy.epoch == 5


@pytest.mark.parametrize("owned", [[], [0, 2]])
def test_a_worker_looks_past_what_a_composer_left(
    owned: list[int], store: CheckpointStore, a_workers: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    composer = composer_of(MANIFEST, owned=owned)
    train(composer, 1)
    save_composer(store, composer)
    assert restore_worker(store) == {}

    tensors, meta = a_workers
    store.save(50, tensors, meta)
    save_composer(store, composer)
    saved = restore_worker(store)
    assert {str(slot): snapshot.copy.epoch for slot, snapshot in saved.items()} == meta["slots"]
    assert all(
        torch.equal(value, tensors[f"slot.{slot}.{name}"])
        for slot, snapshot in saved.items()
        for name, value in snapshot.tensors.items()
    )


@pytest.mark.parametrize(
    "changes", [{"held": [1]}, {"held": None}, {"batches": None}, {"slots": {"0": 1}}, {"held": ["x", "y"]}], ids=str
)
def test_what_says_too_little_is_passed_over_and_changes_nothing(
    changes: dict[str, Any], store: CheckpointStore
) -> None:
    older, newer, target, batches = (*(composer_of(MANIFEST, owned=[1]) for _ in range(3)), text())
    train(older, 1)
    train(newer, 2)
    save_composer(store, older)
    save_composer(store, newer, **changes)
    assert restore_composer(store, target, batches, ORDER) is not None
    assert (target.step, backbone_bits(target)) == (1, backbone_bits(older))
