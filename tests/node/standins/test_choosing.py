"""Owners choose the forms of their stand-ins, and hand them on, with what they measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shoal.kernels.bases import Bases
from shoal.kernels.standin import Form, Menu, StandIn
from shoal.node.learning.composer import Composer
from shoal.node.run.manifest import StandInSpec, canonical_bytes
from shoal.node.run.manifest_errors import ManifestError
from shoal.node.standins.standin_menu import menu_of
from tiny import HIDDEN, LAYERS, SLOTS, WIDTH, composer_of, manifest_of, train

FAST = {"kind": "chosen", "choose_every": 2, "trial_steps": 4, "refit_steps": 2, "replay_rows": 128}


def forms(standins: list[StandIn]) -> list[Form]:
    return [Form.of(standin) for standin in standins]


def chosen(**more: Any) -> Composer:
    return composer_of(manifest_of(standin=FAST | more), seed=3)


def publish(composer: Composer, times: int) -> set[int]:
    """Slots that changed their form in one of so many publications."""
    changed = set()
    for _ in range(times):
        train(composer, 2)
        changed |= {slot for slot, deltas in composer.publish().items() if not deltas}
    return changed


def test_what_is_published_stays_within_the_budgets() -> None:
    composer = chosen(bytes_per_weight=0.7, flops_fraction=0.4)
    first = composer.menu.forms[0]
    assert all(form == first for slot in range(SLOTS) for form in forms(composer.standins(slot)))
    assert publish(composer, 6), "uniform is not the best choice of a trained model"
    all_forms = [form for slot in range(SLOTS) for form in forms(composer.standins(slot))]
    assert len(set(all_forms)) > 1
    total = sum(form.nbytes(HIDDEN, WIDTH) for form in all_forms)
    assert total <= 0.7 * 3 * HIDDEN * WIDTH * SLOTS * LAYERS
    assert all(form in composer.menu.forms for form in all_forms)


def test_a_slot_whose_form_changes_is_told_as_a_whole_and_followers_go_on_from_there() -> None:
    owner = chosen(bytes_per_weight=0.7, flops_fraction=0.4)
    follower = composer_of(owner.manifest, owned=(), seed=4)
    seen = set()
    for _ in range(8):
        train(owner, 2)
        for slot, deltas in owner.publish().items():
            if deltas:
                for standin, delta in zip(follower.standins(slot), deltas, strict=True):
                    standin.apply(delta)
            else:
                seen.add(slot)
                whole = [follower.menu.load(standin.to_bytes()) for standin in owner.standins(slot)]
                follower.set_standins(slot, whole)
        for slot in range(SLOTS):
            pairs = zip(owner.standins(slot), follower.standins(slot), strict=True)
            assert all(mine.digest() == theirs.digest() for mine, theirs in pairs)
        train(follower, 1)
    assert seen


def test_only_slots_that_are_published_change() -> None:
    composer = chosen(bytes_per_weight=0.7, flops_fraction=0.4)
    for _ in range(12):
        train(composer, 1)
        due = random.sample(range(SLOTS), 3)
        before = {slot: forms(composer.standins(slot)) for slot in range(SLOTS)}
        deltas = composer.publish(due)
        assert set(deltas) == set(due)
        for slot in range(SLOTS):
            now = forms(composer.standins(slot))
            assert (now != before[slot]) == (deltas.get(slot) == [])


def test_a_choice_that_saves_little_is_not_made() -> None:
    composer = chosen(bytes_per_weight=100.0, flops_fraction=1.0)
    assert composer.menu.forms[0] == Form("lowbit")
    changed = publish(composer, 4)
    again = publish(composer, 6)
    assert len(again) <= len(changed) or not changed


@pytest.mark.parametrize("late", [False, True])
def test_a_slot_moves_with_the_form_that_is_published(late: bool) -> None:
    """Also if a copy of it was made before its form changed."""
    owner = chosen(bytes_per_weight=0.7, flops_fraction=0.4)
    train(owner, 2)
    early = {slot: owner.snapshot(slot) for slot in range(SLOTS)}
    changed = publish(owner, 6)
    heir = composer_of(owner.manifest, owned=(), seed=5)
    for slot in changed:
        published = [heir.menu.load(standin.to_bytes()) for standin in owner.standins(slot)]
        heir.adopt(slot, early[slot] if late else owner.snapshot(slot), published)
        assert forms(heir.standins(slot)) == forms(owner.standins(slot))
    publish(heir, 5)
    saved = {slot: heir.saved(slot) for slot in heir.owned}
    again = composer_of(owner.manifest, owned=(), seed=6)
    for slot, tensors in saved.items():
        again.adopt(slot, tensors, heir.standins(slot))
    publish(again, 3)


def test_a_gap_in_what_a_follower_knows_restarts_the_slot_from_its_first_weights() -> None:
    """Of a slot with a narrow stand-in in any layer the experts are not known."""
    composer = composer_of(manifest_of(standin=FAST), owned=(), seed=1)
    narrow = next(form for form in composer.menu.forms if form.kind == "narrow")
    standins = composer.standins(0)
    standins[-1] = composer.menu.make(narrow, *composer.model.initial_expert(LAYERS - 1, 0))
    composer.set_standins(0, standins)
    first = [e.masters() for e in composer.first_experts(0)]
    for mine, theirs in zip(composer.experts_from_standins(0), first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.masters(), theirs, strict=True))


# -- menus ---------------------------------------------------------------------------------------------------------


def menu(bases: Bases | None = None, **spec: Any) -> Menu:
    return menu_of(StandInSpec(**spec), 64, 32, bases or Bases())


def test_menus() -> None:
    assert menu().forms == (Form("lowbit"),)
    assert menu(kind="narrow", width_fraction=0.25).forms == (Form("narrow", 8),)
    assert menu(kind="shared").forms == (Form("shared", 32),)
    assert menu(kind="shared", base_rank=99).forms == (Form("shared", 32),), "no more than the matrices have"
    whole = menu(kind="chosen", bytes_per_weight=0.6, flops_fraction=1.0)
    assert whole.forms == (Form("lowbit"), *(Form("narrow", size) for size in (16, 8, 4, 2)))
    fast = menu(kind="chosen", bytes_per_weight=1.0, flops_fraction=0.3)
    assert fast.forms[0] == Form("narrow", 8)
    assert set(fast.forms) == set(whole.forms)
    bases = Bases([(torch.randn(64, 64), torch.randn(64, 32))])
    upcycled = menu(bases, kind="chosen", bytes_per_weight=2.0, flops_fraction=1.0)
    assert upcycled.forms[:2] == (Form("shared", 32), Form("shared", 8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda: manifest_of(standin={"kind": "shared"}), "variants"),
        (lambda: manifest_of(standin={"kind": "chosen", "bytes_per_weight": 0.1}), "bytes a weight"),
        (lambda: manifest_of(standin={"kind": "chosen", "flops_fraction": 0.01}), "FLOPs"),
        (lambda: manifest_of(standin={"kind": "chosen"}, train={"expert_weights": "ternary"}), "ternary"),
        (lambda: manifest_of(standin={"kind": "chosen"}, sketch={"kind": "gradient"}), "wide as the experts"),
    ],
)
def test_manifests_that_cannot_be(change: Callable[[], Any], match: str) -> None:
    with pytest.raises(ManifestError, match=match):
        canonical_bytes(change())
