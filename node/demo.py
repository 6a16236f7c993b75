"""`./dev demo`: a real swarm on this machine, from founding to a checkpoint that plain transformers loads.

Every peer is a process of its own, started with the same commands a user would type; this file only watches them
through their HTTP endpoints, like any operator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .config import ENV_PREFIX
from .errors import NoPeerHere
from .watching.status import fetch_status, speed_text

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0
START_SECONDS = 120.0
HTTP_SECONDS = 2.0
STOP_SECONDS = 45.0
LOOPBACK = "127.0.0.1"  # the demo is this machine's own business
PROMPT = "def __init__(self"


class DemoFailed(Exception):
    """A step of the demo did not work; the message says which and where its log is."""


@dataclass
class Peer:
    """One peer process and what it last said."""

    name: str
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    status: dict[str, Any] | None = None

    def poll(self) -> None:
        """Read /status.json; a peer that is not up yet or busy keeps its last status."""
        code = self.process.poll()
        if code is not None:
            raise DemoFailed(f"{self.name} ended with exit code {code}; its log: {self.log}\n{_tail(self.log)}")
        with contextlib.suppress(NoPeerHere):
            self.status = fetch_status(self.url, timeout_seconds=HTTP_SECONDS)

    def get(self, key: str, default: Any = None) -> Any:
        return default if self.status is None else self.status.get(key, default)

    @property
    def url(self) -> str:
        """Where its status and metrics are; empty as long as it is not up."""
        try:
            return str(json.loads((self.folder / "peer.json").read_text())["url"])
        except (OSError, ValueError, KeyError):
            return ""


class Demo:
    """One run of the demo. `console` is where people look."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, console: Console) -> None:
        self.arguments = arguments
        self.folder = folder
        self.console = console
        self.peers: list[Peer] = []
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:5.0f}s[/]  {text}")

    def start(self, name: str, command: Sequence[str]) -> Peer:
        """Start `shoal COMMAND` with its own data folder and log."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*shoal_command(), *command, "--host", LOOPBACK, "--data-dir", str(folder), "--log-format", "json"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=peer_environment(self.arguments.threads),
            )
        peer = Peer(name, process, folder, log)
        self.peers.append(peer)
        return peer

    def join(self, invite: str) -> list[Peer]:
        """Start all composers, each on its own shard of the text, and the workers. Returns the composers.

        With workers, composers own nothing: all routed experts are trained elsewhere, from sketches.
        """
        count, threads = self.arguments.composers, str(self.arguments.threads)
        owning = ["--own", "none"] if self.arguments.workers else []
        for i in range(self.arguments.workers):
            self.start(f"worker-{i}", ["join", invite, "--role", "worker", "--threads", threads])
        return [
            self.start(f"composer-{i}", ["join", invite, "--data-shard", f"{i}/{count}", "--threads", threads, *owning])
            for i in range(count)
        ]

    def wait(self, peers: Sequence[Peer], phases: frozenset[str], what: str, seconds: float) -> None:
        """Poll until every peer is in one of `phases`."""
        deadline = time.monotonic() + seconds
        while True:
            for peer in self.peers:
                peer.poll()
            if all(peer.get("phase") in phases for peer in peers):
                return
            if time.monotonic() > deadline:
                states = ", ".join(f"{p.name}: {p.get('phase', 'no answer')}" for p in peers)
                raise DemoFailed(f"{what} took over {seconds:.0f} s ({states}); logs are in {self.folder}")
            time.sleep(POLL_SECONDS)

    def table(self) -> Table:
        """The live table. It fits a terminal of 80 columns."""
        title = f"swarm {self.peers[0].get('run_id', '')}"
        table = Table(
            title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False
        )
        for column in ("peer", "phase", "owns", "step", "speed", "loss", "merges", "fidelity", "sent"):
            table.add_column(column, justify="left" if column in ("peer", "phase") else "right", no_wrap=True)
        for peer in self.peers:
            table.add_row(peer.name, *_cells(peer.status or {}))
        return table

    def run(self) -> None:
        """The whole story, told as it goes."""
        a = self.arguments
        self.say(f"founding a run: preset {a.preset}, {a.steps} steps a composer; everything is in {self.folder}")
        founder = self.start(
            "bootstrap",
            ["found", "--preset", a.preset, "--name", "demo", "--steps", str(a.steps),
             "--min-composers", str(a.composers)],
        )  # fmt: skip
        self.wait([founder], frozenset({"ready"}), "founding", START_SECONDS)
        invite = str(founder.get("invite"))
        self.say(f"invite: [bold]{invite}[/]")
        composers = self.join(invite)
        self.say(f"{a.composers} composers are joining, each with its own identity, ports, data and shard of the text")
        if a.workers:
            self.say(f"{a.workers} workers are joining: they own all routed experts, and never see text")
        self.wait(self.peers[1:], frozenset({"ready", "training", "finished"}), "joining", START_SECONDS)
        for peer in self.peers:
            self.say(f"{peer.name:<12} metrics {peer.url}/metrics   status {peer.url}/status")
        self.watch(composers)
        checkpoint = self.folder / "checkpoint"
        self.say("training is done: gathering the merged model (backbone, and every expert from its owner)")
        self.call("export", ["export", invite, str(checkpoint)])
        self.say("stopping the peers: each hands over what somebody can still take, checkpoints and exits")
        self.stop()
        self.say(f"the same {a.steps} steps by one lone composer with the full model, for comparison")
        self._report(checkpoint, self._lone(), composers)

    def watch(self, composers: Sequence[Peer]) -> None:
        """The live table, until everybody has finished and everything is merged; lines where there is no terminal."""
        next_line = time.monotonic()
        with Live(self.table(), console=self.console, refresh_per_second=4) as live:
            while any(peer.get("phase") != "finished" or _unmerged(peer) for peer in composers):
                for peer in self.peers:
                    peer.poll()
                live.update(self.table())
                if not self.console.is_terminal and time.monotonic() >= next_line:
                    next_line += LINE_SECONDS
                    self.say("   ".join(_progress(peer) for peer in composers))
                time.sleep(POLL_SECONDS)
        if not self.console.is_terminal:
            self.console.print()  # where there is one, the table has ended its line

    def call(self, name: str, command: Sequence[str]) -> None:
        """Run a `shoal` command to its end, with its own data folder."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            code = subprocess.run(
                [*shoal_command(), *command, "--data-dir", str(self.folder / name)],
                stdout=out, stderr=subprocess.STDOUT, env=peer_environment(self.arguments.threads), check=False,
            ).returncode  # fmt: skip
        if code:
            raise DemoFailed(f"`shoal {command[0]}` failed with exit code {code}\n{_tail(log)}")

    def _manifest(self) -> Path:
        from .run.kept_manifests import manifest_file

        founder = self.peers[0]
        return manifest_file(self.folder / founder.name, str(founder.get("run_id")))

    def _lone(self) -> dict[str, Any]:
        out = self.folder / "lone.json"
        log = self.folder / "lone.log"
        with log.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal.node.learning.lone", str(self._manifest()),
                 "--shard", f"0/{self.arguments.composers}", "--out", str(out)],
                stdout=err, stderr=subprocess.STDOUT, env=peer_environment(1),
            )  # fmt: skip
        try:
            with self.console.status("training the lone composer") as status:
                while process.poll() is None:
                    try:
                        progress = json.loads(out.with_suffix(".progress").read_text())
                        status.update(f"lone composer: step {progress['step']}, loss {progress['loss']:.3f}")
                    except (OSError, ValueError):
                        pass
                    time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise DemoFailed(f"the lone composer failed\n{_tail(log)}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    def _report(self, checkpoint: Path, lone: dict[str, Any], composers: Sequence[Peer]) -> None:
        from transformers.utils import logging as transformers_logging

        from .learning.evaluate import continuation, evaluate_checkpoint

        transformers_logging.disable_progress_bar()
        merged = evaluate_checkpoint(checkpoint)
        lone_bits = lone["nats_per_token"] / math.log(2)
        tokens = [int(p.get("tokens", 0)) for p in composers]
        table = Table(title="held-out text, bits per byte (lower is better)", title_justify="left")
        for column in ("model", "bits per byte", "tokens it trained on"):
            table.add_column(column, justify="left" if column == "model" else "right")
        table.add_row("merged swarm", f"[bold]{merged.bits_per_byte:.3f}[/]", f"{len(tokens)} x {max(tokens):,}")
        table.add_row("one lone composer", f"{lone_bits:.3f}", f"{lone['tokens']:,}")
        self.console.print(table)
        gain = 100 * (1 - merged.bits_per_byte / lone_bits)
        self.say(f"the swarm's model is {gain:.1f}% below the lone composer" if gain > 0 else
                 f"[red]the swarm's model is {-gain:.1f}% ABOVE the lone composer[/]")  # fmt: skip
        self.say(f"Hugging Face checkpoint: {checkpoint}; plain transformers continues {PROMPT!r} with:")
        self.console.print(continuation(checkpoint, PROMPT), markup=False, highlight=False, style="green")

    def stop(self) -> None:
        """SIGTERM to all, and wait; says who did not leave cleanly."""
        for peer in self.peers:
            if peer.process.poll() is None:
                peer.process.send_signal(signal.SIGTERM)
        for peer in self.peers:
            try:
                code = peer.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                peer.process.kill()
                code = peer.process.wait()
            if code:
                self.say(f"[red]{peer.name} ended with exit code {code}[/]; its log: {peer.log}")


def shoal_command() -> list[str]:
    """The node's command line, by the interpreter that runs this."""
    return [sys.executable, "-m", "shoal.node.cli"]


def peer_environment(threads: int) -> dict[str, str]:
    """The environment of a peer of the demo: few threads each, and no repository root on sys.path.

    None of the settings that the user's own peer takes from it: several cannot have one port.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {**others, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}


def _progress(peer: Peer) -> str:
    loss = peer.get("loss")
    shown = "" if loss is None else f" loss {loss:.3f}"
    return f"{peer.name}: {peer.get('phase')} step {peer.get('step', 0)}{shown}"


def _unmerged(peer: Peer) -> bool:
    return bool(peer.get("unmerged_steps", 0))


def _cells(status: dict[str, Any]) -> list[str]:
    """What the live table says of one peer."""
    learns = status.get("role") in ("composer", "worker")
    outer = status.get("outer") or {}
    merges = f"{(outer.get('rounds') or {}).get('committed', 0):.0f}"
    if last := outer.get("last"):
        merges += f" ({last['seconds_ago']:.0f}s)"
    fidelity = [v for v in (status.get("fidelity") or {}).values() if v is not None]
    owned = (status.get("slots") or {}).get("owned", [])
    return [
        str(status.get("phase", "starting")),
        f"{len(owned)}/{status['slots_total']}" if learns and status.get("slots_total") else "",
        f"{status.get('step', 0)}/{status.get('steps_total', 0)}" if learns else "",
        speed_text(status).replace("tokens", "tok") if learns else "",
        f"{status['loss']:.3f}" if status.get("loss") is not None else "",
        merges if status.get("role") == "composer" else "",
        f"{sum(fidelity) / len(fidelity):.3f}" if fidelity else "",
        _size(sum(item["bytes"] for item in status.get("bytes", []) if item["direction"] == "out")),
    ]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def main() -> None:
    """Run the demo; exit code 1 with the reason if any part of it fails."""
    parser = argparse.ArgumentParser(prog="./dev demo", description=__doc__)
    parser.add_argument("--composers", type=int, default=3)
    parser.add_argument(
        "--workers", type=int, default=0, help="peers without text that own all routed experts, in place of composers"
    )
    parser.add_argument("--steps", type=int, default=400, help="inner steps per composer")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per peer")
    parser.add_argument(
        "--dir", type=Path, default=None, help="where to put everything (default: a new folder in /tmp)"
    )
    arguments = parser.parse_args()
    if arguments.dir is not None and os.path.lexists(arguments.dir) and not _is_empty(arguments.dir):
        parser.error(f"--dir {arguments.dir} is no empty folder: name a new one")
    console = Console()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that it stops its peers then too
    folder: Path = arguments.dir or Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(arguments, folder, console)
    try:
        demo.run()
    except DemoFailed as error:
        console.print("[bold red]demo failed:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)  # the end of a log: brackets are no markup
        sys.exit(1)
    finally:
        demo.stop()


if __name__ == "__main__":
    main()
