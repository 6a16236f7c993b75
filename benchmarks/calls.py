"""`./dev bench calls`: what a call from one peer to another takes, as sketches travel, between two hosts on loopback.

CPU time is of each host's process, the caller's and the answerer's, and of both peers' own sides together, which are
one process here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..protocol.transport.client import Transport

CALL_SECONDS = 60.0
RUN = "bench-calls"


@dataclass(frozen=True)
class Cost:
    """Of one call, in milliseconds."""

    nbytes: int  # of its body
    latency: float
    hosts: float  # CPU time of one host, the mean of both
    own: float  # CPU time of both peers' own sides


async def _answer(_peer_id: str, _name: str, _body: bytes) -> bytes:
    return b"heard"


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _measure(answerer: Transport, caller: Transport, nbytes: int, seconds: float) -> Cost:
    body, hosts = os.urandom(nbytes), psutil.Process().children(recursive=True)
    await caller.call(answerer.addrs, "bench", body, deadline_seconds=CALL_SECONDS)  # connects, the first time
    before = sum(map(_cpu_seconds, hosts)), time.process_time()
    began, calls = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        await caller.call(answerer.addrs, "bench", body, deadline_seconds=CALL_SECONDS)
        calls += 1
    took = time.monotonic() - began
    spent = sum(map(_cpu_seconds, hosts)) - before[0], time.process_time() - before[1]
    each = 1e3 / calls
    return Cost(nbytes, each * took, each * spent[0] / 2, each * spent[1])


async def run(sizes: Sequence[int], seconds: float) -> list[Cost]:
    """One after another, for so many seconds each."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [Path(folder) / f"{name}.key" for name in ("answerer", "caller")]
        peers = [await Transport.start(identity_path=key, run_id=RUN) for key in keys]
        try:
            peers[0].answer_calls(_answer)
            return [await _measure(peers[0], peers[1], nbytes, seconds) for nbytes in sizes]
        finally:
            for peer in peers:
                await peer.close()


def markdown(costs: Sequence[Cost]) -> str:
    """As a table."""
    lines = ["| bytes | ms a call | MB/s | host, CPU ms | own sides, CPU ms |", "|---|---|---|---|---|"]
    for cost in costs:
        speed = cost.nbytes / cost.latency / 1e3
        lines.append(f"| {cost.nbytes:,} | {cost.latency:.2f} | {speed:.1f} | {cost.hosts:.2f} | {cost.own:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="./dev bench calls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="2000,30000,300000,3000000", help="of bodies, in bytes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each size")
    arguments = parser.parse_args()
    print(markdown(asyncio.run(run([int(size) for size in arguments.sizes.split(",")], arguments.seconds))))


if __name__ == "__main__":
    main()
