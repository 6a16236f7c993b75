"""Slots in a run's wire format: as exact as the format says, of whatever owner, and damaged ones refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from shoal.node.run.manifest import Manifest, OwnershipSpec
from shoal.node.slots.slot_formats import packed, unpacked
from shoal.node.slots.slot_state import SlotTensors
from shoal.node.storage.blobs import from_bytes, to_bytes
from shoal.protocol.errors import Refused
from sketches import worker_of
from tiny import HIDDEN, LAYERS, WIDTH, manifest_of

WIRE = ("bfloat16", "int8", "nf4", "ternary")
ERROR = {"bfloat16": 0.004, "int8": 0.01, "nf4": 0.12}  # relative, in norm, of normal weights


def manifest(fmt: str, *, experts: str = "full", standin: str = "lowbit") -> Manifest:
    base = manifest_of(train={"expert_weights": experts}, standin={"kind": standin})
    return msgspec.structs.replace(base, ownership=OwnershipSpec(snapshot_format=fmt))  # type: ignore[arg-type]


def travelled(tensors: SlotTensors) -> SlotTensors:
    return from_bytes(to_bytes(tensors), what="slot")


def test_in_full_nothing_changes() -> None:
    worker = worker_of(manifest("full"))
    tensors = worker.snapshot(0)
    assert packed(tensors, worker.manifest) is tensors
    back = unpacked(travelled(tensors), worker, worker.standins(0))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("fmt", ["bfloat16", "int8", "nf4"])
def test_weights_come_back_as_exact_as_the_format_is(fmt: str) -> None:
    worker = worker_of(manifest(fmt))
    small = packed(worker.snapshot(0), worker.manifest)
    assert set(small) == {f"{place}.wire" for place in range(LAYERS)}
    assert packed(small, worker.manifest) is small
    back = unpacked(travelled(small), worker, worker.standins(0))
    weights = worker.weights(0)
    assert back.keys() == weights.keys()
    for name, wanted in weights.items():
        error = float((back[name] - wanted).norm() / wanted.norm())
        assert 0 < error < ERROR[fmt]
    full = sum(value.nbytes for value in weights.values())
    assert len(to_bytes(small)) < full * {"bfloat16": 0.6, "int8": 0.4, "nf4": 0.25}[fmt]


@pytest.mark.parametrize("fmt", ["ternary", "standin"])
def test_ternary_experts_compute_the_same_afterwards(fmt: str) -> None:
    """Their ternary form, taken for masters, would have a smaller one."""
    spec = manifest(fmt, experts="ternary", standin="ternary")
    worker = worker_of(spec)
    worker.publish()
    tensors = travelled(packed(worker.snapshot(0), spec))
    assert len(tensors) == (LAYERS if fmt == "ternary" else 0)
    other = worker_of(spec, slots=())
    other.adopt(0, unpacked(tensors, other, worker.standins(0)), worker.standins(0))
    mine, theirs = worker.weights(0), other.weights(0)
    assert all(torch.equal(theirs[name], value) for name, value in mine.items())


def test_what_is_published_may_be_all_that_travels() -> None:
    spec = manifest("standin")
    worker = worker_of(spec)
    assert packed(worker.snapshot(0), spec) == {}
    back = unpacked({}, worker, worker.standins(0))
    for position, standin in enumerate(worker.standins(0)):
        gate_up, down = standin.dense()
        assert torch.equal(back[f"{position}.gate_up"], gate_up)
        assert torch.equal(back[f"{position}.down"], down)
    narrow = worker_of(manifest("standin", standin="narrow"))
    with pytest.raises(ValueError, match="narrow"):
        unpacked({}, narrow, narrow.standins(0))


DAMAGE: dict[str, Callable[[torch.Tensor], Any]] = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: torch.cat((data, data[:1])),
    "empty": lambda data: data[:0],
    "of an unknown format": lambda data: torch.cat((torch.tensor([200], dtype=torch.uint8), data[1:])),
    "of another format": lambda data: torch.cat((data[:1] ^ 1, data[1:])),
    "not bytes": lambda data: data.float(),
    "a matrix": lambda data: data.view(1, -1),
}


@pytest.mark.parametrize("fmt", WIRE)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_blob_is_refused(name: str, fmt: str) -> None:
    worker = worker_of(manifest(fmt))
    tensors = packed(worker.snapshot(0), worker.manifest)
    tensors["1.wire"] = DAMAGE[name](tensors["1.wire"])
    with pytest.raises(ValueError, match=r"."):
        unpacked(tensors, worker, worker.standins(0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_blobs_with_weights_that_are_not_finite_are_refused(value: float) -> None:
    worker = worker_of(manifest("bfloat16"))
    tensors = packed(worker.snapshot(0), worker.manifest)
    tensors["0.wire"][1:3] = torch.tensor([value]).bfloat16().view(torch.uint8)
    with pytest.raises(ValueError, match="not finite"):
        unpacked(tensors, worker, worker.standins(0))
    with pytest.raises(Refused, match="NaN or infinity"):
        travelled({"0.down": torch.full((HIDDEN, WIDTH), value)})


def test_another_models_blob_is_refused() -> None:
    worker = worker_of(manifest("int8"))
    tensors = packed(worker.snapshot(0), worker.manifest)
    other = {"0.gate_up": torch.randn(2 * WIDTH, 2 * HIDDEN), "0.down": torch.randn(2 * HIDDEN, WIDTH)}
    tensors |= packed(other, worker.manifest)
    with pytest.raises(ValueError, match=r"."):
        unpacked(tensors, worker, worker.standins(0))
