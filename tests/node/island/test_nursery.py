"""Members are forked from a process that has imported what they need, and none outlives what it comes from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from shoal.node.island.merging import DataParallel
from shoal.node.island.nursery import Nursery, nursery

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def own_nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def test_members_come_at_once_and_go_with_it(own_nursery: Nursery) -> None:
    processes = [own_nursery.fork()[0] for _ in range(2)]
    began = time.monotonic()
    process, pipe = own_nursery.fork()
    assert time.monotonic() - began < 1.0, "with nothing to import"
    processes.append(process)
    assert {process.ppid() for process in processes} == {own_nursery._process.pid}
    pipe.close()
    process.wait(20)  # its leader has given it up
    assert not own_nursery.ended
    own_nursery._process.kill()
    assert psutil.wait_procs(processes, 20)[1] == []
    with pytest.raises(OSError, match=r"ended|pipe|reset"):
        own_nursery.fork()


def test_one_that_has_ended_is_replaced() -> None:
    first = nursery()
    assert nursery() is first
    os.kill(first._process.pid, signal.SIGKILL)
    first._process.wait()
    assert nursery() is not first
    process, pipe = nursery().fork()
    assert process.is_running()
    pipe.close()
    process.wait(20)


def test_nothing_survives_a_killed_leader() -> None:
    code = (
        "import json, time; from shoal.node.island.nursery import nursery;"
        "member, pipe = nursery().fork(); print(json.dumps([member.pid, member.ppid()]), flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as leader:
        assert leader.stdout is not None
        below = [psutil.Process(pid) for pid in json.loads(leader.stdout.readline())]
        leader.kill()
        assert psutil.wait_procs(below, 20)[1] == []


def test_what_is_forked_has_no_threads_and_all_that_is_slow() -> None:
    code = (
        "import os, sys; from shoal.node.island.nursery import load; load();"
        "assert len(os.listdir('/proc/self/task')) == 1; before = set(sys.modules); import shoal.node.island.member;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert not set(done.stdout.split()) & {"torch", "transformers", "hivemind", "scipy", "numpy"}


def test_members_with_gpus_are_forked_before_anything_has_looked_at_these() -> None:
    code = "import sys, shoal.node.island.nursery; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    island = DataParallel(2, ["cpu", "cuda:0"], 1)
    assert not island.nursery().imports
    assert DataParallel(2, ["cpu", "cpu"], 1).nursery().imports
