"""`./dev bench start`: how long people wait for a peer, and what for.

Three tables: seconds to the command line's help; what importing costs each kind of process; and for a founder, a
composer and a worker on loopback the time from the command to being ready, by what the peer says that it is doing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
from rich.console import Console

from ..node.demo import START_SECONDS, Demo, DemoFailed, Peer, peer_environment, shoal_command
from ..node.watching.state import IN_THE_RUN

POLL_SECONDS = 0.02
NOTHING_YET = "interpreter and imports"  # nobody answers until then
MODEL = "shoal.node.model.families import load_families; load_families()"
WITHOUT = "from shoal.protocol.imports import importing\nwith importing()"  # the collector, as peers do it
KINDS = {  # what each imports until it is ready; forked processes have their parent's
    "bootstrap, observer": f"{WITHOUT}: import shoal.node.peer.peer",
    "composer": f"{WITHOUT}: import shoal.node.peer.peer, shoal.node.peer.composing\nfrom {MODEL}",
    "worker": f"{WITHOUT}: import shoal.node.peer.peer, shoal.node.peer.working",
    "transport": "import shoal.protocol.transport.host",
    "island's nursery": "from shoal.node.island.nursery import load; load()",
    "torch alone": "import torch",
}


@dataclass(frozen=True)
class Imports:
    """One kind of process, medians."""

    kind: str
    seconds: float
    cpu_seconds: float
    resident_bytes: int  # when all is imported
    modules: int


@dataclass(frozen=True)
class Start:
    """One peer's way from its command to being ready."""

    role: str
    parts: dict[str, float]  # seconds by what the peer said, in order
    cpu_seconds: float  # of it and its children, until then


def timed(command: Sequence[str]) -> tuple[float, float, str]:
    """Seconds, CPU seconds, and output of a command that must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=peer_environment(1))
    assert process.stdout is not None
    with process.stdout as stdout:
        told = stdout.read()
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, told)
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, told


def help_seconds(rounds: int) -> float:
    """Median time of `shoal --help`."""
    return statistics.median(timed([*shoal_command(), "--help"])[0] for _ in range(rounds))


def imports(kind: str, rounds: int) -> Imports:
    """What a process of this kind imports."""
    # Not the peak that `wait4` tells: a child begins with what its parent had at the fork.
    code = f"{KINDS[kind]}; import sys, psutil; print(psutil.Process().memory_info().rss, len(sys.modules))"
    runs = [timed([sys.executable, "-c", code]) for _ in range(rounds)]
    seconds, cpu = (statistics.median(times) for times in zip(*(run[:2] for run in runs), strict=True))
    resident, modules = (int(number) for number in runs[0][2].split()[-2:])
    return Imports(kind, seconds, cpu, resident, modules)


def until_ready(role: str, peer: Peer, began: float) -> Start:
    """Watch a peer that was started at `began` (monotonic seconds). DemoFailed if it is not ready in time."""
    parts: dict[str, float] = {}
    now, doing = began, NOTHING_YET
    while True:
        time.sleep(POLL_SECONDS)
        peer.poll()
        now, before = time.monotonic(), now
        parts[doing] = parts.get(doing, 0.0) + now - before
        phase = peer.get("phase")
        if phase in IN_THE_RUN:
            return Start(role, parts, cpu_seconds(peer.process.pid))
        if now - began > START_SECONDS:
            raise DemoFailed(f"the {role} was not ready within {START_SECONDS:.0f} s: {doing}")
        if phase is not None:
            detail = peer.get("phase_detail")
            doing = f"{phase}: {detail}" if detail else str(phase)


def cpu_seconds(pid: int) -> float:
    """Of a process and all that descends from it, as far as they live."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def starts(preset: str, folder: Path, console: Console) -> list[Start]:
    """A founder, then a composer, then a worker, each on a machine that does nothing else by then."""
    demo = Demo(SimpleNamespace(threads=1), folder, console)  # type: ignore[arg-type]
    try:
        began = time.monotonic()
        # No step is taken: others' learning would be in the way.
        founder = demo.start("bootstrap", ["found", "--preset", preset, "--min-composers", "2"])
        found = [until_ready("found, bootstrap", founder, began)]
        invite = str(founder.get("invite"))
        for role in ("composer", "worker"):
            began = time.monotonic()
            peer = demo.start(role, ["join", invite, "--role", role, "--threads", "1"])
            found.append(until_ready(f"join, {role}", peer, began))
        return found
    finally:
        demo.stop()


def markdown(help_: float, imported: Sequence[Imports], started: Sequence[Start]) -> str:
    """All three tables."""
    lines = [
        f"`shoal --help`: {help_:.2f} s",
        "",
        "| process | imports, s | CPU s | MB | modules |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {i.kind} | {i.seconds:.2f} | {i.cpu_seconds:.2f} | {i.resident_bytes / 1e6:.0f} | {i.modules:,} |"
        for i in imported
    ]
    parts = list(dict.fromkeys(part for start in started for part in start.parts))
    lines += [
        "",
        "| seconds | " + " | ".join(start.role for start in started) + " |",
        "|---" * (len(started) + 1) + "|",
    ]
    for part in parts:
        cells = (f"{start.parts[part]:.2f}" if part in start.parts else "" for start in started)
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| **ready after** | " + " | ".join(f"{sum(s.parts.values()):.2f}" for s in started) + " |")
    lines.append("| CPU seconds, all processes | " + " | ".join(f"{s.cpu_seconds:.2f}" for s in started) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(prog="./dev bench start", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=3, help="of help and imports; medians are shown")
    parser.add_argument("--out", type=Path, default=None, help="folder for start.md and start.json")
    arguments = parser.parse_args()
    help_ = help_seconds(arguments.rounds)
    imported = [imports(kind, arguments.rounds) for kind in KINDS]
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        started = starts(arguments.preset, Path(folder), Console(stderr=True))
    print(markdown(help_, imported, started))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "start.md").write_text(markdown(help_, imported, started) + "\n")
        told = {"help_seconds": help_, "imports": [asdict(i) for i in imported], "starts": [asdict(s) for s in started]}
        (arguments.out / "start.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
