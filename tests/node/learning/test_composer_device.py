"""A composer on a GPU does what it does on the CPU, and what travels stays on the CPU."""

from __future__ import annotations

import secrets

import pytest
import torch
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, restore_backbone
from shoal.node.sketches.sketching import SketchCollector
from tiny import SLOTS, composer_of, manifest_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

OWNED = range(0, SLOTS, 2)


@pytest.fixture(params=["lowbit", "narrow", "ternary"])
def pair(request: pytest.FixtureRequest) -> tuple[Composer, Composer]:
    """The same composer on the CPU and on the GPU, with the same batches."""
    seed = secrets.randbits(31)
    manifest = manifest_of(standin={"kind": request.param}, outer={"every_steps": 4, "fragments": 2})
    cpu, gpu = (composer_of(manifest, owned=OWNED, seed=seed, device=device) for device in ("cpu", "cuda"))
    for composer in (cpu, gpu):
        composer.collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
    return cpu, gpu


def test_both_learn_the_same(pair: tuple[Composer, Composer]) -> None:
    cpu, gpu = pair
    for _ in range(3):
        ours, theirs = cpu.train_step(), gpu.train_step()
        assert theirs.loss == pytest.approx(ours.loss, rel=2e-3)
        assert not theirs.skipped
        assert gpu.last_counts is not None
        assert gpu.last_counts.device.type == "cpu"
    for index in range(len(cpu.fragments)):
        ours, theirs = cpu.begin_round(index), gpu.begin_round(index)
        assert theirs.vector.device.type == "cpu"
        assert theirs.vector.norm() == pytest.approx(ours.vector.norm(), rel=0.05)
        assert torch.cosine_similarity(ours.vector, theirs.vector, dim=0) > 0.98
        gpu.commit_round(index, *gpu.propose(index, theirs.vector))
    for name, parameter in gpu.backbone.items():
        assert parameter.device.type == "cuda", name


def test_what_it_publishes_all_can_follow(pair: tuple[Composer, Composer]) -> None:
    cpu, gpu = pair
    first = {slot: [standin.to_bytes() for standin in cpu.standins(slot)] for slot in range(SLOTS)}
    for slot in range(SLOTS):
        assert [standin.to_bytes() for standin in gpu.standins(slot)] == first[slot], "the first stand-ins are equal"
        assert {t.device.type for standin in gpu.standins(slot) for t in standin.tensors.values()} == {"cpu"}
    follower = composer_of(gpu.manifest, owned=())
    for _ in range(2):
        gpu.train_step()
        for slot, layers in gpu.publish().items():
            for standin, delta in zip(follower.standins(slot), layers, strict=True):
                standin.apply(delta)
    for slot in OWNED:
        assert [s.digest() for s in follower.standins(slot)] == [s.digest() for s in gpu.standins(slot)]


def test_slots_come_and_go(pair: tuple[Composer, Composer]) -> None:
    cpu, gpu = pair
    gpu.train_step()
    tensors = gpu.snapshot(0)
    assert {value.device.type for value in tensors.values()} == {"cpu"}
    published = gpu.standins(0)
    gpu.release(0)
    cpu.release(0)
    cpu.adopt(0, tensors, published)
    gpu.train_step()
    gpu.adopt(0, cpu.snapshot(0), cpu.standins(0))
    assert {e.gate_up.device.type for e in gpu.experts_of(0)} == {"cuda"}
    gpu.train_step()
    assert gpu.fidelity()[0] > 0


def test_what_its_rows_teach_is_collected_on_the_cpu(pair: tuple[Composer, Composer]) -> None:
    cpu, gpu = pair
    cpu.train_step()
    gpu.train_step()
    others = dict.fromkeys(range(1, SLOTS, 2), 1.0)
    ours, theirs = (composer.collector.take(others) for composer in (cpu, gpu))  # type: ignore[union-attr]
    for slot in others:
        rows = [sum(sketch.num_rows for sketch in taken[slot].layers) for taken in (ours, theirs)]
        assert abs(rows[0] - rows[1]) <= 0.1 * max(rows) + 2, "routing may flip where two experts are nearly equal"


def test_a_checkpoint_goes_from_one_device_to_the_other(pair: tuple[Composer, Composer]) -> None:
    cpu, gpu = pair
    gpu.train_step()
    tensors = composer_tensors(gpu)
    assert {value.device.type for value in tensors.values()} == {"cpu"}, "it is held until it has been written"
    again = composer_of(cpu.manifest, owned=(), device="cuda")
    restore_backbone(again, tensors, {"step": gpu.step, "tokens": gpu.tokens})
    for name, parameter in again.backbone.items():
        assert torch.equal(parameter, gpu.backbone[name]), name
    again.train_step()
