"""A composer on disk and back: it goes on as if it had never stopped, or says why it cannot."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, restore_backbone, saved_slots
from shoal.node.run.manifest import Manifest
from shoal.node.storage.checkpoint import CheckpointStore
from tiny import SLOTS, backbone_bits, batches, composer_of, expert_bits, manifest_of, train
from torch import Tensor


def saved(composer: Composer, folder: Path) -> CheckpointStore:
    store = CheckpointStore(folder)
    store.save(composer.step, composer_tensors(composer), {"step": composer.step, "tokens": composer.tokens})
    return store


def restored(store: CheckpointStore, manifest: Manifest, next_batch: Callable[[], Tensor]) -> Composer:
    composer = composer_of(manifest, owned=(), next_batch=next_batch)
    checkpoint = store.latest()
    assert checkpoint is not None
    restore_backbone(composer, checkpoint.tensors, checkpoint.meta)
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        composer.adopt(slot, tensors)
    return composer


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_a_restored_composer_goes_on_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    manifest = manifest_of(train={"optimizer": optimizer, "learning_rate": 1e-2})
    composer = composer_of(manifest, seed=secrets.randbits(32))
    train(composer, 3)
    composer.begin_round(0)
    composer.commit_round(0, composer.common[0] + 0.01, torch.randn_like(composer.common[0]))
    train(composer, 2)
    store = saved(composer, tmp_path)
    more = [batches()() for _ in range(3)]
    again = restored(store, manifest, iter(more).__next__)
    composer.next_batch = iter(more).__next__
    assert (again.step, again.tokens) == (composer.step, composer.tokens)
    assert all(map(torch.equal, again.common + again.momentum, composer.common + composer.momentum))
    assert train(again, 3) == train(composer, 3)
    assert backbone_bits(again) == backbone_bits(composer)
    assert [expert_bits(again, s) for s in range(SLOTS)] == [expert_bits(composer, s) for s in range(SLOTS)]


@pytest.mark.parametrize("codec", ["float16", "int4"])
def test_what_is_not_merged_yet_is_remembered(codec: str, tmp_path: Path) -> None:
    composer = composer_of(manifest_of(outer={"codec": codec}))
    train(composer, 2)
    composer.begin_round(0)
    composer.commit_round(0, composer.common[0] + 0.01, torch.zeros_like(composer.common[0]))
    train(composer, 3)
    again = restored(saved(composer, tmp_path), composer.manifest, batches())
    assert [again.unmerged(index) for index in range(2)] == [composer.unmerged(index) for index in range(2)]
    assert again.unmerged(0)[0] == 3
    assert bool(composer.lost) == (codec == "int4")
    for index in range(2):
        (vector, *counts), (wanted, *same) = again.begin_round(index), composer.begin_round(index)
        assert torch.equal(vector, wanted)
        assert counts == same


def test_owned_slots_are_saved_and_no_others(tmp_path: Path) -> None:
    composer = composer_of(owned=[1, 3])
    train(composer, 1)
    checkpoint = saved(composer, tmp_path).latest()
    assert checkpoint is not None
    assert set(saved_slots(checkpoint.tensors)) == {1, 3}


FOREIGN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a weight is missing": lambda t: t.pop(next(n for n in t if n.startswith("backbone."))),
    "a weight is of another model": lambda t: t.update({"backbone.lm_head.weight": torch.zeros(2, 2)}),
    "a weight is NaN": lambda t: t["backbone.lm_head.weight"].view(-1)[0].fill_(math.nan),
    "a moment is missing": lambda t: t.pop("optimizer.lm_head.weight.exp_avg"),
    "a fragment is missing": lambda t: t.pop("common.1"),
    "more is unmerged than was trained": lambda t: t["unmerged.1"].fill_(1 << 40),
    "what a codec kept back is NaN": lambda t: t.update({"lost.1": torch.full_like(t["common.1"], math.nan)}),
    "a fragment is cut otherwise": lambda t: t.update({"momentum.1": t["momentum.1"][1:]}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_checkpoint_is_refused_whole(name: str) -> None:
    source, target = composer_of(), composer_of(owned=())
    train(source, 1)
    tensors = composer_tensors(source)
    FOREIGN[name](tensors)
    before = backbone_bits(target)
    with pytest.raises(ValueError, match=r"."):
        restore_backbone(target, tensors, {"step": 1, "tokens": 1})
    assert backbone_bits(target) == before
    assert (target.step, dict(target.optimizer.state)) == (0, {})


def test_damage_on_disk_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    composer = composer_of()
    train(composer, 1)
    store = saved(composer, tmp_path)
    train(composer, 1)
    saved(composer, tmp_path)
    newest = max(tmp_path.glob("*-step-*")) / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.meta["step"] == 1
