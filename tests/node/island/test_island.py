"""Real processes compute one composer's steps: what comes out is what one process makes of all batches together."""

from __future__ import annotations

import copy
import os
import random
import signal
import struct
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import psutil
import pytest
import tiny
import torch
from comparing import same, same_gradient_sketches, same_rows, same_signs
from shoal.kernels.bases import Bases
from shoal.node.island import leader
from shoal.node.island.leader import Island
from shoal.node.island.merging import DataParallel
from shoal.node.island.nursery import Nursery
from shoal.node.island.orders import limit, receive
from shoal.node.learning.composer import Composer
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.model.start import Seeded
from shoal.node.run.manifest import Manifest
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector

pytestmark = pytest.mark.timeout(180)


def alone(manifest: Manifest, size: int, seed: int, **more: object) -> Composer:
    """One process that sees `size` batches a step."""
    text = tiny.batches(seed)
    return Composer(manifest, next_batch=lambda: torch.cat([text() for _ in range(size)]), **more)  # type: ignore[arg-type]


def together(manifest: Manifest, size: int, seed: int, **more: object) -> Composer:
    composer = Composer(manifest, next_batch=tiny.batches(seed), **more)  # type: ignore[arg-type]
    composer.island = DataParallel(size, ["cpu"] * size, 1)
    return composer


@pytest.mark.parametrize("size", [2, 4])
def test_an_island_learns_what_one_process_learns_from_all_its_batches(size: int, islands: list[Island]) -> None:
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    one = alone(manifest, size, seed, owned={0, 2})
    many = together(manifest, size, seed, owned={0, 2})
    assert many.island is not None
    islands.append(many.island)
    for step in range(6):
        if step == 2:  # what the network's side does between steps
            for composer in (one, many):
                deltas = composer.publish()
                composer.release(2)
                composer.adopt(1, None)
                assert deltas
        if step == 4:
            for composer in (one, many):
                snapshot = composer.snapshot(1)
                composer.release(1)
                composer.adopt(1, snapshot)  # other tensors in the same slot
                composer.reset_fragment(0, composer.common[0], composer.momentum[0])
        a, b = one.train_step(), many.train_step()
        assert many.island.together
        assert b.tokens == a.tokens
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        torch.testing.assert_close(one.last_counts, many.last_counts)
    same(one, many)


def test_low_rank_experts_and_unused_ones(islands: list[Island]) -> None:
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    mode = ExpertMode(manifest.train, "lora", rank=2)
    torch.manual_seed(seed)
    one = alone(manifest, 2, seed, owned=set(), mode=mode)
    many = together(manifest, 2, seed, owned=set(), mode=mode)
    assert many.island is not None
    islands.append(many.island)
    start = copy.deepcopy(one.standins(3))
    torch.manual_seed(seed)
    one.adopt(3, None, start)
    torch.manual_seed(seed)
    many.adopt(3, None, start)
    for _ in range(3):
        one.train_step()
        many.train_step()
    same(one, many)


class Upcycled(Seeded):
    """Weights as seeded; every expert a variant of the first one of layer 0."""

    @property
    def bases(self) -> Bases:
        return Bases([self.expert(0, 0)])


@pytest.mark.parametrize("kind", ["shared", "chosen"])
def test_members_run_whatever_forms_of_stand_ins_there_are(kind: str, islands: list[Island]) -> None:
    spec = {"kind": kind, "base_rank": 4, "bytes_per_weight": 4.0, "flops_fraction": 1.0}
    manifest, seed = tiny.manifest_of(standin=spec), random.randrange(1 << 30)
    composers = [make(manifest, 2, seed, owned={0}, start=Upcycled(manifest.model)) for make in (alone, together)]
    assert composers[1].island is not None
    islands.append(composers[1].island)
    for step in range(4):
        if step == 2:
            for composer in composers:
                forms = composer.menu.forms
                experts = [expert.masters() for expert in composer.first_experts(1)]
                composer.set_standins(1, [composer.menu.make(forms[-1], *weights) for weights in experts])
        for composer in composers:
            composer.train_step()
        assert composers[1].island.together
    same(*composers)


def test_rows_for_others_come_from_all_members(islands: list[Island]) -> None:
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    one = alone(manifest, 2, seed, owned={0})
    many = together(manifest, 2, seed, owned={0})
    assert many.island is not None
    islands.append(many.island)
    for composer in (one, many):
        composer.collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
        composer.train_step()
        composer.train_step()
    same_rows(one, many, batches=2)  # owners take no more tokens a step than a batch has


@pytest.mark.parametrize("owned", [{0}, set(range(tiny.SLOTS))])
def test_sketches_of_gradients_add_up_and_may_be_of_nothing(owned: set[int], islands: list[Island]) -> None:
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    one = alone(manifest, 2, seed, owned=owned)
    many = together(manifest, 2, seed, owned=owned)
    assert many.island is not None
    islands.append(many.island)
    for composer in (one, many):
        collector = composer.collector = GradientCollector(GradientForm(run_id="r", shape=composer.shape, rank=4))
        composer.train_step()
        assert collector.steps == 1
    assert many.island.together
    same_gradient_sketches(one, many)


def test_signs_come_from_all_members(islands: list[Island]) -> None:
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    one = alone(manifest, 2, seed, owned={0})
    many = together(manifest, 2, seed, owned={0})
    assert many.island is not None
    islands.append(many.island)
    for composer in (one, many):
        composer.collector = SignCollector(composer.shape, seed=seed)
        composer.train_step()
    assert many.island.together
    same_signs(one, many, batches=2)


def test_nobody_elsewhere_can_reach_an_island(islands: list[Island]) -> None:
    many = together(tiny.manifest_of(), 2, random.randrange(1 << 30), owned={0})
    assert many.island is not None
    islands.append(many.island)
    assert many.train_step().processes == 2
    processes = [psutil.Process(), *(member.process for member in many.island.members)]
    listening = [c for p in processes for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening, "the store at least"
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_lost_members_cost_nothing_and_are_replaced(islands: list[Island], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FIRST_PAUSE_SECONDS", 0.0)
    manifest, seed = tiny.manifest_of(), random.randrange(1 << 30)
    many = together(manifest, 2, seed, owned={0})
    island = many.island
    assert island is not None
    islands.append(island)
    island._pause = 0.0
    tokens = many.train_step().tokens
    os.kill(island.members[0].process.pid, signal.SIGKILL)
    reports = [many.train_step() for _ in range(3)]
    assert not any(report.skipped for report in reports)
    assert {report.tokens for report in reports} == {tokens // 2, tokens}, "alone for a step, then together again"
    assert island.together
    assert many.step == 4
    pids = [member.process.pid for member in island.members]
    island.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_member_that_ends_before_it_has_come_is_not_waited_for(
    islands: list[Island], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose part does not fit its GPU ends so each time: the leader, and all who ask it, wait meanwhile."""
    fork = Nursery.fork

    def doomed(nursery: Nursery) -> tuple[psutil.Process, Connection]:
        process, pipe = fork(nursery)
        process.kill()
        return process, pipe

    many = together(tiny.manifest_of(), 2, random.randrange(1 << 30), owned={0})
    island = many.island
    assert island is not None
    islands.append(island)
    island._timeout_seconds = 40.0
    fork(island.nursery())[0].kill()  # it has done its imports now
    monkeypatch.setattr(Nursery, "fork", doomed)
    began = time.monotonic()
    report = many.train_step()
    assert time.monotonic() - began < 20.0
    assert not report.skipped
    assert not island.together
    assert many.step == 1


def test_a_member_that_is_stopped_is_not_waited_for_without_end(islands: list[Island]) -> None:
    """It has not ended, and takes nothing: what does not fit the pipe would never be written."""
    many = together(tiny.manifest_of(), 2, random.randrange(1 << 30), owned={0})
    island = many.island
    assert island is not None
    islands.append(island)
    assert not many.train_step().skipped
    [member] = island.members
    limit(member.pipe, 1.5)
    os.kill(member.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="takes no message"):
        island.tell(member, bytes(8 << 20))
    assert 1.0 < time.monotonic() - began < 20.0
    island.lose(TimeoutError("as `compute` does"))
    assert not psutil.pid_exists(member.process.pid)
    assert not many.train_step().skipped, "the leader goes on alone"


def test_an_answer_that_breaks_off_is_not_waited_for_without_end() -> None:
    ours, theirs = Pipe()
    with ours, theirs:
        limit(ours, 1.0)
        os.write(theirs.fileno(), struct.pack("!i", 1000) + bytes(10))
        assert ours.poll(1.0)
        with pytest.raises(TimeoutError, match="does not end its message"):
            receive(ours)
