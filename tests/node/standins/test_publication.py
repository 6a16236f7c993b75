"""Publications made of copies: what they come to, and what they leave alone while they are made."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from shoal.node.learning.composer import Composer
from shoal.node.learning.owning import ExpertOwner
from shoal.node.slots.slot_state import SlotTensors
from shoal.node.standins.publication import Publication, Stopped
from tiny import LAYERS, SLOTS, composer_of, manifest_of, train

NARROW = {"kind": "narrow", "refit_steps": 2, "replay_rows": 64, "rank": 2}
CHOSEN = NARROW | {
    "kind": "chosen", "choose_every": 2, "trial_steps": 3, "bytes_per_weight": 0.7, "flops_fraction": 0.4,
}  # fmt: skip


def composer(standin: dict[str, Any] = NARROW, seed: int = 3) -> Composer:
    return composer_of(manifest_of(standin=standin, train={"learning_rate": 1e-2}), seed=seed)


def digests(owner: ExpertOwner) -> list[list[bytes]]:
    return [[standin.digest() for standin in owner.standins(slot)] for slot in sorted(owner.owned)]


def state(owner: ExpertOwner) -> SlotTensors:
    """All that others may be given of the owner's slots, and what sketches are corrected against."""
    tensors = {f"{slot}.{name}": value for slot in owner.owned for name, value in owner.snapshot(slot).items()}
    for slot in owner.owned:
        for position in range(LAYERS):
            for age in range(4):
                past = owner.past.at(slot, position, age).tensors
                tensors |= {f"{slot}.{position}.past {age}.{name}": value for name, value in past.items()}
    return {name: value.clone() for name, value in tensors.items()}


def same(a: SlotTensors, b: SlotTensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make(publication: Publication) -> None:
    """As the node does: on another thread."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            publication.make()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("standin", [NARROW, CHOSEN], ids=["narrow", "chosen"])
def test_what_is_made_beside_training_is_what_would_have_been_made_at_once(standin: dict[str, Any]) -> None:
    """The same deltas and states to the bit, whatever was learned meanwhile."""
    at_once, beside = composer(standin), composer(standin)
    changed_form = False
    for _ in range(6):
        train(at_once, 3)
        wanted = at_once.publish()
        train(beside, 3)
        publication = beside.begin_publication()
        later = composer(standin, seed=9)  # trains on other text, while the job is there, in the owner's place
        train(later, 1)
        weights = {slot: [t.clone() for e in beside.experts_of(slot) for t in e.trained] for slot in beside.owned}
        rows = [p.replay.state_dict() for slot in sorted(beside.owned) for p in beside.publishers[slot]]
        with torch.no_grad():
            for slot in beside.owned:
                for position, expert in enumerate(beside.experts_of(slot)):
                    expert.gate_up.add_(torch.randn_like(expert.gate_up))  # type: ignore[attr-defined]
                    beside.observe(position, slot, torch.randn(5, beside.shape.hidden), torch.ones(5))
        make(publication)
        with torch.no_grad():  # what was learned meanwhile is undone, so that the two can be compared
            for slot, kept in weights.items():
                for tensor, value in zip((t for e in beside.experts_of(slot) for t in e.trained), kept, strict=True):
                    tensor.copy_(value)
        found = {slot: made.deltas for slot, made in beside.finish_publication(publication).items()}
        publishers = [p for slot in sorted(beside.owned) for p in beside.publishers[slot]]
        for publisher, kept_rows in zip(publishers, rows, strict=True):
            publisher.replay.load_state_dict(kept_rows)
            publisher.replay.offered = 0
        assert found == wanted
        assert digests(beside) == digests(at_once)
        assert beside.fidelity() == at_once.fidelity()
        changed_form = changed_form or any(not deltas for deltas in wanted.values())
    assert changed_form == (standin is CHOSEN)


@pytest.mark.parametrize("standin", [NARROW, CHOSEN], ids=["narrow", "chosen"])
def test_nothing_of_what_is_being_made_shows(standin: dict[str, Any]) -> None:
    owner = composer(standin)
    train(owner, 2)
    owner.publish()
    train(owner, 2)
    publication = owner.begin_publication()
    before, published = state(owner), digests(owner)
    make(publication)
    assert same(state(owner), before)
    assert digests(owner) == published
    owner.finish_publication(publication)
    assert all(now != was for now, was in zip(digests(owner), published, strict=True))
    at = [owner.past.at(slot, 0, 1).digest() for slot in sorted(owner.owned)]
    assert at == [of_slot[0] for of_slot in published]  # one version ago


def test_rows_that_come_while_it_is_made_are_kept() -> None:
    owner = composer()
    train(owner, 2)
    publication = owner.begin_publication([0])
    make(publication)
    owner.observe(0, 0, torch.randn(7, owner.shape.hidden), torch.ones(7))
    seen = owner.publishers[0][0].replay.state_dict()
    owner.finish_publication(publication)
    now = owner.publishers[0][0].replay.state_dict()
    assert same(now, seen)
    assert int(now["seen"]) >= 7


def test_slots_that_come_and_go_meanwhile_are_left_out() -> None:
    owner = composer()
    train(owner, 3)
    owner.publish()
    train(owner, 1)
    publication = owner.begin_publication()
    make(publication)
    owner.release(0)
    kept, published = owner.snapshot(1), owner.standins(1)
    owner.release(1)
    owner.adopt(1, kept, published)  # as under another lease
    owner.freeze(2)
    before, was = state(owner), digests(owner)
    assert set(owner.finish_publication(publication)) == {3}
    assert 0 not in owner.publishers
    assert [now == old for now, old in zip(digests(owner), was, strict=True)] == [True, True, False]  # 1, 2, 3
    after = state(owner)
    assert all(torch.equal(after[name], before[name]) for name in before if name[0] in "12")
    owner.thaw(2)
    assert set(owner.publish()) == {1, 2, 3}


def test_a_later_publication_of_a_slot_wins() -> None:
    """One that was made here and now, because the slot is to be handed over."""
    owner = composer()
    train(owner, 2)
    publication = owner.begin_publication()
    owner.publish([1])
    now = [standin.digest() for standin in owner.standins(1)]
    make(publication)
    assert set(owner.finish_publication(publication)) == {0, 2, 3}
    assert [standin.digest() for standin in owner.standins(1)] == now


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_expert_that_diverged_is_an_error_that_changes_nothing(value: float) -> None:
    owner = composer(NARROW | {"kind": "chosen", "choose_every": 1, "trial_steps": 1})
    train(owner, 1)
    with torch.no_grad():
        owner.experts_of(SLOTS - 1)[-1].trained[0][0, 0] = value
    before, published = digests(owner), owner.publishers.copy()
    with pytest.raises(ValueError, match="not finite"):
        make(owner.begin_publication())
    assert digests(owner) == before
    assert owner.publishers == published


def test_it_stops_between_two_experts() -> None:
    owner = composer()
    train(owner, 2)
    publication = owner.begin_publication()
    asked: list[int] = []

    def after_three() -> bool:
        asked.append(1)
        return len(asked) > 3

    before = digests(owner)
    with pytest.raises(Stopped):
        publication.make(after_three)
    assert digests(owner) == before
    assert owner.finish_publication(publication) == {}
