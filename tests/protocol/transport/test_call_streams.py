"""A stream serves many calls, one after another: when it is used again, and when not.

The other side is `call_peers.py`, in a process of its own.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import call_peers
import pytest
from call_peers import BODY
from shoal.protocol.errors import PeerUnreachable
from shoal.protocol.transport.limits import Limits
from transports import run, swarm, until

PATIENCE_SECONDS = 20.0


@asynccontextmanager
async def other(*arguments: str) -> AsyncIterator[asyncio.StreamReader]:
    """The other process; yields what it says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", call_peers.__file__, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield process.stdout
    finally:
        process.kill()
        await process.communicate()


async def line(reader: asyncio.StreamReader) -> str:
    return (await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)).decode().strip()


def test_calls_share_a_stream_until_it_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 1, idle_stream_seconds=1.0) as (caller,), other() as says:
            addr = await line(says)

            async def stream(name: str) -> bytes:
                """Number of the stream that the call went by."""
                return await caller.call([addr], name, BODY, deadline_seconds=10)

            assert [await stream("x") for _ in range(3)] == [b"1"] * 3
            assert await stream("end after this") == b"1"
            assert await stream("end at the next") == b"2"
            assert await stream("cut at the next") == b"3", "it ended instead of Go: the call goes by another one"
            with pytest.raises(PeerUnreachable):
                await stream("cut after Go")  # by the fourth: it may have been handled, and is not repeated
            assert await stream("x") == b"5"
            assert await line(says) == "5 ended", "the caller keeps no stream for ever"

    run(scenario())


def test_calls_that_need_a_stream_of_their_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 1) as (caller,), other() as says:
            addr = await line(says)
            calls = [caller.call([addr], "x", BODY, deadline_seconds=10) for _ in range(2)]
            assert sorted(await asyncio.gather(*calls)) == [b"1", b"2"], "at the same time"
            for number in (b"3", b"4"):  # without a body it may be handled before Go is heard: it cannot be repeated
                assert await caller.call([addr], "x", b"", deadline_seconds=10) == number

    run(scenario())


@pytest.mark.parametrize("body", [b"", BODY])
def test_a_peer_that_has_restarted_is_called_on_a_new_stream(tmp_path: Path, body: bytes) -> None:
    async def scenario() -> None:
        async with swarm(tmp_path, 2) as (answerer, caller):

            async def answer(_peer_id: str, _name: str, body: bytes) -> bytes:
                return body

            answerer.answer_calls(answer)
            for restarts in range(3):
                await until(lambda n=restarts: answerer.restarts == n, "the restart")
                for _ in range(2):
                    assert await caller.call(answerer.addrs, "x", body, deadline_seconds=20) == body
                os.kill(answerer.host_pid or 0, signal.SIGKILL)

    run(scenario())


def test_a_peer_has_no_more_streams_at_rest_than_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        limits = {"max_received_calls_per_peer": 3, "idle_stream_seconds": 1.0}
        async with swarm(tmp_path, 1, **limits) as (answerer,):

            async def answer(_peer_id: str, _name: str, body: bytes) -> bytes:
                return body

            answerer.answer_calls(answer)
            async with other(answerer.addrs[0]) as says:
                assert json.loads(await line(says)) == {"open": 3, "closed": 5}
                assert json.loads(await line(says)) == {"called again": 3}
                assert json.loads(await line(says)) == {"open": 0}, "they are not kept for ever"
            assert answerer.counters.calls_cut == answerer.counters.garbage == answerer.counters.refused_busy == 0

    run(scenario())


def test_streams_at_rest_are_bounded_by_time() -> None:
    assert 0 < Limits().idle_stream_seconds < 60
    with pytest.raises(ValueError, match="idle_stream_seconds"):
        Limits(idle_stream_seconds=0)
