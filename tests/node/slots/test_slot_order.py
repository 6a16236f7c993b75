"""Experts of a slot that wander between composers and workers always arrive at their own layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.node.slots.slot_order import HandleOrder, LayerOrder, inverse, moved, renamed
from shoal.protocol.errors import Refused
from shoal.protocol.experts.handles import Handles, new_key
from shoal.protocol.messages import HandleTable

layers = st.integers(1, 12)
epochs = st.lists(st.integers(0, 1 << 40), min_size=2, max_size=6, unique=True).map(sorted)


def tensors_by_layer(num_layers: int) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{rest}": torch.tensor([layer, i])
        for layer in range(num_layers)
        for i, rest in enumerate(("gate_up", "down", "down.exp_avg"))
    }


@settings(max_examples=60)
@given(layers, st.integers(0, 1000), epochs)
def test_places_and_positions_are_permutations(num_layers: int, slot: int, epochs: list[int]) -> None:
    handles = Handles(new_key())
    composer, worker = LayerOrder(handles, num_layers), HandleOrder(num_layers)
    for former, epoch in itertools.pairwise(epochs):
        worker.learn(slot, former, epoch, handles.table(slot, former, epoch, num_layers))
        for order in (composer, worker):
            for places in (order.positions(slot, former, epoch), order.outward(slot, epoch)):
                assert sorted(places) == list(range(num_layers))
            assert sorted(order.by_handle(slot, epoch).values()) == list(range(num_layers))
        assert composer.by_handle(slot, epoch).keys() == worker.by_handle(slot, epoch).keys()
        # What a handle names has the same place on the wire for both.
        for handle, layer in composer.by_handle(slot, epoch).items():
            place = composer.outward(slot, epoch).index(layer)
            assert worker.outward(slot, epoch).index(worker.by_handle(slot, epoch)[handle]) == place


@settings(max_examples=60)
@given(layers, st.integers(0, 1000), epochs, st.lists(st.booleans(), min_size=6, max_size=6))
def test_every_tensor_ends_at_its_own_layer(
    num_layers: int, slot: int, epochs: list[int], are_workers: list[bool]
) -> None:
    """Composer to worker to worker to composer, in any order, the epoch rising with every change of owner."""
    handles = Handles(new_key())
    home = LayerOrder(handles, num_layers)
    first = epochs[0]
    wire = renamed(tensors_by_layer(num_layers), inverse(home.outward(slot, first)))
    from_epoch = first
    for epoch, is_worker in zip(epochs[1:], are_workers, strict=False):
        order: HandleOrder | LayerOrder = home
        if is_worker:
            order = HandleOrder(num_layers)  # each has its own, and sees no more than its own tables
            order.learn(slot, from_epoch, epoch, handles.table(slot, from_epoch, epoch, num_layers))
        held = renamed(wire, order.positions(slot, from_epoch, epoch))
        for handle, position in order.by_handle(slot, epoch).items():
            layer = home.by_handle(slot, epoch)[handle]
            assert held[f"{position}.down"].tolist() == [layer, 1]
        wire = renamed(held, inverse(order.outward(slot, epoch)))
        from_epoch = epoch
    back = renamed(wire, home.positions(slot, from_epoch, from_epoch + 1))
    assert {name: t.tolist() for name, t in back.items()} == {
        name: t.tolist() for name, t in tensors_by_layer(num_layers).items()
    }


@given(st.permutations(range(7)))
def test_moved_and_inverse_undo_each_other(positions: list[int]) -> None:
    values = list("abcdefg")
    assert moved(moved(values, positions), inverse(positions)) == values
    assert [moved(values, positions)[position] for position in positions] == values


@given(st.permutations(range(4)), st.integers(0, 8).filter(lambda number: number != 4))
def test_what_has_too_few_or_too_many_layers_is_refused(positions: list[int], number: int) -> None:
    """A peer's, in whichever order its places are."""
    with pytest.raises(ValueError, match="values for 4 positions"):
        moved(range(number), positions)


@pytest.mark.parametrize("name", ["down", "0", "0.", "x.down", "-1.down", "3.down", "²" + ".down", "00000000009.down"])
def test_names_that_no_slot_has_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a slot has no tensor"):
        renamed({"1.down": torch.zeros(1), name: torch.zeros(1)}, (2, 0, 1))


def test_tables_that_are_not_those_are_refused_and_leave_nothing() -> None:
    handles, order = Handles(new_key()), HandleOrder(4)
    good = handles.table(3, 1, 2, 4)
    for bad in (handles.table(2, 1, 2, 4), handles.table(3, 1, 3, 4), handles.table(3, 1, 2, 5)):
        with pytest.raises(Refused, match="not a table"):
            order.learn(3, 1, 2, bad)
    with pytest.raises(Refused, match="no table"):
        order.positions(3, 1, 2)
    assert order.by_handle(3, 2) == {}
    order.learn(3, 1, 2, good)
    with pytest.raises(Refused, match="no table"):
        order.positions(3, 0, 2)


def test_a_new_lease_makes_a_workers_old_names_void() -> None:
    handles, order = Handles(new_key()), HandleOrder(4)
    for from_epoch in (0, 1):
        order.learn(3, from_epoch, 2, handles.table(3, from_epoch, 2, 4))
    order.learn(5, 0, 1, handles.table(5, 0, 1, 4))
    before = order._tables
    order.learn(3, 2, 4, handles.table(3, 2, 4, 4))
    assert order.by_handle(3, 2) == {}
    assert len(order.by_handle(3, 4)) == len(order.by_handle(5, 1)) == 4
    # The training thread may be going through them at that moment: what it has must not change.
    assert order._tables is not before
    assert len(before) == 3


def test_a_table_is_one_permutation() -> None:
    entries = tuple((bytes([i]) * 8, 0) for i in range(2))
    with pytest.raises(ValueError, match="not a permutation"):
        HandleTable(0, 1, entries)
