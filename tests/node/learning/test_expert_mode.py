"""Owners that train experts in part or not at all: what they learn, keep, publish and hand over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shoal.kernels.lora import LoraExpert
from shoal.node.config import PeerConfig
from shoal.node.errors import ConfigError
from shoal.node.learning.composer import Composer
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.learning.owning import ExpertOwner
from shoal.node.learning.persistence import composer_tensors, restore_backbone, saved_slots
from shoal.node.learning.worker import Worker
from shoal.node.run.manifest import Manifest
from shoal.node.storage.checkpoint import CheckpointStore
from sketches import OTHER, rows, sketch_of, state_of
from tiny import LAYERS, SLOTS, batches, manifest_of, train
from torch import Tensor

LORA = {"mode": "lora", "rank": 6, "alpha": 12.0}
OPTIMIZERS = ("adamw", "adamw8bit", "muon")


def composer(manifest: Manifest, mode: str, *, owned: object = range(SLOTS), tokens: Tensor | None = None) -> Composer:
    next_batch = batches() if tokens is None else lambda: tokens
    how = ExpertMode(manifest.train, **LORA) if mode == "lora" else ExpertMode(manifest.train, mode)  # type: ignore[arg-type]
    return Composer(manifest, owned=owned, next_batch=next_batch, mode=how)  # type: ignore[arg-type]


def dense(owner: ExpertOwner, slot: int) -> list[Tensor]:
    return [matrix.detach().clone() for expert in owner.experts_of(slot) for matrix in expert.dense()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_low_rank_experts_learn(optimizer: str) -> None:
    """With a backbone that hardly moves, so that it is they who do."""
    tokens = batches()()
    one = composer(manifest_of(train={"learning_rate": 2e-2, "optimizer": optimizer}), "lora", tokens=tokens)
    for parameter in one.backbone.values():
        parameter.requires_grad_(False)
    bases = [expert.base for slot in range(SLOTS) for expert in one.experts_of(slot)]
    held = [{name: tensor.clone() for name, tensor in base.tensors.items()} for base in bases]
    losses = train(one, 60)
    assert losses[-1] < losses[0] - 0.5
    for base, before in zip(bases, held, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.tensors.items())


def test_frozen_experts_stay_while_the_backbone_learns() -> None:
    tokens = batches()()
    one = composer(manifest_of(train={"learning_rate": 1e-2}), "frozen", tokens=tokens)
    before = [dense(one, slot) for slot in range(SLOTS)]
    losses = train(one, 30)
    assert losses[-1] < losses[0] - 0.3
    for slot in range(SLOTS):
        assert all(map(torch.equal, before[slot], dense(one, slot)))
    handed_on = one.snapshot(0)
    assert torch.equal(handed_on["0.gate_up"], before[0][0])
    assert torch.equal(handed_on["0.down"], before[0][1])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["lora", "frozen"])
def test_a_checkpoint_goes_on_to_the_bit(mode: str, optimizer: str, tmp_path: Path) -> None:
    manifest = manifest_of(train={"learning_rate": 1e-2, "optimizer": optimizer})
    one = composer(manifest, mode)
    train(one, 3)
    store = CheckpointStore(tmp_path)
    store.save(one.step, composer_tensors(one), {"step": one.step, "tokens": one.tokens})
    checkpoint = store.latest()
    assert checkpoint is not None
    again = composer(manifest, mode, owned=())
    restore_backbone(again, checkpoint.tensors, checkpoint.meta)
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        again.adopt(slot, tensors)
    more = [batches()() for _ in range(3)]
    one.next_batch, again.next_batch = iter(more).__next__, iter(more).__next__
    assert train(again, 3) == train(one, 3)
    for slot in range(SLOTS):
        assert all(map(torch.equal, dense(again, slot), dense(one, slot)))
    # Whoever trains in another way from now on has the same experts.
    other = composer(manifest, "full", owned=())
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        other.adopt(slot, tensors)
    fresh = composer(manifest, mode, owned=())
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        fresh.adopt(slot, tensors)
        assert all(map(torch.equal, dense(other, slot), dense(fresh, slot)))


@pytest.mark.parametrize("taker", ["full", "lora", "frozen"])
@pytest.mark.parametrize("giver", ["full", "lora", "frozen"])
def test_slots_go_from_one_to_the_other(giver: str, taker: str) -> None:
    manifest = manifest_of(train={"learning_rate": 1e-2})
    one = composer(manifest, giver)
    train(one, 3)
    one.publish()
    other = composer(manifest, taker, owned=())
    other.adopt(1, one.snapshot(1), one.standins(1))
    for wanted, got in zip(dense(one, 1), dense(other, 1), strict=True):
        if taker == "lora":  # quantised, once
            assert 0 < (got - wanted).norm() < 0.15 * wanted.norm()
        else:
            assert torch.equal(got, wanted)
    assert [s.digest() for s in other.standins(1)] == [s.digest() for s in one.standins(1)]
    assert len(train(other, 2)) == 2
    deltas = other.publish([1])[1]
    for standin, delta in zip(one.standins(1), deltas, strict=True):
        standin.apply(delta)  # what is published follows from what all have


def test_what_is_published_is_the_product() -> None:
    one = composer(manifest_of(train={"learning_rate": 1e-2}), "lora")
    train(one, 5)
    one.publish()
    pairs = zip(one.publishers[0], one.experts_of(0), strict=True)
    assert min(publisher.fidelity(expert) for publisher, expert in pairs) > 0.8
    bases = [expert.base.dense()[0] for expert in one.experts_of(0)]  # type: ignore[attr-defined]
    for base, standin in zip(bases, one.standins(0), strict=True):
        assert (standin.dense()[0] - base).norm() > 0.2 * base.norm()  # and not the base alone
    torch.testing.assert_close(one.weights(0)["0.gate_up"], one.experts_of(0)[0].dense()[0])


def test_sketches_teach_factors_what_they_teach_weights() -> None:
    """A step's gradients are those of all weights, by the chain rule."""
    manifest = manifest_of(sketch={"kappa": 0.0})
    workers = {}
    state, standins = state_of(manifest)
    for position in range(LAYERS):  # so that both compute the same
        low = LoraExpert.of(state[f"{position}.gate_up"], state[f"{position}.down"], rank=6, alpha=12)
        state[f"{position}.gate_up"], state[f"{position}.down"] = low.dense()
    for name, mode in (("full", ExpertMode(manifest.train)), ("lora", ExpertMode(manifest.train, **LORA))):  # type: ignore[arg-type]
        workers[name] = Worker(manifest, composers=lambda: {OTHER: 0}, mode=mode)
        workers[name].adopt(0, state, standins)
    sketch = sketch_of(*rows(20))
    for worker in workers.values():
        worker.hear(OTHER, 0, {0: sketch}, tokens=40, step=1)
        worker._set_gradients(0, [0])
    (full, _), (lora, _) = (worker.experts_of(0) for worker in workers.values())
    gradients = [weights.grad for weights in full.trained]
    assert gradients[0] is not None
    assert gradients[1] is not None
    for factor, wanted in zip(lora.trained, lora.project(*gradients), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(factor.grad, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    assert workers["lora"].train_step().skipped is False


@pytest.mark.parametrize("mode", ["full", "lora", "frozen"])
@pytest.mark.parametrize(
    ("damage", "complaint"), [("huge", "above"), ("rank", "of rank"), ("nan", "gate_up_b"), ("gone", "lacks absmax")]
)
def test_damaged_factors_are_refused(mode: str, damage: str, complaint: str) -> None:
    """They may come from a peer: a worker that comes back hands on what it had written down."""
    manifest = manifest_of()
    giver, taker = composer(manifest, "lora"), composer(manifest, mode, owned=())
    saved = giver.saved(1)
    if damage == "huge":
        saved["1.lora.down_b"].fill_(1e4)
        saved["1.lora.down_a"].fill_(1e4)
    elif damage == "rank":
        saved["1.lora.gate_up_a"] = saved["1.lora.gate_up_a"].repeat(99, 1)
    elif damage == "nan":
        saved["1.lora.gate_up_b"][0, 0] = torch.nan
    else:
        del saved["1.lora.absmax"]
    with pytest.raises(ValueError, match=complaint):
        taker.adopt(1, saved, giver.standins(1))
    assert not taker.owned
    taker.adopt(1, giver.saved(1), giver.standins(1))


def test_a_worker_that_trains_nothing_takes_steps() -> None:
    manifest = manifest_of()
    worker = Worker(manifest, composers=lambda: {OTHER: 0}, mode=ExpertMode(manifest.train, "frozen"))
    worker.adopt(0, *state_of(manifest))
    before = dense(worker, 0)
    worker.hear(OTHER, 0, {0: sketch_of(*rows(5))}, tokens=5, step=1)
    assert worker.train_step().slots == (0,)
    assert all(map(torch.equal, before, dense(worker, 0)))


def test_what_cannot_be_is_refused() -> None:
    ternary = manifest_of(train={"expert_weights": "ternary"}, standin={"kind": "ternary"})
    with pytest.raises(ConfigError, match="ternary"):
        ExpertMode(ternary.train, "lora")
    ExpertMode(manifest_of().train, "lora", rank=24).require_rank(32, 24)
    with pytest.raises(ConfigError, match="lora-rank 24 at most"):
        ExpertMode(manifest_of().train, "lora", rank=25).require_rank(32, 24)
    with pytest.raises(ConfigError, match="at least 1"):
        ExpertMode(manifest_of().train, "lora", rank=0).require_rank(32, 24)
    for bad in ({"lora_rank": 0}, {"lora_alpha": 0.0}, {"expert_mode": "half"}):
        with pytest.raises(ConfigError):
            PeerConfig(**bad)  # type: ignore[arg-type]
    config = PeerConfig(expert_mode="lora", lora_rank=3, lora_alpha=9.0)
    assert ExpertMode.of(config, manifest_of().train) == ExpertMode(manifest_of().train, "lora", 3, 9.0)
