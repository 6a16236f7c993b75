"""How many slots a peer takes: no more than its memory holds, measured."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from shoal.kernels.standin import initial_standin, make_publisher
from shoal.node import capacity
from shoal.node.capacity import (
    capacity_of,
    composer_bytes,
    device_of,
    free_bytes,
    slot_bytes,
    slots_that_fit,
    usable_bytes,
    working_bytes,
)
from shoal.node.config import PeerConfig
from shoal.node.errors import ConfigError
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.model.init import backbone_shapes, expert_shape
from shoal.node.model.presets import preset
from shoal.node.run.manifest import ExpertShape, Manifest, StandInSpec, TrainSpec
from shoal.protocol.directory.records import MAX_EPOCH, Lease, LeaseRecord, seal_record
from shoal.protocol.identity import Identity

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LARGE = ExpertShape(num_layers=48, num_experts=128, hidden=2048, width=768, act="silu", std=0.02)
GIB = 1 << 30


def fit(gib: float | None, shape: ExpertShape = LARGE, device: torch.device = CPU) -> int:
    return slots_that_fit(shape, StandInSpec(), device, usable_bytes(device, gib))


def test_slots_follow_memory_and_the_number_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    each = slot_bytes(LARGE, StandInSpec(), CPU) / GIB
    assert 5.0 < each < 9.0  # 48 experts of 4.7M weights
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 1000 * GIB)
    assert [fit(gib * each) for gib in (0.99, 1.01, 2.5)] == [0, 1, 2]
    assert fit(1e6) == fit(None) == int(800 / each)
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 10_000 * GIB)
    assert fit(None) == 128
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 0)
    assert fit(None) == fit(100.0) == 0


def test_nobody_owns_more_than_its_records_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_bytes", lambda _: 1000 * GIB)
    owner = Identity.generate()
    many = ExpertShape(num_layers=1, num_experts=6000, hidden=64, width=64, act="silu", std=0.02)
    slots = range(fit(None, many))
    assert len(slots) > 4000
    leases = [Lease(slot, MAX_EPOCH, 1 << 53) for slot in slots]
    seal_record(owner, "run", LeaseRecord(owner=owner.peer_id, leases=leases, issued_at=1.0, expires_at=2.0))


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_a_composer_claims_what_fits_beside_backbone_and_standins(kind: str, tmp_path: Path) -> None:
    chosen = preset("small")
    manifest = Manifest(
        name="large", founder="none", created_at=0, model=chosen.model, data=chosen.data, train=chosen.train,
        outer=chosen.outer, standin=msgspec.structs.replace(chosen.standin, kind=kind),
    )  # fmt: skip
    shape = expert_shape(manifest.model)
    base, each = composer_bytes(manifest) / GIB, slot_bytes(shape, manifest.standin, CPU) / GIB
    weights = sum(math.prod(size) for size in backbone_shapes(manifest.model).values())
    assert base > 6 * 4 * weights / GIB

    def fits(gib: float, **settings: Any) -> int:
        config = PeerConfig(data_dir=tmp_path, device="cpu", max_memory=gib, **settings)
        slots, capacity = capacity_of(config, manifest)
        assert slots == shape.num_experts
        return capacity

    assert [fits(base + share * each, role="composer") for share in (-0.5, 0.9, 2.5)] == [0, 0, 2]
    assert fits(base + 2.5 * each, role="composer", max_slots=1) == 1
    assert fits(base + 2.5 * each, role="composer", own="none") == 0
    assert fits(2.5 * each, role="worker") == 2
    with pytest.raises(ConfigError, match="not one slot"):
        fits(0.5 * each, role="worker")


def test_of_a_copys_rows_those_count_that_its_publisher_keeps() -> None:
    standin = initial_standin("lowbit", torch.randn(8, 6), torch.randn(6, 4), 0)
    kept = make_publisher(standin, replay_rows=2048, generator=torch.Generator()).replay.capacity
    fewer, just, more = (slot_bytes(LARGE, StandInSpec(replay_rows=rows), GPU) for rows in (kept // 2, kept, 2048))
    assert fewer < just == more


def test_on_a_gpu_no_checkpoint_takes_room_and_narrow_standins_cost_more() -> None:
    copies, narrow = StandInSpec(), StandInSpec(kind="narrow", width_fraction=0.5)
    assert slot_bytes(LARGE, copies, GPU) < 0.7 * slot_bytes(LARGE, copies, CPU)
    assert slot_bytes(LARGE, narrow, CPU) > 1.4 * slot_bytes(LARGE, copies, CPU)


def test_a_container_has_what_it_is_allowed(tmp_path: Path) -> None:
    machine = free_bytes(CPU, tmp_path)
    assert machine > 0
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU, tmp_path) > 3000
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU, tmp_path) == 2000
    # Of the cache of files, what nobody has read again goes before anybody goes without memory.
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 2000\ninactive_anon 1000\ninactive_file 1200\n")
    assert free_bytes(CPU, tmp_path) == 3200
    (tmp_path / "memory.max").write_text("2000\n")
    assert free_bytes(CPU, tmp_path) == 200
    (tmp_path / "memory.stat").unlink()
    assert free_bytes(CPU, tmp_path) == 0


def test_a_container_of_an_older_kernel_has_what_it_is_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.usage_in_bytes").write_text("3000\n")
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    assert free_bytes(CPU, tmp_path) > 3000
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    assert free_bytes(CPU, tmp_path) == 2000
    # With what is of containers within, as usage is.
    (folder / "memory.stat").write_text("inactive_file 100\ntotal_inactive_anon 50\ntotal_inactive_file 1200\n")
    assert free_bytes(CPU, tmp_path) == 3200


def test_devices() -> None:
    assert device_of("cpu") == CPU
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    missing = f"cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}"
    with pytest.raises(ConfigError, match="GPUs that torch can use"):
        device_of(missing)
    for other in ("tpu", "meta", "cuda:x", ""):
        with pytest.raises(ConfigError, match="give cpu, cuda or auto"):
            device_of(other)


MEASURE = """
import sys, threading
from pathlib import Path
from typing import Any
sys.path.insert(0, sys.argv[1])
import msgspec, torch
import tiny
tiny.HIDDEN, tiny.WIDTH = 256, 1024
tiny.CONFIG |= {"hidden_size": tiny.HIDDEN, "moe_intermediate_size": tiny.WIDTH}
from sketches import OTHER, rows, sketch_of
from shoal.node.storage.checkpoint import CheckpointStore

def anonymous() -> int:
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])

from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.learning.worker import Worker

manifest = tiny.manifest_of(standin={"kind": sys.argv[3]}, train={"optimizer": sys.argv[5]})
worker = Worker(manifest, composers=lambda: {OTHER: 0}, mode=ExpertMode(manifest.train, sys.argv[4]))
for slots in (1, 4):
    highest, done = [0], threading.Event()
    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], anonymous())
    watching = threading.Thread(target=watch)
    if slots == 4:
        before = anonymous()
    watching.start()
    from sketches import state_of
    for slot in set(range(slots)) - worker.owned:
        worker.adopt(slot, *state_of(manifest))
    for step in range(2):
        for slot in range(slots):
            worker.hear(OTHER, slot, {p: sketch_of(*rows(32)) for p in range(tiny.LAYERS)}, tokens=64, step=step)
        worker.train_step()
        worker.publish()
    tensors = {f"{s}.{n}": v for s in range(slots) for n, v in worker.saved(s).items()}
    CheckpointStore(Path(sys.argv[2])).save(slots, tensors, {})
    if slots == 1:
        del tensors
    done.set()
    watching.join()
print(highest[0] - before)
"""


@pytest.mark.parametrize(
    ("kind", "mode", "optimizer"),
    [
        ("lowbit", "full", "muon"),
        ("narrow", "full", "adamw"),
        ("ternary", "full", "adamw"),
        ("lowbit", "lora", "adamw"),
        ("lowbit", "frozen", "adamw"),
    ],
)
def test_a_worker_takes_no_more_memory_than_is_said(kind: str, mode: Any, optimizer: Any, tmp_path: Path) -> None:
    """Measured from one slot to four, each stepped, published and written down: what is there once is not counted."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(tmp_path), kind, mode, optimizer],
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    shape = ExpertShape(num_layers=2, num_experts=4, hidden=256, width=1024, act="silu", std=0.02)
    how = ExpertMode(TrainSpec(optimizer=optimizer), mode)
    said, once = slot_bytes(shape, StandInSpec(kind=kind), CPU, how), working_bytes(shape, how)  # type: ignore[arg-type]
    measured = int(ran.stdout)
    print(f"{kind}, {mode}: {measured / 3:.3g} bytes a slot, {said:.3g} are said")
    assert measured <= 4 * said + once  # the checkpoint has a copy of the first slot, too
    moments = 1 if optimizer == "muon" else 2
    least = {"full": 4 + 4 * moments, "lora": 0.5, "frozen": 4}[mode]  # a weight: masters, moments, or what is kept
    assert measured > 3 * least * 3 * 256 * 1024 * 2
