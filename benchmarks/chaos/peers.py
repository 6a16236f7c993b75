"""Peers of a chaos run: `shoal found` and `shoal join`, each in its namespace, watched from outside it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ...node.demo import peer_environment, shoal_command
from .clocks import environment, set_clock
from .network import Network, run
from .quota import Quotas
from .relay import Relays

DHT_PORT, TRANSPORT_PORT, HTTP_PORT = 4100, 4101, 4102
HTTP_SECONDS = 2.0
DISK_BYTES = 64 << 20
DUTY_SECONDS = 0.2  # a straggler's period: far below a step of any size
STOP_SECONDS = 45.0
TIMED_OUT = 124  # as timeout(1) says it

Status = dict[str, Any]


@dataclass
class Peer:
    """One peer, through all its lives."""

    name: str
    folder: Path
    command: list[str]  # without where it listens and keeps its things
    program: list[str]
    clock: Path | None = None  # the folder that sets it, where that is possible
    process: subprocess.Popen[bytes] | None = None
    lives: int = 0
    status: Status = field(default_factory=dict)  # the last that it said in this life

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def gave_up(self) -> bool:
        """It ended with an error of its own; who is killed has none."""
        return self.process is not None and (self.process.poll() or 0) > 0

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(f".{self.lives}.log")

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event, in this life."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if f'"{event}"' in line]
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    @property
    def phase(self) -> str:
        return str(self.status.get("phase", "starting"))

    @property
    def commits(self) -> int:
        """Outer rounds that it has committed in this life."""
        return int(self.status.get("outer", {}).get("rounds", {}).get("committed", 0))

    @property
    def held(self) -> list[tuple[int, str]]:
        """By fragment, round and digest of the common state that it has."""
        return [(held["round"], held["digest"]) for held in self.status.get("outer", {}).get("held", [])]

    @property
    def leases(self) -> dict[int, int]:
        """By slot that it owns, the epoch."""
        return {lease["slot"]: lease["epoch"] for lease in self.status.get("slots", {}).get("leases", [])}

    def tree(self) -> list[psutil.Process]:
        """Its processes, the first one first."""
        if self.process is None:
            return []
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]


class Peers:
    """All peers of a run. A context manager: leaving it ends them and unmounts their disks.

    Args:
        folder: for data folders and logs.
        relays: through which to reach the peers; None for the bare network.
        quotas: of CPU time; None where peers share the machine.
    """

    def __init__(
        self, network: Network, folder: Path, relays: Relays | None = None, quotas: Quotas | None = None
    ) -> None:
        self.network, self.folder, self.relays, self.quotas = network, folder, relays, quotas
        self.all: dict[str, Peer] = {}
        self._mounted: list[Path] = []
        self._slow: dict[str, threading.Event] = {}  # stragglers, and what ends it

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for ended in self._slow.values():
            ended.set()
        for peer in self.all.values():
            self.kill(peer)
        for folder in self._mounted:
            run("umount", "--lazy", str(folder))

    @property
    def composers(self) -> list[Peer]:
        return [peer for peer in self.all.values() if peer.name != "founder"]

    # -- lives -----------------------------------------------------------------------------------------------------

    def add(
        self, name: str, command: Sequence[str], *, lie: str = "", small_disk: bool = False, own_clock: bool = False
    ) -> Peer:
        """Give a peer its namespace and folder, and start it."""
        folder = self.folder / name
        folder.mkdir()
        if small_disk:
            run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
            self._mounted.append(folder)
        if name not in self.network.hosts:
            self.network.add(name)
        if self.relays is not None:
            for port in (DHT_PORT, TRANSPORT_PORT):
                self.relays.serve(name, port)
        program = [sys.executable, "-m", "shoal.benchmarks.chaos.liar", lie] if lie else shoal_command()
        clock = self.folder / f"{name}.clock" if own_clock else None
        peer = self.all[name] = Peer(name, folder, list(command), program, clock)
        self.start(peer)
        return peer

    def start(self, peer: Peer) -> None:
        """Start it, or start it again on what it left on disk."""
        assert not peer.alive
        address = self.network.address(peer.name)
        if self.network.is_behind_nat(peer.name):
            where: list[str] = []  # it has to find out by itself
        else:
            where = ["--host", address if self.relays is None else "127.0.0.1", "--announce", address]
        ports = {"--dht-port": DHT_PORT, "--transport-port": TRANSPORT_PORT, "--http-port": HTTP_PORT}
        for flag, port in ports.items():
            where += [flag, str(port)]
        keep = ["--data-dir", str(peer.folder), "--log-format", "json", "--threads", "1"]
        peer.lives += 1
        peer.status = {}
        clock = {} if peer.clock is None else environment(peer.clock)
        command = self.network.command(peer.name, [*peer.program, *peer.command, *where, *keep])
        if self.quotas is not None:
            command = self.quotas.command(peer.name, command)
        with peer.log.open("wb") as out:
            peer.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**peer_environment(1), "TMPDIR": str(self._temporary(peer)), **clock},
                start_new_session=True,
            )

    def _temporary(self, peer: Peer) -> Path:
        # Sockets of hivemind lie here, and their names may not be long.
        folder = self.folder / f"t-{peer.name}"
        folder.mkdir(exist_ok=True)
        return folder

    def poll(self) -> None:
        """Ask every living peer how it is; who does not answer keeps what it said last."""
        for peer in self.all.values():
            if peer.alive:
                try:
                    peer.status = json.loads(self.network.get(peer.name, HTTP_PORT, "/status.json", HTTP_SECONDS))
                except (OSError, ValueError, http.client.HTTPException):
                    continue
                if self.quotas is not None and peer.status.get("step"):
                    self.quotas.bound(peer.name, True)

    def kill(self, peer: Peer) -> None:
        """SIGKILL; its children die with it."""
        if peer.process is not None and peer.process.poll() is None:
            tree = peer.tree()
            peer.process.kill()
            peer.process.wait()
            # The kernel ends them too; one that is stopped, or that stood between two deaths, is ended here.
            for process in tree[1:]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue

    def leave(self) -> dict[str, int | None]:
        """SIGTERM to all that live, and their exit codes; None for one that had to be killed."""
        living = [peer for peer in self.all.values() if peer.alive]
        for peer in living:
            assert peer.process is not None
            peer.process.send_signal(signal.SIGTERM)
        codes: dict[str, int | None] = {}
        for peer in living:
            assert peer.process is not None
            try:
                codes[peer.name] = peer.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                codes[peer.name] = None
                self.kill(peer)
        return codes

    def call(self, name: str, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a `shoal` command to its end, in a namespace of its own."""
        if name not in self.network.hosts:
            self.network.add(name)
        argv = self.network.command(name, [*shoal_command(), *command, "--data-dir", str(self.folder / name)])
        try:
            return subprocess.run(
                argv, capture_output=True, text=True, env=peer_environment(1), timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as late:  # an outcome like any other: a run is not lost for it
            tail = (late.stderr or b"").decode(errors="replace")  # bytes, whatever `text` says
            return subprocess.CompletedProcess(argv, TIMED_OUT, "", f"{tail}\nnot within {seconds:g} s")

    # -- faults of the machine -------------------------------------------------------------------------------------

    def stop(self, peer: Peer, number: signal.Signals) -> None:
        """SIGSTOP or SIGCONT to all its processes."""
        for process in peer.tree() if peer.alive else []:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def slow_down(self, peer: Peer, share: float) -> None:
        """Let its first process, which trains, run for `share` of the time; helpers run on. Until `speed_up`."""
        ended = self._slow[peer.name] = threading.Event()

        def alternate() -> None:
            while not ended.wait(DUTY_SECONDS * share):
                _send(peer, signal.SIGSTOP)
                ended.wait(DUTY_SECONDS * (1 - share))
                _send(peer, signal.SIGCONT)

        threading.Thread(target=alternate, name=f"slow-{peer.name}", daemon=True).start()

    def speed_up(self, peer: Peer) -> None:
        self._slow.pop(peer.name).set()

    def set_clock(self, peer: Peer, seconds: float) -> None:
        assert peer.clock is not None
        set_clock(peer.clock, seconds)

    def fill_disk(self, peer: Peer) -> None:
        """Leave no room in its folder."""
        with (peer.folder / "filler").open("wb") as file:
            room = os.statvfs(peer.folder)
            file.write(bytes(room.f_bavail * room.f_frsize))

    def free_disk(self, peer: Peer) -> None:
        (peer.folder / "filler").unlink()


def _send(peer: Peer, number: signal.Signals) -> None:
    if peer.process is not None and peer.process.poll() is None:
        peer.process.send_signal(number)
