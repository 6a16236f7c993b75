"""`./dev bench granularity`: what thousands of small experts cost a swarm of real peers, beside few of the same size.

For each number of experts one run: a bootstrap peer and `--composers` composers of the real node on loopback, each with
its share of the slots. Experts have the same small size in all runs, so the model grows with their number; each token
takes eight. From when every slot has an owner and everybody trains, each is watched for `--seconds`.

    ready      seconds from the first `join` until every slot has an owner and all train
    daemon     bytes a second that a composer's DHT daemon reads and writes: directory, leases, votes, and rounds
    deltas     bytes a second that a composer sends for stand-ins of its own experts, gossip's copies included
    blocked    share of the time that training waits for the network

Writes a Markdown table and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from ..node.demo import START_SECONDS, Demo, Peer
from ..node.model.presets import preset

TOP_K, WIDTH, LAYERS = 8, 16, 2


@dataclass(frozen=True)
class Outcome:
    """Of one number of experts; means over composers, bytes a second."""

    experts: int
    ready_seconds: float
    step_seconds: float
    blocked: float
    daemon: float
    sent: dict[str, float]  # by kind
    training_rss: float
    slots_lost: int
    refusals: int
    owners_seen: int  # of slots, at the end
    loss_before: float
    loss_after: float


def config_of(experts: int) -> dict[str, Any]:
    """The preset `tiny`, cut finer: two layers of so many experts."""
    return preset("tiny").model.config | {
        "num_experts": experts,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
    }


def owned(composers: Sequence[Peer]) -> list[int]:
    """Slots by their owners' own word, once for each owner."""
    return [slot for peer in composers for slot in (peer.get("slots") or {}).get("owned", [])]


def sent_by(peer: Peer) -> dict[str, float]:
    """Bytes sent so far, by kind."""
    found: dict[str, float] = {}
    for entry in peer.get("bytes", []):
        if entry["direction"] == "out":
            found[entry["kind"]] = found.get(entry["kind"], 0) + entry["bytes"]
    return found


def daemon_bytes(peer: Peer) -> int:
    """What its p2pd has read and written, sockets and files alike."""
    for child in psutil.Process(peer.process.pid).children(recursive=True):
        if "/p2pd " in " ".join(child.cmdline()):
            counters = child.io_counters()
            return int(counters.read_chars + counters.write_chars)
    raise RuntimeError(f"{peer.name} has no DHT daemon")


def run(experts: int, arguments: argparse.Namespace, folder: Path, console: Console) -> Outcome:
    """One run, started, watched and stopped."""
    (folder / "config.json").write_text(json.dumps(config_of(experts)))
    demo = Demo(arguments, folder, console)
    try:
        command = ["found", "--model", str(folder / "config.json"), "--steps", "100000", "--name", f"e{experts}"]
        command += ["--min-composers", str(arguments.composers)]
        founder = demo.start("bootstrap", [*command, *(part for each in arguments.set for part in ("--set", each))])
        demo.wait([founder], frozenset({"ready"}), "founding", START_SECONDS)
        began = time.monotonic()
        composers = demo.join(str(founder.get("invite")))
        while True:
            demo.wait(composers, frozenset({"training"}), "joining", arguments.start_seconds)
            if sorted(owned(composers)) == list(range(experts)):
                break
            if time.monotonic() - began > arguments.start_seconds:
                raise SystemExit(f"{len(set(owned(composers)))} of {experts} slots have owners; logs are in {folder}")
            time.sleep(0.5)
        ready = time.monotonic() - began
        time.sleep(arguments.settle)
        demo.wait(composers, frozenset({"training"}), "training", 60)
        first = [
            (p.get("step"), p.get("blocked_seconds"), sent_by(p), daemon_bytes(p), p.get("loss")) for p in composers
        ]
        began = time.monotonic()
        time.sleep(arguments.seconds)
        demo.wait(composers, frozenset({"training"}), "training", 60)
        seconds = time.monotonic() - began
        sent: dict[str, float] = {}
        for peer, (_, _, before, _, _) in zip(composers, first, strict=True):
            for kind, total in sent_by(peer).items():
                sent[kind] = sent.get(kind, 0) + (total - before.get(kind, 0)) / seconds / len(composers)
        pairs = list(zip(composers, first, strict=True))
        return Outcome(
            experts,
            ready,
            statistics.mean(seconds / max(1, p.get("step") - step) for p, (step, *_) in pairs),
            statistics.mean((p.get("blocked_seconds") - blocked) / seconds for p, (_, blocked, *_) in pairs),
            statistics.mean((daemon_bytes(p) - io) / seconds for p, (_, _, _, io, _) in pairs),
            sent,
            statistics.mean(psutil.Process(p.process.pid).memory_info().rss for p in composers),
            int(sum((p.get("slots") or {}).get("lost", 0) for p in composers)),
            int(sum(sum((p.get("refusals") or {}).values()) for p in composers)),
            len(owned(composers)),
            statistics.mean(loss or 0.0 for _, (*_, loss) in pairs),
            statistics.mean(p.get("loss") or 0.0 for p in composers),
        )
    finally:
        demo.stop()


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One line a number of experts."""
    lines = [
        "| experts | ready, s | a step, s | blocked | daemon, kB/s | deltas, kB/s | sketches, kB/s | process, MB "
        "| slots lost | refusals | loss |",
        "|---" * 11 + "|",
    ]
    lines += [
        f"| {one.experts} | {one.ready_seconds:.0f} | {one.step_seconds:.2f} | {one.blocked:.1%} "
        f"| {one.daemon / 1e3:.1f} | {one.sent.get('delta-batch', 0) / 1e3:.1f} "
        f"| {one.sent.get('sketch-batch', 0) / 1e3:.1f} | {one.training_rss / 1e6:.0f} | {one.slots_lost} "
        f"| {one.refusals} | {one.loss_before:.2f}, {one.loss_after:.2f} |"
        for one in outcomes
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench granularity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="64,256,1024,2048", help="comma-separated; one run each")
    parser.add_argument("--composers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="to watch each run")
    parser.add_argument("--settle", type=float, default=15, help="seconds before that")
    parser.add_argument("--start-seconds", type=float, default=300, help="for all to train, and own all slots")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per peer")
    parser.add_argument("--out", type=Path, default=None, help="folder for granularity.md and granularity.json")
    arguments = parser.parse_args()
    arguments.workers = 0
    outcomes: list[Outcome] = []
    console = Console()
    for experts in map(int, arguments.experts.split(",")):
        with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
            outcomes.append(run(experts, arguments, Path(name), console))
        print(markdown(outcomes[-1:]), flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "granularity.md").write_text(markdown(outcomes) + "\n")
            (arguments.out / "granularity.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    print(markdown(outcomes))


if __name__ == "__main__":
    main()
