"""Bandwidth limits: the bucket by itself, shared by processes, and on real streams."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from averaging_swarm import Swarm, reasons, statuses
from shoal.protocol.pacing import BURST_SECONDS, SMALL, UNLIMITED, Bucket, Pace, Rates
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.downloads import Resource
from transports import run, serve

RATE = 1e6


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_full_bucket_lets_a_burst_through_and_then_its_rate(tmp_path: Path) -> None:
    clock = Clock()
    bucket = Bucket(tmp_path / "b", RATE, clock)
    assert bucket.take(int(BURST_SECONDS * RATE)) == 0.0
    assert bucket.take(100_000) == pytest.approx(0.1)
    assert bucket.take(100_000) == pytest.approx(0.2), "the second waits for the first's debt too"
    clock.now += 0.2
    assert bucket.take(50_000) == pytest.approx(0.05)


def test_small_messages_do_not_wait_and_are_not_free(tmp_path: Path) -> None:
    clock = Clock()
    bucket = Bucket(tmp_path / "b", RATE, clock)
    bucket.take(int(BURST_SECONDS * RATE) + 1_000_000)
    assert bucket.take(SMALL - 1) == 0.0
    assert bucket.take(SMALL) == pytest.approx(1.0 + (2 * SMALL - 1) / RATE)


def test_an_idle_bucket_saves_one_burst_only(tmp_path: Path) -> None:
    clock = Clock()
    bucket = Bucket(tmp_path / "b", RATE, clock)
    bucket.take(1)
    clock.now += 3600
    assert bucket.take(int(BURST_SECONDS * RATE) + 200_000) == pytest.approx(0.2)


def test_a_clock_that_steps_back_gives_nothing_away(tmp_path: Path) -> None:
    clock = Clock()
    bucket = Bucket(tmp_path / "b", RATE, clock)
    bucket.take(int(BURST_SECONDS * RATE))
    clock.now -= 100  # another boot's file
    assert bucket.take(100_000) == pytest.approx(0.1)


def test_a_file_cut_short_is_a_full_bucket(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"xyz")
    assert Bucket(tmp_path / "b", RATE).take(10) == 0.0


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_impossible_rates(rate: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rate"):
        Bucket(tmp_path / "b", rate)


def _spend(take: Callable[[int], float], seconds: float, spent: Connection) -> None:
    began, total = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        total += 10_000
        time.sleep(take(10_000))
    spent.send((began, total, time.monotonic()))
    os._exit(0)


def test_forks_and_spawned_processes_share_one_rate(tmp_path: Path) -> None:
    bucket, seconds = Bucket(tmp_path / "b", RATE), 2.0
    bucket.take(int(BURST_SECONDS * RATE))
    fork, pipes = multiprocessing.get_context("fork"), []
    for _ in range(3):
        reader, writer = fork.Pipe(duplex=False)
        fork.Process(target=_spend, args=(bucket.take, seconds, writer)).start()
        pipes.append(reader)
    began, spent, ended = zip(*(pipe.recv() for pipe in pipes), strict=True)
    lasted = max(ended) - min(began)
    assert sum(spent) <= 1.05 * RATE * lasted + 3 * 10_000
    assert sum(spent) >= 0.7 * RATE * lasted  # a busy machine loses some of the time, never gains any


def test_nothing_is_limited_by_default(tmp_path: Path) -> None:
    assert UNLIMITED.up(1 << 40) == UNLIMITED.down(1 << 40) == 0.0
    half = Pace(tmp_path, Rates(up=1000.0))
    assert half.down(1 << 40) == 0.0
    assert half.up(1_000_000) > 900


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_real_fetch_keeps_to_the_rate(direction: str, tmp_path: Path) -> None:
    size = 3_000_000
    pace = Pace(tmp_path, Rates(**{direction: RATE}))

    async def start(name: str, pace: Pace) -> Transport:
        return await Transport.start(identity_path=tmp_path / f"{name}.key", run_id="run", pace=pace)

    async def scenario() -> None:
        server = await start("server", pace if direction == "up" else UNLIMITED)
        asker = await start("asker", pace if direction == "down" else UNLIMITED)
        async with server, asker:
            serve(server, blob=Resource(os.urandom(size)), word=Resource(b"small"))
            began = time.monotonic()
            bulk = asyncio.create_task(asker.fetch(server.addrs, "blob", deadline_seconds=30, max_bytes=size))
            await asyncio.sleep(0.7)
            asked = time.monotonic()
            await asker.fetch(server.addrs, "word", deadline_seconds=10, max_bytes=10)
            waited = time.monotonic() - asked
            assert len((await bulk).data) == size
            took = time.monotonic() - began
        print(f"\n{direction}: {size / took / RATE:.3f} of the rate; a word beside it took {waited:.2f} s")
        assert took >= 0.9 * (size / RATE - BURST_SECONDS), "faster than it may be"
        assert took <= 1.5 * size / RATE, "much slower than it may be"
        if direction == "up":  # what is on its way down already lies before the word
            assert waited < 2.0, "bulk must not keep a word waiting for its end"

    run(scenario())


@pytest.mark.parametrize("direction", [0, 1], ids=["up", "down"])
def test_a_real_all_reduce_keeps_to_the_rate(direction: int, tmp_path: Path, swarm: Swarm) -> None:
    elements, rates = 400_000, [None, None]
    rates[direction] = 800_000.0
    peers = swarm.start(
        2, sizes=(elements,), part_bytes=1 << 16, paces={0: (str(tmp_path), *rates)}, timeout_seconds=20.0
    )
    for value, peer in enumerate(peers):
        peer.submit(np.full(elements, value))
    outcomes = [peer.outcome() for peer in peers]
    assert statuses(outcomes) == ["complete"] * 2, reasons(outcomes)
    moved = 4 * elements  # half of the vector as its sender, and the other half's average, in each direction
    took = outcomes[0]["seconds"]
    print(f"\n{moved / took / 800_000:.2f} of the rate, meeting included")
    assert took >= 0.9 * (moved / 800_000 - BURST_SECONDS)
