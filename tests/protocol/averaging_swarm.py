"""Real hivemind peers for the tests of averaging, each in processes of its own, on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import numpy as np
import psutil

PEER = Path(__file__).with_name("averaging_peer.py")


def until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def family(pid):
    """(pid, start time) of a process and its descendants."""
    try:
        process = psutil.Process(pid)
        return {(p.pid, p.create_time()) for p in [process, *process.children(recursive=True)]}
    except psutil.NoSuchProcess:
        return set()


def living(processes):
    alive = set()
    for pid, created in processes:
        try:
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                alive.add((pid, created))
        except psutil.NoSuchProcess:
            pass
    return alive


class Peer:
    def __init__(self, connection: Connection, about: dict):
        self.connection, self.peer_id, self.pid = connection, about["peer_id"], about["pid"]
        self.averager_pid, self.addrs, self.name = about["averager"], about["addrs"], about["name"]
        self.processes = family(self.pid)

    def submit(self, vector, *, round=0, attempt=0, tokens=100, steps=10, expected=2, quorum=2, **more):
        kwargs = dict(
            round=round, attempt=attempt, tokens=tokens, steps=steps, expected=expected, quorum=quorum, **more
        )
        self.connection.send(("submit", vector.astype(np.float32), kwargs))

    def submit_sketch(self, slot, vector, *, tokens, owner, interval=0, expected=3, **more):
        kwargs = dict(slot=slot, interval=interval, tokens=tokens, expected=expected, owner=owner.peer_id, **more)
        self.connection.send(("sketch", None if vector is None else vector.astype(np.float32), kwargs))

    def abandon(self, round, times):
        self.connection.send(("abandon", round, times))

    def next(self, kind, seconds=30):
        assert self.connection.poll(seconds), f"{self.name} sent no {kind} within {seconds} s"
        got, value = self.connection.recv()
        assert got == kind, (self.name, got, value)
        return value

    def outcome(self, seconds=30):
        return self.next("outcome", seconds)

    def kill(self):
        """The whole family at once, as when a machine loses power."""
        os.killpg(self.pid, signal.SIGKILL)


class Swarm:
    def __init__(self, directory: Path):
        self.directory = directory
        self.address = str(directory / "s")
        self.listener = Listener(self.address, "AF_UNIX", backlog=16)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HIVEMIND_LOGLEVEL": os.environ.get("HIVEMIND_LOGLEVEL", "ERROR"),
        }
        self.template = subprocess.Popen([sys.executable, str(PEER), self.address, "bitsandbytes"], env=environment)
        self.control = self.listener.accept()
        assert self.control.recv() == ("template", None)
        self.peers: list[Peer] = []
        self.retired: set = set()
        self.run_id = ""

    def start(
        self,
        count,
        *,
        codec="float32",
        sizes=(1000,),
        faults=None,
        matchmaking_seconds=3.0,
        timeout_seconds=12.0,
        part_bytes=1 << 10,
        robust=False,
        paces=None,
        sketches=None,
        sketchers=None,
    ) -> list[Peer]:
        """`sizes`: of the fragments, each a number of elements, or those of each tensor by name.

        `paces`: by number of the peer, a folder and two rates, as `Pace` has them.
        `sketches`: (slots, elements) if peers average sketches too; `sketchers` names odd peers' kinds of sketch.
        """
        self.run_id = f"test-{secrets.token_hex(6)}"
        first: list[Peer] = []
        for i in range(count):
            self.control.send(
                {
                    "name": f"peer{i}",
                    "identity": str(self.directory / secrets.token_hex(8)),
                    "initial_peers": first[0].addrs if first else [],
                    "run_id": self.run_id,
                    "codec": codec,
                    "sizes": [{f"w{n}": size} if isinstance(size, int) else size for n, size in enumerate(sizes)],
                    "fault": (faults or {}).get(i, ""),
                    "matchmaking_seconds": matchmaking_seconds,
                    "timeout_seconds": timeout_seconds,
                    "part_bytes": part_bytes,
                    "robust": robust,
                    "pace": (paces or {}).get(i),
                    "sketches": sketches,
                    "sketcher": (sketchers or {}).get(i, "rank 16"),
                }
            )
            if i == 0:
                first.append(self._accept())
        peers = first + sorted((self._accept() for _ in range(count - 1)), key=lambda peer: peer.name)
        self.peers += peers
        return peers

    def _accept(self) -> Peer:
        connection = self.listener.accept()
        assert connection.poll(30)
        kind, about = connection.recv()
        assert kind == "ready"
        return Peer(connection, about)

    def retire_peers(self):
        """Ask all to leave; `close` sees that they did (a leaving DHT takes two seconds)."""
        for peer in self.peers:
            self.retired |= peer.processes
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                peer.connection.send(("stop",))
        self.peers = []

    def outlived(self):
        """Processes still there though their peers have left or died; killed now."""
        deadline = time.monotonic() + 10
        while living(self.retired) and time.monotonic() < deadline:
            time.sleep(0.01)
        names = []
        for pid, _ in living(self.retired):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                names.append(psutil.Process(pid).cmdline()[:2])
                os.kill(pid, signal.SIGKILL)
        return names

    def close(self):
        self.control.send(None)
        self.template.wait(60)  # a busy machine takes its time to end what torch has loaded
        self.listener.close()


def all_equal(outcomes):
    return len({outcome["average"].tobytes() for outcome in outcomes}) == 1


def statuses(outcomes):
    return [outcome["status"] for outcome in outcomes]


def reasons(outcomes):
    return [(outcome["status"], outcome["detail"], outcome["failed"]) for outcome in outcomes]
