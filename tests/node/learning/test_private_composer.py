"""A composer with private layers: it trains them, merges them with others, and keeps them over a restart."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, restore_backbone
from shoal.node.model.init import backbone_shapes
from shoal.node.run.manifest import Manifest
from shoal.protocol.averaging.fragments import partition
from tiny import LAYERS, SLOTS, backbone_bits, composer_of, expert_bits, manifest_of, train

PRIVATE = LAYERS - 1
NAMES = [
    f"model.layers.{layer}.mlp.experts.{part}_{expert}"
    for layer in range(PRIVATE)
    for part in ("gate_up", "down")
    for expert in range(SLOTS)
]


def private_run(**specs: dict[str, Any]) -> Manifest:
    plain = manifest_of(**specs)
    return msgspec.structs.replace(plain, model=msgspec.structs.replace(plain.model, private_layers=PRIVATE))


def merge(composers: list[Composer]) -> None:
    """One outer step of every fragment."""
    for index in range(len(composers[0].fragments)):
        pseudo = [composer.begin_round(index)[0] for composer in composers]
        average = torch.stack(pseudo).mean(0)
        for composer in composers:
            composer.commit_round(index, *composer.propose(index, average))


def test_alone_it_learns_what_it_learns_without() -> None:
    """Who holds everything takes the same steps, whatever is private: same losses, same weights."""
    seed = int(torch.seed()) % 2**31
    print("seed", seed)
    # The order of a sum of squares over tensors depends on their order, so gradients are not clipped here.
    plain = composer_of(manifest_of(train={"grad_clip": 1e9}), seed=seed)
    ours = composer_of(private_run(train={"grad_clip": 1e9}), seed=seed)
    assert train(ours, 6) == train(plain, 6)
    for slot in range(SLOTS):
        per_layer = len(expert_bits(plain, slot)) // LAYERS
        assert expert_bits(ours, slot) == expert_bits(plain, slot)[PRIVATE * per_layer :]
        for layer in range(PRIVATE):
            names = [f"model.layers.{layer}.mlp.experts.{part}_{slot}" for part in ("gate_up", "down")]
            bits = backbone_bits(ours)
            assert [bits[name] for name in names] == expert_bits(plain, slot)[layer * per_layer :][:per_layer]


def test_private_experts_are_trained_and_merged() -> None:
    run = private_run(outer={"fragments": 3})
    pair = [composer_of(run, owned=range(2)), composer_of(run, owned=range(2, SLOTS))]
    before = backbone_bits(pair[0])
    assert set(NAMES) < before.keys()
    assert [f.names for f in pair[0].fragments] == [f.names for f in partition(backbone_shapes(run.model), 3)]
    for composer in pair:
        train(composer, 4)
    trained = [backbone_bits(composer) for composer in pair]
    moved = [name for name in NAMES if trained[0][name] != before[name]]
    assert len(moved) > len(NAMES) // 2  # one without a token stays where it is
    assert any(trained[0][name] != trained[1][name] for name in NAMES)
    merge(pair)
    assert backbone_bits(pair[0]).keys() == backbone_bits(pair[1]).keys()
    for index in range(3):
        torch.testing.assert_close(pair[0].local_fragment(index), pair[1].local_fragment(index), rtol=1e-5, atol=1e-6)


def test_stand_ins_and_snapshots_know_slots_only() -> None:
    run = private_run(train={"steps": 10}, standin={"kind": "lowbit"})
    composer = composer_of(run, owned=range(2))
    other = composer_of(run, owned=range(2, SLOTS))
    train(composer, 3)
    assert [len(layers) for layers in composer.publish().values()] == [LAYERS - PRIVATE] * 2
    assert [len(composer.standins(slot)) for slot in range(SLOTS)] == [LAYERS - PRIVATE] * SLOTS
    assert {name.split(".")[0] for name in composer.snapshot(0)} == {str(n) for n in range(LAYERS - PRIVATE)}
    other.adopt(0, composer.snapshot(0))
    assert expert_bits(other, 0) == expert_bits(composer, 0)
    composer.release(0)
    assert composer.owned == {1}
    train(composer, 1)
    train(other, 1)
    assert composer.last_counts is not None
    assert composer.last_counts.shape == (LAYERS, SLOTS)


def test_checkpoints_keep_them() -> None:
    run = private_run()
    composer = composer_of(run, seed=5)
    train(composer, 3)
    again = composer_of(run, seed=6)
    restore_backbone(again, composer_tensors(composer), {"step": composer.step, "tokens": composer.tokens})
    assert backbone_bits(again) == backbone_bits(composer)
    for name in NAMES:
        ours, theirs = (c.optimizer.state.get(c.backbone[name], {}) for c in (composer, again))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
