"""Handles: the same for everybody with the key, telling nothing about layers to those without."""

from __future__ import annotations

import secrets
from collections import Counter
from math import factorial

import pytest
from shoal.protocol.experts.handles import KEY_BYTES, Handles, key_digest, new_key
from shoal.protocol.messages import HandleTable, decode, encode

LAYERS = 12
CHI2_23 = 70.55  # chi-squared with 23 degrees of freedom exceeds it with probability 1e-6


@pytest.fixture
def handles() -> Handles:
    key = new_key()
    print(f"key={key.hex()}")
    return Handles(key)


def test_golden_handles() -> None:
    """All composers of a run must name experts alike, whatever their version."""
    handles = Handles(bytes(range(KEY_BYTES)))
    assert handles.of(3, 7, 2).hex() == "7bb25bbe8d8639ea"
    assert handles.order(3, 2, 6) == (4, 1, 3, 2, 5, 0)
    digest = key_digest(bytes(range(KEY_BYTES))).hex()
    assert digest == "9eef2edd029a0c2051a7869f0f7878a21831435158cf8758d5a3132c47bd5e04"


def test_handles_depend_on_key_slot_layer_and_epoch(handles: Handles) -> None:
    base = handles.of(3, 7, 2)
    assert len(base) == 8
    assert base == handles.of(3, 7, 2)
    others = [handles.of(4, 7, 2), handles.of(3, 8, 2), handles.of(3, 7, 3), Handles(new_key()).of(3, 7, 2)]
    assert len({base, *others}) == 5


def test_order_and_handles_agree(handles: Handles) -> None:
    slot, epoch = secrets.randbelow(1 << 16), secrets.randbelow(1 << 48)
    order = handles.order(slot, epoch, LAYERS)
    assert sorted(order) == list(range(LAYERS))
    assert tuple(handles.of(slot, layer, epoch) for layer in order) == handles.sorted_handles(slot, epoch, LAYERS)


def test_order_tells_nothing_about_layers(handles: Handles) -> None:
    """Over slots and epochs every order of four layers is equally frequent. Fails by chance once in 10^6 runs."""
    draws = 4800
    seen = Counter(handles.order(n % 64, n // 64, 4) for n in range(draws))
    expected = draws / factorial(4)
    assert len(seen) == factorial(4)
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < CHI2_23


def test_table_leads_from_one_epoch_to_the_next(handles: Handles) -> None:
    slot, before, after = 5, 3, 9
    experts = [f"expert of layer {layer}" for layer in handles.order(slot, before, LAYERS)]  # a copy, in former order
    table = decode(encode(handles.table(slot, before, after, LAYERS)), HandleTable)
    assert (table.slot, table.epoch) == (slot, after)
    assert tuple(handle for handle, _ in table.entries) == handles.sorted_handles(slot, after, LAYERS)
    renamed = {handle: experts[position] for handle, position in table.entries}
    assert renamed == {handles.of(slot, layer, after): f"expert of layer {layer}" for layer in range(LAYERS)}
    same = handles.table(slot, after, after, LAYERS)
    assert [position for _, position in same.entries] == list(range(LAYERS))


@pytest.mark.parametrize("key", [b"", bytes(KEY_BYTES - 1), bytes(KEY_BYTES + 1)])
def test_keys_of_another_length_are_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Handles(key)


@pytest.mark.parametrize("place", [(-1, 0, 0), (1 << 16, 0, 0), (0, -1, 0), (0, 512, 0), (0, 0, -1), (0, 0, 1 << 48)])
def test_places_that_no_message_can_carry_are_refused(handles: Handles, place: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no expert"):
        handles.of(*place)


def test_keys_are_random_and_stay_secret() -> None:
    key, other = new_key(), new_key()
    assert len(key) == KEY_BYTES
    assert key != other
    assert key_digest(key) != key_digest(other)
    assert len(key_digest(key)) == 32
    assert key.hex() not in repr(Handles(key))
    assert repr(key) not in repr(vars(Handles)) + repr(Handles(key))
