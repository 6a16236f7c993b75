"""One learner by itself: inner steps, outer steps as arithmetic, and slots that come and go to the bit."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable

import pytest
import torch
from shoal.kernels.standin import initial_standin
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, restore_backbone
from shoal.node.run.manifest import Manifest
from shoal.node.slots.slot_state import SlotTensors
from shoal.protocol.averaging.fragments import kind_of, unflatten
from shoal.protocol.averaging.merging import Facts, digest
from tiny import (
    CONTEXT,
    HIDDEN,
    LAYERS,
    SLOTS,
    WIDTH,
    backbone_bits,
    batches,
    composer_of,
    expert_bits,
    manifest_of,
    train,
)
from torch import Tensor


def random_state(composer: Composer, index: int) -> tuple[Tensor, Tensor]:
    """Some other common state of a fragment, as a fetch could bring it."""
    common = composer.common[index]
    return common + 0.01 * torch.randn_like(common), torch.randn_like(common)


def test_training_learns_and_counts() -> None:
    tokens = batches()()
    composer = composer_of(manifest_of(train={"learning_rate": 1e-2}), next_batch=lambda: tokens)
    losses = train(composer, 30)
    assert losses[-1] < losses[0] - 0.5
    assert (composer.step, composer.tokens) == (30, 30 * tokens.numel())


def test_same_seed_same_bits() -> None:
    seed = secrets.randbits(32)
    first, second = composer_of(seed=seed), composer_of(seed=seed)
    assert train(first, 3) == train(second, 3)
    assert backbone_bits(first) == backbone_bits(second)


def test_learning_rate_schedule() -> None:
    peak, final, warmup, steps = 0.01, 0.1, 5, 40
    composer = composer_of(
        manifest_of(train={"learning_rate": peak, "final_lr_fraction": final, "warmup_steps": warmup, "steps": steps})
    )
    rates = []
    for step in range(steps + 10):
        composer.step = step
        rates.append(composer.learning_rate())
    assert rates[:warmup] == pytest.approx([peak * (i + 1) / warmup for i in range(warmup)])
    assert rates[warmup] == pytest.approx(peak)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rates[(warmup + steps) // 2] == pytest.approx(peak * (1 + final) / 2, rel=0.05)
    assert rates[steps:] == pytest.approx([peak * final] * 10)


def test_experts_follow_the_schedule_at_their_own_rate() -> None:
    """AdamW's first step is the learning rate, but where a gradient is zero."""
    manifest = manifest_of(train={"expert_rate": 3.0, "warmup_steps": 0, "learning_rate": 1e-3, "weight_decay": 0.0})
    composer = composer_of(manifest)
    trained = {"backbone": list(composer.backbone.values()), "experts": list(composer.experts_of(0)[0].trained)}
    before = {who: [t.detach().clone() for t in tensors] for who, tensors in trained.items()}
    composer.train_step()
    moved = {
        who: max(float((t.detach() - b).abs().max()) for t, b in zip(tensors, before[who], strict=True))
        for who, tensors in trained.items()
    }
    assert moved["backbone"] == pytest.approx(1e-3, rel=0.01)
    assert moved["experts"] == pytest.approx(3e-3, rel=0.01)


def test_no_warmup_starts_at_the_peak() -> None:
    composer = composer_of(manifest_of(train={"learning_rate": 0.01, "warmup_steps": 0}))
    assert composer.learning_rate() == 0.01


# -- outer steps ---------------------------------------------------------------------------------------------------


def test_commit_rebases_what_was_learned_since() -> None:
    composer = composer_of()
    index = random.randrange(len(composer.fragments))
    train(composer, 2)
    pseudo_gradient, tokens, steps, norms = composer.begin_round(index)
    assert norms == ()
    sent = composer.local_fragment(index)
    assert torch.equal(pseudo_gradient, composer.common[index] - sent)
    assert (tokens, steps) == (composer.tokens, 2)
    train(composer, 3)
    drift = composer.local_fragment(index) - sent
    fragment, momentum = random_state(composer, index)
    composer.commit_round(index, fragment, momentum)
    assert torch.equal(composer.local_fragment(index), fragment + drift)
    assert torch.equal(composer.common[index], fragment)
    assert torch.equal(composer.momentum[index], momentum)
    assert composer.steps_since_commit(index) == 3
    assert composer.begin_round(index)[1:3] == (composer.tokens - tokens, 3)


def test_commit_without_steps_meanwhile_is_the_common_state_to_the_bit() -> None:
    composer = composer_of()
    train(composer, 2)
    for index in range(len(composer.fragments)):
        composer.begin_round(index)
        fragment, momentum = random_state(composer, index)
        composer.commit_round(index, fragment, momentum)
        assert torch.equal(composer.local_fragment(index), fragment)
        assert composer.steps_since_commit(index) == 0


def test_of_attempts_at_a_round_the_last_one_that_others_have_counts() -> None:
    composer = composer_of()
    train(composer, 2)
    composer.begin_round(0)
    told = composer.local_fragment(0)
    composer.doubt_round(0)  # others have it, and may commit it
    composer.begin_round(0)
    composer.withdraw_round(0)  # nobody came
    train(composer, 1)
    drift = composer.local_fragment(0) - told
    fragment, momentum = random_state(composer, 0)
    composer.commit_round(0, fragment, momentum)
    assert torch.equal(composer.local_fragment(0), fragment + drift)
    assert composer.steps_since_commit(0) == 1
    composer.commit_round(0, *random_state(composer, 0))  # it counts once
    torch.testing.assert_close(composer.local_fragment(0) - composer.common[0], drift, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("abandoned", [False, True], ids=["never entered", "abandoned"])
def test_a_commit_without_this_composer_keeps_its_work_unmerged(abandoned: bool) -> None:
    composer = composer_of()
    train(composer, 3)
    if abandoned:
        composer.begin_round(0)
        train(composer, 1)
        composer.abandon_round(0)
    drift = composer.local_fragment(0) - composer.common[0]
    fragment, momentum = random_state(composer, 0)
    composer.commit_round(0, fragment, momentum)
    assert torch.equal(composer.local_fragment(0), fragment + drift)
    assert composer.steps_since_commit(0) == composer.step
    pseudo_gradient, tokens, steps, _ = composer.begin_round(0)
    assert (tokens, steps) == (composer.tokens, composer.step)
    torch.testing.assert_close(pseudo_gradient, -drift, rtol=0, atol=1e-6)


def test_reset_drops_the_drift() -> None:
    composer = composer_of()
    train(composer, 2)
    composer.begin_round(0)
    fragment, momentum = random_state(composer, 0)
    composer.reset_fragment(0, fragment, momentum)
    assert torch.equal(composer.local_fragment(0), fragment)
    assert composer.steps_since_commit(0) == 0


def test_propose_changes_nothing() -> None:
    composer = composer_of(manifest_of(outer={"learning_rate": 0.7, "momentum": 0.9}))
    train(composer, 1)
    before = backbone_bits(composer), [t.clone() for t in (*composer.common, *composer.momentum)]
    average = composer.begin_round(0).vector
    fragment, momentum = composer.propose(0, average)
    assert backbone_bits(composer) == before[0]
    assert all(map(torch.equal, (*composer.common, *composer.momentum), before[1]))
    torch.testing.assert_close(momentum, average)
    torch.testing.assert_close(fragment, composer.common[0] - 0.7 * 1.9 * average)


def test_plain_mean_of_one_is_the_local_state() -> None:
    composer = composer_of(manifest_of(outer={"learning_rate": 1.0, "momentum": 0.0}))
    train(composer, 2)
    for index in range(len(composer.fragments)):
        average = composer.begin_round(index).vector
        fragment, _ = composer.propose(index, average)
        torch.testing.assert_close(fragment, composer.local_fragment(index), rtol=0, atol=1e-7)


def test_a_radial_merge_is_the_same_everywhere_and_as_long_as_its_members() -> None:
    manifest = manifest_of(outer={"merge": "radial", "learning_rate": 0.7, "momentum": 0.9})
    composers = [composer_of(manifest) for _ in range(3)]
    for composer in composers:
        train(composer, 2)
    for index, fragment in enumerate(composers[0].fragments):
        common = composers[0].common[index]
        drifts = [unflatten(fragment, common - composer.local_fragment(index)) for composer in composers]
        entries = [composer.begin_round(index) for composer in composers]
        facts = [Facts(str(i), entry.tokens, entry.steps, entry.norms) for i, entry in enumerate(entries)]
        average = torch.stack([entry.vector for entry in entries]).mean(0)
        proposals = [composer.propose(index, average, facts) for composer in composers]
        assert len({digest(*proposal) for proposal in proposals}) == 1
        merged = unflatten(fragment, proposals[0][1])  # the first momentum is the pseudo-gradient itself
        for name in fragment.names:
            norms = [drift[name].norm().item() for drift in drifts]
            mean = torch.stack([drift[name] for drift in drifts]).mean(0)
            if kind_of(name) is None:
                if mean.numel() >= 256:  # small ones may be degenerate, if chance will have it
                    assert merged[name].norm().item() == pytest.approx(sum(norms) / 3, rel=1e-4)
                    assert merged[name].norm() > mean.norm()
            else:
                torch.testing.assert_close(merged[name], mean, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(proposals[0][0], common - 0.7 * 1.9 * proposals[0][1])
    with pytest.raises(ValueError, match="no members"):
        composers[0].propose(0, average)


# -- bad batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_a_step_that_is_not_finite_changes_no_weight(kind: str) -> None:
    composer = composer_of(manifest_of(standin={"kind": kind, "replay_rows": 64}))
    train(composer, 4)
    name = next(iter(composer.backbone))
    before = backbone_bits(composer), [expert_bits(composer, s) for s in range(SLOTS)]
    handle = composer.backbone[name].register_hook(lambda grad: grad * math.nan)
    composer.train_step()
    handle.remove()
    assert (backbone_bits(composer), [expert_bits(composer, s) for s in range(SLOTS)]) == before
    report = composer.train_step()
    assert math.isfinite(report.loss)
    assert backbone_bits(composer) != before[0]
    for deltas in composer.publish().values():
        assert len(deltas) == LAYERS
    assert all(math.isfinite(value) for value in composer.fidelity())


# -- slots ---------------------------------------------------------------------------------------------------------


def test_a_frozen_slot_is_not_trained_until_it_thaws() -> None:
    composer = composer_of(manifest_of(train={"learning_rate": 1e-2}))
    train(composer, 2)
    slot = random.randrange(SLOTS)
    before = {s: expert_bits(composer, s) for s in range(SLOTS)}
    composer.freeze(slot)
    train(composer, 3)
    assert expert_bits(composer, slot) == before[slot]
    assert any(expert_bits(composer, s) != before[s] for s in range(SLOTS) if s != slot)
    composer.thaw(slot)
    train(composer, 3)
    assert expert_bits(composer, slot) != before[slot]


def test_only_owned_slots_can_be_frozen() -> None:
    composer = composer_of(owned=[0])
    with pytest.raises(ValueError, match="not owned"):
        composer.freeze(1)
    train(composer, 1)


def moved(source: Composer, manifest: Manifest, next_batch: Callable[[], Tensor]) -> Composer:
    """Another composer with the backbone of `source`, to which all its slots were handed over one by one."""
    target = composer_of(manifest, owned=(), next_batch=next_batch, fit_seed=1)
    restore_backbone(target, composer_tensors(source), {"step": source.step, "tokens": source.tokens})
    for slot in sorted(source.owned):
        target.adopt(slot, source.snapshot(slot), source.standins(slot))
    return target


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("trained", [0, 3], ids=["untrained", "trained"])
def test_a_moved_slot_goes_on_to_the_bit(optimizer: str, trained: int) -> None:
    manifest = manifest_of(train={"optimizer": optimizer, "learning_rate": 1e-2})
    seed = secrets.randbits(32)
    stays = composer_of(manifest, seed=seed)
    train(stays, trained)
    stays.publish()
    more = [batches()() for _ in range(4)]
    goes = moved(stays, manifest, iter(more).__next__)
    stays.next_batch = iter(more).__next__
    assert train(stays, 4) == train(goes, 4)
    assert backbone_bits(stays) == backbone_bits(goes)
    assert stays.publish() == goes.publish()
    for slot in range(SLOTS):
        assert expert_bits(stays, slot) == expert_bits(goes, slot)
        ours, theirs = stays.snapshot(slot), goes.snapshot(slot)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_snapshot_is_a_copy() -> None:
    composer = composer_of()
    train(composer, 1)
    taken = composer.snapshot(0)
    before = {name: value.clone() for name, value in taken.items()}
    train(composer, 2)
    composer.publish()
    assert all(torch.equal(taken[name], before[name]) for name in taken)


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_a_released_slot_runs_what_was_published(kind: str) -> None:
    composer = composer_of(manifest_of(standin={"kind": kind, "replay_rows": 64}))
    train(composer, 3)
    composer.publish()
    published = [standin.to_bytes() for standin in composer.standins(1)]
    train(composer, 1)
    parameters = sum(len(group["params"]) for group in composer.optimizer.param_groups)
    states = len(composer.optimizer.state)
    composer.release(1)
    assert composer.owned == {0, 2, 3}
    assert [standin.to_bytes() for standin in composer.standins(1)] == published
    assert sum(len(group["params"]) for group in composer.optimizer.param_groups) == parameters - 2 * LAYERS
    assert len(composer.optimizer.state) == states - 2 * LAYERS
    train(composer, 1)


def test_adopting_from_the_seed_restores_the_seeded_expert() -> None:
    fresh = composer_of()
    composer = composer_of(owned=[0])
    train(composer, 2)
    composer.adopt(2, None)
    assert expert_bits(composer, 2) == expert_bits(fresh, 2)
    train(composer, 1)


def test_every_composer_ends_with_what_the_owner_published() -> None:
    owner, other = composer_of(owned=[0, 1]), composer_of(owned=[2, 3])
    for _ in range(3):
        train(owner, 2)
        for slot, deltas in owner.publish().items():
            for standin, delta in zip(other.standins(slot), deltas, strict=True):
                standin.apply(delta)
            assert [s.digest() for s in owner.standins(slot)] == [s.digest() for s in other.standins(slot)]


DAMAGES: dict[str, Callable[[SlotTensors], object]] = {
    "missing weights": lambda t: t.pop("1.down"),
    "misshapen weights": lambda t: t.update({"0.gate_up": torch.zeros(HIDDEN, 2 * WIDTH)}),
    "weights of another type": lambda t: t.update({"0.gate_up": t["0.gate_up"].double()}),
    "NaN in the last layer": lambda t: t["1.down"].view(-1)[-1].fill_(math.nan),
    "weights too large to publish": lambda t: t["1.down"].view(-1)[0].fill_(1e30),
    "misshapen moment": lambda t: t.update({"1.down.exp_avg": torch.zeros(3)}),
    "missing moment": lambda t: t.pop("1.down.exp_avg_sq"),
    "negative second moment": lambda t: t["1.down.exp_avg_sq"].view(-1)[0].fill_(-1.0),
    "infinite moment": lambda t: t["1.gate_up.exp_avg"].view(-1)[0].fill_(math.inf),
    "step zero": lambda t: t["1.down.step"].fill_(0),
    "unknown moment": lambda t: t.update({"0.gate_up.max_exp_avg_sq": torch.zeros(1)}),
    "missing publisher": lambda t: [t.pop(name) for name in list(t) if name.startswith("1.publisher.")],
    "foreign publisher": lambda t: t.update({"1.publisher.published.size": torch.tensor([8, 8])}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_snapshot_changes_nothing(name: str) -> None:
    source, target = composer_of(), composer_of(owned=[0])
    train(source, 2)
    train(target, 1)
    tensors = source.snapshot(3)
    DAMAGES[name](tensors)
    refuses(target, tensors)
    target.adopt(3, source.snapshot(3))
    train(target, 1)


def refuses(target: Composer, tensors: SlotTensors, published: list | None = None) -> None:
    before = backbone_bits(target), [s.to_bytes() for s in target.standins(3)], list(target.model.state_dict())
    parameters = sum(len(group["params"]) for group in target.optimizer.param_groups)
    with pytest.raises(ValueError, match=r"."):
        target.adopt(3, tensors, published)
    assert target.owned == {0}
    assert before == (
        backbone_bits(target),
        [s.to_bytes() for s in target.standins(3)],
        list(target.model.state_dict()),
    )
    assert sum(len(group["params"]) for group in target.optimizer.param_groups) == parameters
    train(target, 1)


def test_bad_published_standins_change_nothing() -> None:
    source, target = composer_of(), composer_of(owned=[0])
    train(source, 1)
    other = initial_standin("lowbit", torch.randn(2 * WIDTH, 2 * HIDDEN), torch.randn(2 * HIDDEN, WIDTH), WIDTH)
    narrow = initial_standin("narrow", torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH), WIDTH // 2)
    for published in ([], source.standins(3)[:1], [source.standins(3)[0], other], [narrow] * LAYERS):
        refuses(target, source.snapshot(3), published)


def test_an_owned_slot_cannot_be_adopted_again() -> None:
    composer = composer_of()
    train(composer, 1)
    with pytest.raises(ValueError, match="owned already"):
        composer.adopt(0, composer.snapshot(0))
    assert composer.next_batch().shape[1] == CONTEXT
