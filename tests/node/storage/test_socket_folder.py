"""A peer's folder for sockets: its own, gone with it, and removed by the next peer where it was killed."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Like a peer: a socket of multiprocessing's, and a fork that ends when it does.
SCRIPT = """
import multiprocessing, os, sys, tempfile
from multiprocessing.connection import Listener
from shoal.node.storage.socket_folder import own_sockets
from shoal.protocol.process_death import end_with_parent

def fork(parent, up):
    end_with_parent(parent)
    up.send(True)
    up.recv()

shared = tempfile.gettempdir()
with own_sockets() as own:
    assert tempfile.gettempdir() == str(own)
    listener = Listener(family="AF_UNIX")
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=fork, args=(os.getpid(), theirs))
    child.start()
    ours.recv()
    print(own, flush=True)
    sys.stdin.read()
    ours.send(True)
    child.join()
assert tempfile.gettempdir() == shared
"""


class Peers:
    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.processes = ExitStack()

    def start(self) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SCRIPT],
            env={**os.environ, "TMPDIR": str(self.shared)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.callback(process.communicate)
        self.processes.callback(process.kill)
        assert process.stdout is not None
        return process, Path(process.stdout.readline().strip())


@pytest.fixture
def peers() -> Iterator[Peers]:
    with tempfile.TemporaryDirectory(prefix="t-") as shared:  # a path that is short enough for sockets below it
        peers = Peers(Path(shared))
        with peers.processes:
            yield peers


def test_a_folder_goes_with_its_process(peers: Peers) -> None:
    process, own = peers.start()
    assert own.parent == peers.shared
    assert list(own.glob("pymp-*/listener-*"))
    process.communicate()
    assert process.returncode == 0
    assert list(peers.shared.iterdir()) == []


def test_a_killed_process_leaves_it_to_the_next_one_and_who_runs_keeps_it(peers: Peers) -> None:
    killed, left = peers.start()
    _, kept = peers.start()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()  # until its fork has ended too, which has the other end of its output
    assert left.is_dir()
    _, third = peers.start()
    assert sorted(peers.shared.iterdir()) == sorted([kept, third])
    assert list(kept.glob("pymp-*/listener-*"))


@pytest.mark.parametrize(("more", "inside"), [(0, True), (1, False)])
def test_where_the_temporary_directorys_name_is_too_long_it_is_in_tmp(more: int, inside: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:
        longest = 107 - len("/shoal-sockets-12345678/hivemind-p2pclient-0123456789a.sock") + more
        peers = Peers(Path(short) / ("x" * (longest - len(short) - 1)))
        peers.shared.mkdir()
        with peers.processes:
            process, own = peers.start()
            assert own.parent == (peers.shared if inside else Path("/tmp"))
            assert list(own.glob("pymp-*/listener-*"))
            process.communicate()
            assert process.returncode == 0
            assert not own.exists()


def test_what_is_nobodys_folder_for_sockets_stays(peers: Peers) -> None:
    others = [peers.shared / name for name in ("shoal", "shoal-sockets-new", "shoal-demo-1", "pymp-1")]
    for other in others:
        other.mkdir()
    (peers.shared / "shoal-sockets-file").touch()
    elsewhere = peers.shared / "elsewhere"
    elsewhere.touch()
    (others[1] / "in-use").symlink_to(elsewhere)
    process, _ = peers.start()
    process.communicate()
    assert sorted(peers.shared.iterdir()) == sorted([*others, elsewhere, peers.shared / "shoal-sockets-file"])
