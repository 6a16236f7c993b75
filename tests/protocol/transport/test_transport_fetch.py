"""Fetches, with real py-libp2p hosts in real processes."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shoal.protocol.errors import Refused
from shoal.protocol.pacing import Pace, Rates
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.downloads import Download, FetchEnded, FetchQuery, Resource
from shoal.protocol.transport.limits import Limits
from shoal.protocol.transport.wire import Reason
from transports import run, serve, swarm, until


async def started(stack: AsyncExitStack, folder: Path, name: str, **options: Any) -> Transport:
    """A peer's transport, with a key of its own, until the stack ends."""
    transport = await Transport.start(identity_path=folder / f"{name}.key", run_id="run", **options)
    return await stack.enter_async_context(transport)


def test_fetch_20_megabytes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            resource = Resource(os.urandom(20_000_000), b"step 7")
            serve(server, snapshot=resource, empty=Resource(b"", b"nothing"))
            seen: list[tuple[int, int]] = []
            began = time.monotonic()
            got = await asker.fetch(
                server.addrs, "snapshot", deadline_seconds=30, max_bytes=20_000_000, progress=lambda *p: seen.append(p)
            )
            print(f"\nfetch: {20 / (time.monotonic() - began):.0f} MB/s")
            assert got.data == resource.data
            assert got.meta == b"step 7"
            assert seen[-1] == (20_000_000, 20_000_000)
            assert [n for n, _ in seen] == sorted(n for n, _ in seen)
            empty = await asker.fetch(server.addrs, "empty", deadline_seconds=5, max_bytes=0)
            assert (empty.data, empty.meta) == (b"", b"nothing")
            await until(lambda: asker.counters.fetch_bytes_received >= 20_000_000, "counter")
            await until(lambda: server.counters.fetch_bytes_sent >= 20_000_000, "counter")

    run(scenario())


def test_a_deadline_waits_for_bytes_that_come_fast_enough(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            peer = partial(started, stack, tmp_path)
            rate = 500_000
            server = await peer("server", pace=Pace(tmp_path, Rates(up=rate)))
            resource = Resource(os.urandom(2_500_000))
            serve(server, snapshot=resource)
            patient = await peer("patient", limits=Limits(min_fetch_bytes_per_second=rate // 4))
            began = time.monotonic()
            got = await patient.fetch(server.addrs, "snapshot", deadline_seconds=2, max_bytes=10**7)
            assert got.data == resource.data
            assert time.monotonic() - began > 2.5, "the server was not slow"
            hasty = await peer("hasty", limits=Limits(min_fetch_bytes_per_second=100 * rate))
            with pytest.raises(FetchEnded) as caught:
                await hasty.fetch(server.addrs, "snapshot", deadline_seconds=1, max_bytes=10**7)
            assert caught.value.reason == Reason.DEADLINE

    run(scenario())


def test_who_reads_as_slowly_as_is_allowed_is_not_cut_off(tmp_path: Path) -> None:
    """A slot that trains is another one at each attempt: who is cut off again and again never gets it."""
    limits = Limits(read_deadline_seconds=2.0, min_served_bytes_per_second=80_000)

    async def scenario() -> None:
        key = tmp_path / "server.key"
        async with await Transport.start(identity_path=key, run_id="run", limits=limits) as server:
            pace = Pace(tmp_path, Rates(down=90_000))
            async with await Transport.start(identity_path=tmp_path / "asker.key", run_id="run", pace=pace) as asker:
                resource, asked = Resource(os.urandom(900_000)), Counter[str]()

                async def answer(query: FetchQuery) -> Resource | None:
                    asked[query.resource] += 1
                    return resource

                server.serve(answer)
                got = await asker.fetch(server.addrs, "snapshot/3", deadline_seconds=50, max_bytes=10**6)
                assert got.data == resource.data
                assert asked == {"snapshot/3": 1}

    run(scenario())


def test_who_reads_too_slowly_is_cut_off(tmp_path: Path) -> None:
    """It makes progress within every deadline, and would hold the resource's memory for as long as it likes."""
    limits = Limits(read_deadline_seconds=2.0, min_served_bytes_per_second=500_000, chunk_bytes=8192)

    async def scenario() -> None:
        key = tmp_path / "server.key"
        async with await Transport.start(identity_path=key, run_id="run", limits=limits) as server:
            pace = Pace(tmp_path, Rates(down=150_000))
            async with await Transport.start(identity_path=tmp_path / "asker.key", run_id="run", pace=pace) as asker:
                asked = Counter[str]()

                async def answer(query: FetchQuery) -> Resource | None:
                    asked[query.resource] += 1
                    return Resource(bytes(10_000_000))

                server.serve(answer)
                fetch = asker.fetch(server.addrs, "snapshot/3", deadline_seconds=50, max_bytes=10**8)
                fetching = asyncio.create_task(fetch)
                await until(lambda: asked.total() > 1, "its coming back", seconds=40.0)
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)

    run(scenario())


@pytest.mark.parametrize("victim", ["server", "asker"])
def test_a_fetch_resumes_after_a_host_is_killed(tmp_path: Path, victim: str) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            resource = Resource(os.urandom(20_000_000))
            serve(server, snapshot=resource)
            target = server if victim == "server" else asker
            kill_at = random.randrange(2_000_000, 15_000_000)
            progress: list[int] = []

            def watch(received: int, _size: int) -> None:
                if received >= kill_at and not any(n >= kill_at for n in progress):
                    os.kill(target.host_pid or 0, signal.SIGKILL)
                progress.append(received)

            got = await asker.fetch(server.addrs, "snapshot", deadline_seconds=30, max_bytes=10**8, progress=watch)
            assert got.data == resource.data, f"killed at {kill_at}"
            await until(lambda: target.restarts == 1, "its successor")  # all may have been on its way before
            assert progress == sorted(progress), "started again instead of resuming"
            assert target.host_pid is not None

    run(scenario())


@pytest.mark.parametrize("prefix", ["true", "forged"])
def test_what_one_peer_sent_before_it_left_is_gone_on_with_at_another(tmp_path: Path, prefix: str) -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            # Seconds for the rest, so that it is gone before all has been sent.
            leaving = await started(stack, tmp_path, "leaving", pace=Pace(tmp_path, Rates(up=5_000_000)))
            staying = await started(stack, tmp_path, "staying")
            asker = await started(stack, tmp_path, "asker")
            resource = Resource(os.urandom(40_000_000))
            serve(leaving, state=resource)
            serve(staying, state=resource)
            begun, leave_at = Download(), random.randrange(1_000_000, 6_000_000)
            leave = asyncio.Event()

            async def go() -> None:
                await leave.wait()
                await leaving.close()

            going = asyncio.create_task(go())
            with pytest.raises(FetchEnded) as ended:
                await asker.fetch(
                    leaving.addrs,
                    "state",
                    deadline_seconds=30,
                    max_bytes=10**8,
                    progress=lambda received, _: leave.set() if received >= leave_at else None,
                    begun=begun,
                )
            await going
            assert ended.value.reason in (Reason.CUT, Reason.UNREACHABLE)
            assert leave_at <= len(begun.data) < len(resource.data), f"left at {leave_at}"
            if prefix == "forged":
                begun.data[leave_at // 2] ^= 1
            seen: list[int] = []
            got = await asker.fetch(
                staying.addrs,
                "state",
                deadline_seconds=30,
                max_bytes=10**8,
                progress=lambda received, _: seen.append(received),
                begun=begun,
            )
            assert got.data == resource.data
            assert seen[0] > leave_at
            assert (seen == sorted(seen)) == (prefix == "true"), "a forged prefix is thrown away, a true one is not"

    run(scenario())


def test_a_resource_that_changes_under_a_fetch_starts_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):
            old, new = Resource(os.urandom(8_000_000)), Resource(os.urandom(5_000_000))
            serve(server, state=old)
            killed = False

            def watch(received: int, _size: int) -> None:
                nonlocal killed
                if received > 1_000_000 and not killed:
                    killed = True
                    serve(server, state=new)
                    os.kill(server.host_pid or 0, signal.SIGKILL)

            got = await asker.fetch(server.addrs, "state", deadline_seconds=30, max_bytes=10**8, progress=watch)
            assert got.data == new.data

    run(scenario())


def test_every_refusal_has_its_reason(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (server, asker):

            async def fails(resource: str, addrs: list[str] | None = None, seconds: float = 10) -> str:
                began = time.monotonic()
                with pytest.raises(FetchEnded) as caught:
                    await asker.fetch(addrs or server.addrs, resource, deadline_seconds=seconds, max_bytes=1000)
                assert time.monotonic() - began < seconds + 1
                return caught.value.reason

            assert await fails("no handler") == Reason.NOT_FOUND
            never = asyncio.Event()

            async def answer(query: FetchQuery) -> Resource | None:
                assert query.peer_id == asker.peer_id
                match query.resource:
                    case "large":
                        return Resource(bytes(1001))
                    case "slow":
                        await never.wait()
                    case "refused":
                        raise Refused("quota", "too much")
                    case "bug":
                        raise KeyError("bug")
                return None

            server.serve(answer)
            assert await fails("absent") == Reason.NOT_FOUND
            assert await fails("large") == Reason.TOO_LARGE
            assert await fails("refused") == Reason.BUSY
            assert await fails("bug") == Reason.BUSY
            assert await fails("slow", seconds=0.5) == Reason.DEADLINE
            nobody = f"/ip4/127.0.0.1/tcp/1/p2p/{server.peer_id}"
            await server.close()
            assert await fails("absent", [nobody]) == Reason.UNREACHABLE
            assert await fails("absent", ["nonsense"]) == Reason.GARBAGE

    run(scenario())


def test_more_streams_than_allowed_are_told_busy(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 3, max_served_streams=3, max_served_streams_per_peer=2) as (server, one, two):
            gate, inside = asyncio.Event(), Counter[str]()

            async def answer(query: FetchQuery) -> Resource | None:
                inside[query.peer_id] += 1
                await gate.wait()
                return Resource(b"data")

            server.serve(answer)

            def fetch(peer: Transport) -> asyncio.Task[Resource]:
                return asyncio.create_task(peer.fetch(server.addrs, "x", deadline_seconds=20, max_bytes=10))

            admitted = [fetch(one), fetch(one)]
            await until(lambda: inside[one.peer_id] == 2)
            with pytest.raises(FetchEnded) as third:
                await fetch(one)  # over the peer's own limit
            assert third.value.reason == Reason.BUSY
            admitted.append(fetch(two))
            await until(lambda: inside[two.peer_id] == 1)
            with pytest.raises(FetchEnded) as fourth:
                await fetch(two)  # over the total
            assert fourth.value.reason == Reason.BUSY
            gate.set()
            assert [got.data for got in await asyncio.gather(*admitted)] == [b"data"] * 3
            assert (await fetch(two)).data == b"data"  # slots come back
            await until(lambda: server.counters.refused_busy == 2, "counter")

    run(scenario())


def test_a_peer_that_sends_slowly_does_not_hold_up_fetches_from_others(tmp_path: Path) -> None:
    """At the slowest rate that is waited for, a few resources of one peer would take all turns for hours."""

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            peer = partial(started, stack, tmp_path)
            generous = Limits(max_served_streams_per_peer=8)
            slow = await peer("slow", pace=Pace(tmp_path, Rates(up=50_000)), limits=generous)
            quick, asker = await peer("quick"), await peer("asker", limits=Limits(max_fetches=6))
            names = [f"standin/{slot}" for slot in range(8)]
            serve(slow, **{name: Resource(os.urandom(1_000_000)) for name in names})
            serve(quick, standin=Resource(b"here"))
            dragging = [
                asyncio.create_task(asker.fetch(slow.addrs, name, deadline_seconds=60, max_bytes=1_000_000))
                for name in names
            ]
            await until(lambda: asker.counters.fetch_bytes_received > 0, "the slow peer to begin")
            got = await asker.fetch(quick.addrs, "standin", deadline_seconds=5, max_bytes=100)
            assert got.data == b"here"
            assert not any(task.done() for task in dragging)
            for task in dragging:
                task.cancel()
            await asyncio.gather(*dragging, return_exceptions=True)

    run(scenario())
