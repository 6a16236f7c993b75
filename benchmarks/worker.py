"""`./dev bench worker`: how soon a worker is useful, what that costs, and what it then does, by format of the weights.

Per format one run of real processes on loopback: a founder, a composer that owns nothing, and a worker that comes once
the composer is there. Seconds count from the start of the worker's process, Python's imports included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from rich.console import Console

from ..node.demo import POLL_SECONDS, START_SECONDS, Demo, DemoFailed, Peer
from ..node.model.init import expert_shape
from ..node.run.kept_manifests import manifest_file
from ..node.run.manifest import verify

TERNARY = ("train.expert_weights=ternary", "standin.kind=ternary")
FORMATS: dict[str, tuple[str, ...]] = {
    "full": (),
    "bfloat16": ("ownership.snapshot_format=bfloat16",),
    "int8": ("ownership.snapshot_format=int8",),
    "nf4": ("ownership.snapshot_format=nf4",),
    "standin (4-bit)": ("ownership.snapshot_format=standin",),
    "ternary": (*TERNARY, "ownership.snapshot_format=ternary"),
    "standin (ternary)": (*TERNARY, "ownership.snapshot_format=standin"),
}
SLOT_KINDS = ("rebuilt", "snapshot", "handover")


@dataclass(frozen=True)
class WorkerCost:
    """One worker's start, and what it does once it works. `sync` is from joining until all slots are its own."""

    format: str
    useful_seconds: float
    sync_seconds: float
    sync_bytes: int
    bytes_per_weight: float
    rows_per_second: float
    rss_bytes: int  # resident memory of the training process


def measure(name: str, preset: str, seconds: float, folder: Path, console: Console) -> WorkerCost:
    """Start the run, then the worker, and look at it for `seconds` of work. Raises DemoFailed."""
    demo = Demo(SimpleNamespace(threads=1), folder, console)  # type: ignore[arg-type]
    settings = [part for setting in FORMATS[name] for part in ("--set", setting)]
    try:
        founder = demo.start("bootstrap", ["found", "--preset", preset, "--steps", "1000000", *settings])
        demo.wait([founder], frozenset({"ready"}), "founding", START_SECONDS)
        invite = str(founder.get("invite"))
        composer = demo.start("composer", ["join", invite, "--own", "none", "--threads", "1"])
        demo.wait([composer], frozenset({"ready", "training"}), "joining", START_SECONDS)
        worker = demo.start("worker", ["join", invite, "--role", "worker", "--threads", "1"])
        demo.wait([worker], frozenset({"training"}), "the worker's start", START_SECONDS)
        said = _events(worker)
        manifest = verify(manifest_file(folder / "bootstrap", str(founder.get("run_id"))).read_bytes())
        shape = expert_shape(manifest.model)
        _until(demo, lambda: len(worker.get("slots", {}).get("owned", [])) == shape.num_experts, "all slots")
        began, rows = time.monotonic(), _rows_in(worker)
        _until(demo, lambda: time.monotonic() - began > seconds, "the measurement")
        elapsed = time.monotonic() - began
        fetched = sum(
            item["bytes"] for item in worker.get("bytes") if item["direction"] == "in" and item["kind"] in SLOT_KINDS
        )
        weights = 3 * shape.hidden * shape.width * shape.num_layers * shape.num_experts
        return WorkerCost(
            name,
            said["worker.useful"][0]["seconds_since_start"],
            _seconds(said["worker.capacity"][0], _events(worker)["slot.owned"][-1]),
            int(fetched),
            fetched / weights,
            (_rows_in(worker) - rows) / elapsed,
            psutil.Process(worker.process.pid).memory_info().rss,
        )
    finally:
        demo.stop()


def _until(demo: Demo, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{what} took over {START_SECONDS:.0f} s")
        for peer in demo.peers:
            peer.poll()
        time.sleep(POLL_SECONDS)


def _rows_in(worker: Peer) -> float:
    worker.poll()
    return float(worker.get("sketch_rows", {}).get("in", 0.0))


def _events(peer: Peer) -> dict[str, list[dict[str, Any]]]:
    """Its log lines by event."""
    events: dict[str, list[dict[str, Any]]] = {}
    for line in peer.log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            told = json.loads(line)
            events.setdefault(str(told["event"]), []).append(told)
    return events


def _seconds(first: dict[str, Any], last: dict[str, Any]) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(last["time"]) - datetime.fromisoformat(first["time"])).total_seconds()


def markdown(costs: list[WorkerCost]) -> str:
    """The table."""
    lines = [
        "| format | first useful sketch, s | all slots fetched, s | MB fetched | bytes a weight | rows/s | RSS, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.format} | {c.useful_seconds:.1f} | {c.sync_seconds:.1f} | {c.sync_bytes / 1e6:.2f} | "
        f"{c.bytes_per_weight:.3f} | {c.rows_per_second:,.0f} | {c.rss_bytes / 1e6:.0f} |"
        for c in costs
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every format named, print and write the table."""
    parser = argparse.ArgumentParser(prog="./dev bench worker", description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seconds", type=float, default=15.0, help="of work to look at, per format")
    parser.add_argument("--out", type=Path, default=None, help="folder for worker.md and worker.json")
    arguments = parser.parse_args()
    console = Console()
    costs = []
    for name in arguments.formats.split(","):
        if name not in FORMATS:
            parser.error(f"unknown format {name!r}: one of {', '.join(FORMATS)}")
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
            costs.append(measure(name, arguments.preset, arguments.seconds, Path(folder), console))
        console.print(f"{name}: useful after {costs[-1].useful_seconds:.1f} s")
    print(markdown(costs))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "worker.md").write_text(markdown(costs) + "\n")
        (arguments.out / "worker.json").write_text(json.dumps([asdict(c) for c in costs], indent=1))


if __name__ == "__main__":
    main()
