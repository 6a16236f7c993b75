"""Swarms of real peers for tests: started by the commands that users type, watched through their HTTP endpoints.

Every process that descends from a peer carries the swarm's mark in its environment, whatever it execs or forks, so
that at the end each one is accounted for: one that is still there fails the test, and is killed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

SHOAL = Path(sys.executable).with_name("shoal")
START_SECONDS = 90.0  # of which importing torch takes most, on a busy machine
POLL_SECONDS = 0.1
HTTP_SECONDS = 5.0
MARK = "SWARM_OF_TEST"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names

Status = dict[str, Any]


class SwarmError(AssertionError):
    """Something did not happen in time, or a peer ended; the message has the tails of the logs."""


def wait_until(condition: Callable[[], bool], seconds: float, what: str | Callable[[], str]) -> float:
    """Poll until `condition()`; returns the seconds it took, or raises SwarmError with `what` after `seconds`."""
    began, pause = time.monotonic(), threading.Event()
    while not condition():
        if time.monotonic() - began > seconds:
            raise SwarmError(f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}")
        pause.wait(POLL_SECONDS)
    return time.monotonic() - began


@dataclass
class Peer:
    """One `shoal found` or `shoal join` process."""

    name: str
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    last: Status = field(default_factory=dict)

    def status(self) -> Status:
        """What it says now; what it said last, or {}, while it does not answer. SwarmError once it has ended."""
        code = self.process.poll()
        if code is not None:
            raise SwarmError(f"{self.name} has ended with exit code {code}\n{self.tail()}")
        try:
            with DIRECT.open(f"{self.url}/status.json", timeout=HTTP_SECONDS) as answer:
                self.last = json.load(answer)
        except (OSError, ValueError, KeyError, urllib.error.URLError):
            pass
        return self.last

    @property
    def url(self) -> str:
        """Where its HTTP server is; OSError or KeyError before it says so."""
        return str(json.loads((self.folder / "peer.json").read_text())["url"])

    @property
    def phase(self) -> str:
        return str(self.status().get("phase", "starting"))

    @property
    def id(self) -> str:
        return str(self.last["peer_id"])

    def epochs(self) -> dict[int, int]:
        """By slot the epoch at which it holds it."""
        return {lease["slot"]: lease["epoch"] for lease in self.status().get("slots", {}).get("leases", [])}

    def commits(self) -> int:
        """Outer rounds it has committed."""
        return int(self.status().get("outer", {}).get("rounds", {}).get("committed", 0))

    def children(self) -> list[psutil.Process]:
        """Every process below it."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, kind: str) -> psutil.Process:
        """Its `transport` host, `p2pd`, `dht` (the daemon's parent), `averager` (the other fork) or island `member`."""
        below = {process.pid: process for process in self.children()}
        command = {pid: " ".join(process.cmdline()) for pid, process in below.items()}
        daemon = next(pid for pid, line in command.items() if "/p2pd " in line)
        dht = below[daemon].ppid()
        host = next(pid for pid, line in command.items() if "shoal.protocol.transport.host" in line)
        # A forked child has its parent's command line.
        mine = " ".join(psutil.Process(self.process.pid).cmdline())
        averagers = [pid for pid, line in command.items() if line == mine and pid != dht]
        nursery = [pid for pid, line in command.items() if "shoal.node.island.nursery" in line]
        members = [pid for pid in nursery if below[pid].ppid() in nursery]
        found = {
            "p2pd": [daemon], "dht": [dht], "transport": [host], "averager": averagers, "member": members,
        }[kind]  # fmt: skip
        if len(found) != 1:
            raise SwarmError(f"{self.name} has {len(found)} {kind} processes: {command}")
        return below[found[0]]

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event, or whose event contains that text."""
        lines = []
        for line in self.log.read_text(errors="replace").splitlines():
            if event in line:
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    lines.append({"event": line})
        return [line for line in lines if event in str(line.get("event", ""))]

    def tail(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(line[:400] for line in text)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit code; SwarmError, with the stacks of its threads in the log, if it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGABRT)
            self.process.wait()
            raise SwarmError(f"{self.name} did not end within {seconds:.0f} s\n{self.tail()}") from None


class Swarm:
    """All peers of one test. A context manager: leaving it stops them and accounts for every process.

    Args:
        folder: for data directories and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self.peers: list[Peer] = []
        self.invite = ""

    # -- starting --------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")},
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONFAULTHANDLER": "1",  # what hangs tells where: see Peer.wait
            "TOKENIZERS_PARALLELISM": "false",
        }

    def start(self, name: str, *command: str) -> Peer:
        """Start `shoal COMMAND` with a data directory of its own, or again on the one that `name` had before."""
        return self.launch(name, [*command, "--host", "127.0.0.1"])

    def launch(self, name: str, command: Iterable[str], **settings: str) -> Peer:
        """The same without a host, and with these variables in its environment."""
        folder = self.folder / name
        generation = sum(peer.name == name for peer in self.peers)
        log = self.folder / (f"{name}.{generation}.log" if generation else f"{name}.log")
        options = ["--data-dir", str(folder), "--log-format", "json"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(SHOAL), *command, *options],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment() | settings,
                process_group=0,  # Ctrl-C in the terminal of the tests is not the swarm's
            )
        peer = Peer(name, process, folder, log)
        self.peers.append(peer)
        return peer

    def found(self, *options: str) -> Peer:
        """The bootstrap peer; waits until its invite is there. Small batches: what is tested is not the learning."""
        peer = self.start("bootstrap", "found", "--preset", "tiny", "--set", "train.batch_size=2", *options)
        wait_until(lambda: bool(peer.status().get("invite")), START_SECONDS, lambda: f"founding\n{peer.tail()}")
        self.invite = str(peer.last["invite"])
        return peer

    def join(self, name: str, *options: str, invite: str = "") -> Peer:
        """A composer; does not wait for it."""
        return self.start(name, "join", invite or self.invite, "--threads", "1", *options)

    def call(self, *command: str, seconds: float = START_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a `shoal` command to its end."""
        return subprocess.run(
            [str(SHOAL), *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            timeout=seconds,
            check=False,
        )

    # -- watching --------------------------------------------------------------------------------------------------

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> float:
        """Wait for a condition on the swarm; fails with every peer's state and the tails of their logs."""
        return wait_until(condition, seconds, lambda: f"{what}\n{self.report()}")

    def report(self) -> str:
        lines = []
        for peer in self.peers:
            told = {key: peer.last.get(key) for key in ("phase", "phase_detail", "step", "slots", "outer")}
            for part in ("slots", "outer"):
                told[part] = {key: (told[part] or {}).get(key) for key in ("owned", "standby", "lost", "rounds")}
            lines.append(f"--- {peer.name}: exit code {peer.process.poll()}, {told}")
            lines.append(peer.tail())
        return "\n".join(lines)

    # -- ending ----------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every live process that carries this swarm's mark."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stop(self, peers: Iterable[Peer] | None = None, seconds: float = 60.0) -> dict[str, int]:
        """SIGTERM to all that still run; their exit codes."""
        running = [peer for peer in (self.peers if peers is None else peers) if peer.process.poll() is None]
        for peer in running:
            peer.signal(signal.SIGTERM)
        return {peer.name: peer.wait(seconds) for peer in running}

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                codes = self.stop()
                assert not any(codes.values()), f"exit codes {codes}\n{self.report()}"
                self.assert_nothing_left()
        finally:
            self.kill()

    def assert_nothing_left(self, seconds: float = 5.0) -> None:
        """No process of any peer is alive. Those that the kernel ends after their parent get a moment."""
        try:
            wait_until(lambda: not self.processes(), seconds, "")
        except SwarmError:
            left = [f"{process.pid}: {' '.join(process.cmdline())[:200]}" for process in self.processes()]
            if left:
                raise SwarmError("processes are left over:\n" + "\n".join(left)) from None

    def kill(self) -> None:
        """End whatever is there, by process id."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for peer in self.peers:
            peer.process.wait()


def owners_of(peers: Iterable[Peer]) -> dict[int, list[str]]:
    """By slot the names of the peers that say they own it."""
    owners: dict[int, list[str]] = {}
    for peer in peers:
        for slot in peer.status().get("slots", {}).get("owned", []):
            owners.setdefault(slot, []).append(peer.name)
    return owners


def owned_once(peers: Iterable[Peer], slots: int = 16) -> bool:
    """Whether every slot has exactly one owner among `peers`."""
    owners = owners_of(peers)
    return sorted(owners) == list(range(slots)) and all(len(names) == 1 for names in owners.values())


def backed_up(peers: Iterable[Peer], slots: int = 16) -> bool:
    """Whether every slot also has a copy at a standby."""
    copies = {slot for peer in peers for slot in peer.status().get("slots", {}).get("standby", [])}
    return copies >= set(range(slots))


def lost(peers: Iterable[Peer]) -> float:
    """Slots that restarted without any copy, over all peers."""
    return sum(peer.status()["slots"]["lost"] for peer in peers)


def loss_of(log_or_status: Status) -> float:
    """The moving average of a peer's loss; fails before its first step."""
    loss = log_or_status["loss"]
    assert loss is not None
    return float(loss)


def run_id_of(invite: str) -> str:
    match = re.search(r"/([a-z0-9-]+-[0-9a-f]{12})\?", invite)
    assert match is not None
    return match[1]
