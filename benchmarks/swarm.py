"""`./dev bench swarm`: the real node (processes, DHT, gossip, all-reduce on loopback) against the same learning alone.

Trains one run through real peers, then the centralized and the lone composer with the same model, text and schedule in
this process, and reports held-out loss, bytes by kind per token, where the wall time went, and memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from rich.console import Console

from ..node.demo import START_SECONDS, Demo, Peer
from ..node.learning.evaluate import evaluate_checkpoint
from ..node.run.kept_manifests import manifest_file
from ..node.run.manifest import verify
from .comparison import Comparison
from .results import Result, markdown

KINDS = {  # of messages, by what they are for
    "sketch-batch": "sketches",
    "gradient-sketch": "sketches",
    "delta-batch": "deltas",
    "outer": "rounds",
}


@dataclass(frozen=True)
class PeerCost:
    """What one composer or worker spent."""

    name: str
    bytes: list[dict[str, Any]]  # each with kind, direction and bytes, as counted
    bytes_out_per_token: dict[str, float]  # by kind; over a composer's own tokens, or those of all for a worker
    step_seconds: dict[str, float]  # by part, summed
    blocked_seconds: float  # the training loop waited for the network
    training_rss_bytes: int  # most resident memory of the training process; all of torch and transformers included
    children_rss_bytes: int  # of its DHT, p2pd, averager and transport processes
    rounds: dict[str, float]


def peak_rss(process: psutil.Process) -> int:
    """The most that it ever had; where the kernel does not tell (other than Linux), what it has now."""
    try:
        told = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return int(process.memory_info().rss)
    [most] = re.findall(r"^VmHWM:\s+(\d+) kB$", told, re.MULTILINE)
    return 1024 * int(most)


def total(costs: Sequence[PeerCost], direction: str) -> dict[str, float]:
    """Bytes of all peers by kind, by the names that `bench quality` has for them."""
    bytes_by_kind: Counter[str] = Counter()
    for each in itertools.chain.from_iterable(cost.bytes for cost in costs):
        if each["direction"] == direction:
            bytes_by_kind[KINDS.get(each["kind"], each["kind"])] += each["bytes"]
    return dict(bytes_by_kind)


def cost(peer: Peer, tokens: int) -> PeerCost:
    """Read off a running peer; its bytes are divided by `tokens`."""
    status: dict[str, Any] = peer.status or {}
    sent = {b["kind"]: b["bytes"] / tokens for b in status["bytes"] if b["direction"] == "out"}
    process = psutil.Process(peer.process.pid)
    return PeerCost(
        peer.name,
        status["bytes"],
        sent,
        {part: values["sum"] for part, values in status["step_seconds"].items()},
        status["blocked_seconds"],
        peak_rss(process),
        sum(child.memory_info().rss for child in process.children(recursive=True)),
        (status.get("outer") or {}).get("rounds", {}),
    )


def train(arguments: argparse.Namespace, folder: Path, console: Console) -> tuple[Result, list[PeerCost], Path]:
    """One run through real peers, from founding to the exported checkpoint's held-out loss."""
    demo = Demo(arguments, folder, console)
    try:
        found = ["found", "--preset", arguments.preset, "--name", "bench", "--steps", str(arguments.steps)]
        if arguments.seed is not None:
            found += ["--seed", str(arguments.seed)]
        for setting in arguments.set:
            found += ["--set", setting]
        founder = demo.start("bootstrap", [*found, "--min-composers", str(arguments.composers)])
        demo.wait([founder], frozenset({"ready"}), "founding", START_SECONDS)
        invite = str(founder.get("invite"))
        composers = demo.join(invite)
        demo.wait(composers, frozenset({"ready", "training", "finished"}), "joining", START_SECONDS)
        demo.watch(composers)
        tokens = [max(1, int(peer.get("tokens", 0))) for peer in composers]
        costs = [cost(peer, trained) for peer, trained in zip(composers, tokens, strict=True)]
        costs += [cost(peer, sum(tokens)) for peer in demo.peers if peer.get("role") == "worker"]
        demo.call("export", ["export", invite, str(folder / "checkpoint")])
    finally:
        demo.stop()
    signed = manifest_file(folder / "bootstrap", str(founder.get("run_id")))
    context = verify(signed.read_bytes()).data.context_length
    evaluation = evaluate_checkpoint(folder / "checkpoint", windows=arguments.windows, context_length=context)
    steps = [sum(each.step_seconds.values()) for each in costs[: len(tokens)]]
    result = Result(
        method="shoal, real node",
        loss=evaluation.nats_per_token,
        seconds=max(steps),
        tokens=sum(tokens),
        up=total(costs, "out"),
        down=total(costs, "in"),
        resident_bytes=max(each.training_rss_bytes for each in costs),
        blocked_share=sum(each.blocked_seconds for each in costs[: len(tokens)]) / sum(steps),
    )
    return result, costs, signed


def report(costs: list[PeerCost]) -> str:
    """Costs per peer as Markdown."""
    kinds = sorted({kind for c in costs for kind in c.bytes_out_per_token})
    lines = [
        "| peer | " + " | ".join(f"{kind} B/token" for kind in kinds) + " | forward, backward s | optimizer s | "
        "exchange s | blocked s | training MB | children MB | rounds |",
        "|---" * (len(kinds) + 8) + "|",
    ]
    for c in costs:
        sent = " | ".join(f"{c.bytes_out_per_token.get(kind, 0.0):.2f}" for kind in kinds)
        parts = " | ".join(f"{c.step_seconds[part]:.1f}" for part in ("forward_backward", "optimizer", "exchange"))
        rounds = ", ".join(f"{outcome} {count:.0f}" for outcome, count in c.rounds.items())
        lines.append(
            f"| {c.name} | {sent} | {parts} | {c.blocked_seconds:.1f} | {c.training_rss_bytes / 1e6:.0f} | "
            f"{c.children_rss_bytes / 1e6:.0f} | {rounds} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all three and print the tables."""
    parser = argparse.ArgumentParser(prog="./dev bench swarm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--composers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="own all routed experts in place of composers")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per peer")
    parser.add_argument(
        "--seed", type=Path, default=None, help="folder of a checkpoint to go on from, as `found` takes it"
    )
    parser.add_argument(
        "--baselines", default=None, help="comma-separated methods of `bench quality`; none from a seed"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for swarm.md and swarm.json")
    arguments = parser.parse_args()
    if arguments.seed is not None and arguments.baselines:
        parser.error("baselines begin with nothing: take them or --seed")
    if arguments.baselines is None:
        arguments.baselines = "" if arguments.seed else "centralized,lone"
    torch.set_num_threads(arguments.threads)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        result, costs, signed = train(arguments, Path(name), console)
        manifest = verify(signed.read_bytes())
    comparison = Comparison(msgspec.structs.replace(manifest, name="bench"), arguments.composers, arguments.windows)
    results = []
    for method in filter(None, arguments.baselines.split(",")):
        results.append(comparison.run(method, lambda step, loss: None))
        console.print(f"{method}: {results[-1].loss:.4f} nats/byte in {results[-1].seconds:.0f} s")
    results.append(result)
    text = markdown(results) + "\n\n" + report(costs)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "swarm.md").write_text(text + "\n")
        told = {"results": [asdict(r) for r in results], "peers": [asdict(c) for c in costs]}
        (arguments.out / "swarm.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
