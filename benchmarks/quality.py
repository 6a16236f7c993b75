"""`./dev bench quality`: the same model on the same tokens, trained in several ways, side by side.

    centralized   one process, the joint batch of all composers
    lone          one composer, its own share of the tokens
    diloco        full replicas, everything averaged every H steps
    shoal-lowbit  experts split among composers, 4-bit stand-ins      (in one process, the node's own code)
    shoal-narrow  experts split among composers, narrow stand-ins     (in one process, the node's own code)

Writes a Markdown table and JSON. `./dev bench swarm` runs the comparison through real processes and a real network.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from ..node.composer import Composer
from ..node.data import Batches, load_corpus
from ..node.evaluate import HELDOUT_SEED, heldout_loss
from ..node.manifest import Manifest
from ..node.model.presets import preset
from .inprocess import InProcessSwarm

METHODS = ("centralized", "lone", "diloco", "shoal-lowbit", "shoal-narrow")


@dataclass(frozen=True)
class Result:
    """One method's outcome; loss in nats per byte on held-out text."""

    method: str
    loss: float
    seconds: float
    delta_bytes: int = 0
    outer_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2)


class Comparison:
    """All methods share model, seeds, data, schedule and evaluation."""

    def __init__(self, manifest: Manifest, composers: int, windows: int) -> None:
        self.manifest = manifest
        self.num_composers = composers
        corpus = load_corpus(manifest.data.corpus)
        self.heldout = corpus.heldout(windows, manifest.data.context_length, seed=HELDOUT_SEED)
        self._shards = [corpus.shard(i, composers) for i in range(composers)]
        self.num_slots = Composer(manifest, owned=(), next_batch=lambda: torch.empty(0)).num_slots

    def batches(self, index: int) -> Batches:
        """Composer `index`'s batches, from the start."""
        train = self.manifest.train
        return Batches(self._shards[index], train.batch_size, self.manifest.data.context_length, seed=index)

    def run(self, method: str, report: Callable[[int, float], None]) -> Result:
        """Train with one method and evaluate; `report(step, loss)` after every step."""
        began = time.monotonic()
        everything = list(range(self.num_slots))
        if method in ("centralized", "lone"):
            sources = [self.batches(i) for i in range(self.num_composers if method == "centralized" else 1)]
            composer = Composer(
                self.manifest, owned=everything, next_batch=lambda: torch.cat([s.next() for s in sources])
            )
            for step in range(1, self.manifest.train.steps + 1):
                report(step, composer.train_step().loss)
            loss = heldout_loss(composer.model, self.heldout)
            return Result(method, loss, time.monotonic() - began)
        manifest = self.manifest
        if method == "diloco":
            owned = [everything] * self.num_composers
        else:
            owned = [everything[i :: self.num_composers] for i in range(self.num_composers)]
            standin = msgspec.structs.replace(manifest.standin, kind=method.removeprefix("shoal-"))
            manifest = msgspec.structs.replace(manifest, standin=standin)
        swarm = InProcessSwarm(manifest, [self.batches(i).next for i in range(self.num_composers)], owned)
        for step, mean_loss in enumerate(swarm.run(manifest.train.steps), start=1):
            report(step, mean_loss)
        merged = swarm.composers[0] if method == "diloco" else swarm.merged()
        loss = heldout_loss(merged.model, self.heldout)
        return Result(method, loss, time.monotonic() - began, swarm.bytes.deltas, swarm.bytes.outer)


def markdown(results: list[Result], *, tokens: int) -> str:
    """The table, with each method's gap to the first one."""
    base = results[0]
    lines = [
        f"| method | nats/byte | bits/byte | vs {base.method} | delta bytes/token | outer bytes/token | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        gap = 100 * (r.loss / base.loss - 1)
        lines.append(
            f"| {r.method} | {r.loss:.4f} | {r.bits_per_byte:.4f} | {gap:+.1f}% | {r.delta_bytes / tokens:.1f} | "
            f"{r.outer_bytes / tokens:.1f} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train with every method named, print and write the table."""
    parser = argparse.ArgumentParser(prog="./dev bench quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the first is the reference")
    parser.add_argument("--composers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--preset", default="bench", help="gives everything that is not said here")
    parser.add_argument("--every", type=int, help="H: inner steps between merges of a fragment")
    parser.add_argument("--publish-every", type=int, help="inner steps between deltas of a stand-in")
    parser.add_argument("--width", type=float, help="narrow stand-ins: width over the expert's")
    parser.add_argument("--refit-steps", type=int, help="narrow stand-ins: optimizer steps before each delta")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for quality.md and quality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = preset(arguments.preset)
    outer, standin = chosen.outer, chosen.standin
    manifest = Manifest(
        name="bench",
        founder="none",
        created_at=0,
        model=chosen.model,
        data=chosen.data,
        train=msgspec.structs.replace(chosen.train, steps=arguments.steps),
        outer=msgspec.structs.replace(outer, every_steps=arguments.every or outer.every_steps, fragments=1),
        standin=msgspec.structs.replace(
            standin,
            publish_every=arguments.publish_every or standin.publish_every,
            width_fraction=arguments.width or standin.width_fraction,
            refit_steps=arguments.refit_steps or standin.refit_steps,
        ),
    )
    comparison = Comparison(manifest, arguments.composers, arguments.windows)
    train = manifest.train
    tokens = arguments.composers * train.steps * train.batch_size * manifest.data.context_length
    results: list[Result] = []
    for method in arguments.methods.split(","):
        if method not in METHODS:
            parser.error(f"unknown method {method!r}: one of {', '.join(METHODS)}")

        def report(step: int, loss: float, method: str = method) -> None:
            if step % 100 == 0:
                print(f"{method}: step {step}, loss {loss:.4f}", flush=True)

        results.append(comparison.run(method, report))
        print(f"{method}: held-out {results[-1].loss:.4f} nats/byte in {results[-1].seconds:.0f} s", flush=True)
        if arguments.out is not None:  # after every method: what took minutes must not die with the next one
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "quality.md").write_text(markdown(results, tokens=tokens) + "\n")
            (arguments.out / "quality.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
    print(markdown(results, tokens=tokens))


if __name__ == "__main__":
    main()
