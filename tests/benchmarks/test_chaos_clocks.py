"""A clock that steps at run time: the wall clock of a process, its threads and its children; monotonic clocks go on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.benchmarks.chaos.clocks import environment, set_clock

# For every line on its input: the wall clock of a thread, of a forked and of a spawned process, and a monotonic one.
TELL = """
import multiprocessing, sys, threading, time

def tell(out):
    out.put(time.time())

def clocks():
    for context in map(multiprocessing.get_context, ("fork", "spawn")):
        out = context.Queue()
        child = context.Process(target=tell, args=(out,))
        child.start()
        yield out.get(timeout=20)
        child.join()
    wall = []
    thread = threading.Thread(target=lambda: wall.append(time.time()))
    thread.start()
    thread.join(20)
    yield wall[0]

if __name__ == "__main__":
    for _ in sys.stdin:
        print(*clocks(), time.monotonic(), flush=True)
"""


@contextmanager
def telling(folder: Path, clock: Path) -> Iterator[subprocess.Popen[str]]:
    script = folder / "tell.py"
    script.write_text(TELL)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment(clock)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_wall_clock_steps_and_nothing_else_does(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    with telling(tmp_path, clock) as process:

        def ahead() -> list[float]:
            """Of the true time: three wall clocks and a monotonic one."""
            assert process.stdin is not None
            assert process.stdout is not None
            wall, monotonic = time.time(), time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            *told, last = map(float, process.stdout.readline().split())
            return [*(value - wall for value in told), last - monotonic]

        for step in (0.0, 600.0, -600.0, 30.0, 0.0):
            set_clock(clock, step)
            *wall, monotonic = ahead()
            assert all(abs(value - step) < 15 for value in wall), (step, wall)
            assert 0 <= monotonic < 15
