"""`./dev bench quality`: the same model on the same tokens, trained in several ways, side by side.

    centralized        one process, the joint batch of all composers
    lone               one composer, its own share of the tokens
    diloco             full replicas, everything averaged every H steps
    shoal-KIND         experts split among composers, stand-ins of that kind    (in one process, the node's own code)
    extreme-KIND       experts split among workers; composers own none          (the same)

KIND is lowbit, narrow or ternary; ternary trains experts ternary too, whose copies are then exact. `+rows` or
`+gradient` after it sends sketches to owners, without it there are none. Facts of the manifest that differ for one
method alone stand behind it: `shoal-narrow+rows:sketch.kappa=0:sketch.codec=float16`.

Writes a Markdown table and JSON. `./dev bench swarm` runs the comparison through real processes and a real network.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from ..kernels.standin import KINDS
from ..node.composer import Composer
from ..node.data import Batches, load_corpus
from ..node.evaluate import HELDOUT_SEED, heldout_loss
from ..node.manifest import Manifest, ManifestError, with_settings
from ..node.model.presets import preset
from .inprocess import InProcessSwarm
from .seeding import Seed

METHODS = ("centralized", "lone", "diloco", "shoal-lowbit", "shoal-lowbit+rows", "shoal-narrow", "shoal-narrow+rows")
_METHOD = re.compile(
    rf"(?P<plain>centralized|lone|diloco)|(?P<who>shoal|extreme)-(?P<kind>{'|'.join(KINDS)})(\+(?P<sketch>rows|gradient))?"
)
NO_TOKENS = torch.empty(0)


@dataclass(frozen=True)
class Result:
    """One method's outcome; loss in nats per byte on held-out text."""

    method: str
    loss: float
    seconds: float
    delta_bytes: int = 0
    outer_bytes: int = 0
    sketch_bytes: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2)


@dataclass(frozen=True)
class Method:
    """One way of training."""

    name: str
    plain: str | None  # centralized, lone, diloco; None for a swarm of owners
    extreme: bool
    manifest: Manifest

    @classmethod
    def parse(cls, text: str, manifest: Manifest) -> Method:
        """Raises ValueError: no such method; ManifestError: a setting that is not possible."""
        name, *settings = text.split(":")
        found = _METHOD.fullmatch(name)
        if found is None:
            raise ValueError(f"no method {name!r}: centralized, lone, diloco, shoal-KIND or extreme-KIND, see --help")
        if found["kind"] is not None:
            own = [f"standin.kind={found['kind']}", f"sketch.kind={found['sketch'] or 'none'}"]
            if found["kind"] == "ternary":
                own.append("train.expert_weights=ternary")
            settings = own + settings
        return cls(text, found["plain"], found["who"] == "extreme", with_settings(manifest, settings))


class Comparison:
    """All methods share model, seeds, data, schedule and evaluation.

    Args:
        windows: held-out windows.
        workers: that share the experts where composers own none.
        flippers: composers that send the opposite of what they learned.
        late: steps that sketches and deltas are under way.
        seed_steps: centralized steps before anybody starts. `manifest.train.steps` has them too; optimizers start anew.
    """

    def __init__(
        self,
        manifest: Manifest,
        composers: int,
        windows: int,
        *,
        workers: int = 2,
        seed_steps: int = 0,
        flippers: int = 0,
        late: int = 0,
    ) -> None:
        self.manifest, self.flippers, self.late = manifest, flippers, late
        self.num_composers, self.num_workers = composers, workers
        self.seed_steps = seed_steps
        corpus = load_corpus(manifest.data.corpus)
        self.heldout = corpus.heldout(windows, manifest.data.context_length, seed=HELDOUT_SEED)
        self._shards = [corpus.shard(i, composers) for i in range(composers)]
        self.num_slots = Composer(manifest, owned=(), next_batch=lambda: NO_TOKENS).num_slots
        self._seed: Seed | None = None

    @property
    def steps(self) -> int:
        """Of each method."""
        return self.manifest.train.steps - self.seed_steps

    @property
    def tokens(self) -> int:
        """That all composers of a method train on together."""
        batch = self.manifest.train.batch_size * self.manifest.data.context_length
        return self.num_composers * self.steps * batch

    def batches(self, index: int, start: int) -> Batches:
        """Composer `index`'s batches from number `start` on."""
        train = self.manifest.train
        batches = Batches(self._shards[index], train.batch_size, self.manifest.data.context_length, seed=index)
        batches.position = start
        return batches

    def _alone(self, manifest: Manifest, shards: int, *, seed: Seed | None) -> Composer:
        """A composer that owns everything and reads the first `shards` composers' batches."""
        everything = range(self.num_slots)
        start = 0 if seed is None else seed.step
        sources = [self.batches(i, start) for i in range(shards)]
        composer = Composer(
            manifest,
            owned=everything if seed is None else (),
            next_batch=lambda: torch.cat([source.next() for source in sources]),
        )
        if seed is not None:
            seed.start(composer, everything)
        return composer

    def seed(self, report: Callable[[int, float], None]) -> Seed | None:
        """The common start, trained once."""
        if self.seed_steps and self._seed is None:
            composer = self._alone(self.manifest, self.num_composers, seed=None)
            for step in range(1, self.seed_steps + 1):
                report(step, composer.train_step().loss)
            self._seed = Seed.of(composer)
        return self._seed

    def run(self, text: str, report: Callable[[int, float], None]) -> Result:
        """Train with one method and evaluate; `report(step, loss)` after every step."""
        method = Method.parse(text, self.manifest)
        seed = self.seed(report)
        began = time.monotonic()
        if method.plain in ("centralized", "lone"):
            shards = self.num_composers if method.plain == "centralized" else 1
            composer = self._alone(method.manifest, shards, seed=seed)
            for step in range(1, self.steps + 1):
                report(step, composer.train_step().loss)
            return Result(text, heldout_loss(composer.model, self.heldout), time.monotonic() - began)
        swarm = self._swarm(method, seed)
        for step, mean_loss in enumerate(swarm.run(self.steps), start=1):
            report(step, mean_loss)
        merged = swarm.composers[0] if swarm.replicas else swarm.merged()
        loss = heldout_loss(merged.model, self.heldout)
        sent = swarm.bytes
        return Result(text, loss, time.monotonic() - began, sent.deltas, sent.outer, sent.sketches)

    def _swarm(self, method: Method, seed: Seed | None) -> InProcessSwarm:
        everything = list(range(self.num_slots))
        workers: list[list[int]] = []
        if method.plain == "diloco":
            owned = [everything] * self.num_composers
        elif method.extreme:
            owned = [[]] * self.num_composers
            workers = [everything[i :: self.num_workers] for i in range(self.num_workers)]
        else:
            owned = [everything[i :: self.num_composers] for i in range(self.num_composers)]
        start = 0 if seed is None else seed.step
        sources = [self.batches(i, start).next for i in range(self.num_composers)]
        faults = {"flippers": self.flippers, "late": self.late}
        return InProcessSwarm(method.manifest, sources, owned, workers=workers, seed=seed, **faults)


def markdown(results: list[Result], *, tokens: int) -> str:
    """The table, with each method's gap to the first one."""
    base = results[0]
    lines = [
        f"| method | nats/byte | bits/byte | vs {base.method} | sketch bytes/token | delta bytes/token | "
        "outer bytes/token | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        gap = 100 * (r.loss / base.loss - 1)
        lines.append(
            f"| {r.method} | {r.loss:.4f} | {r.bits_per_byte:.4f} | {gap:+.1f}% | {r.sketch_bytes / tokens:.1f} | "
            f"{r.delta_bytes / tokens:.1f} | {r.outer_bytes / tokens:.1f} | {r.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train with every method named, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the first is the reference")
    parser.add_argument("--composers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="owners of all experts in extreme-KIND")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed-steps", type=int, default=0, help="centralized steps that everybody starts from")
    parser.add_argument("--flippers", type=int, default=0, help="composers that send the opposite of what they learned")
    parser.add_argument("--late", type=int, default=0, help="steps that sketches and deltas are under way")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
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
        train=msgspec.structs.replace(chosen.train, steps=arguments.seed_steps + arguments.steps),
        outer=msgspec.structs.replace(outer, every_steps=arguments.every or outer.every_steps, fragments=1),
        standin=msgspec.structs.replace(
            standin,
            publish_every=arguments.publish_every or standin.publish_every,
            width_fraction=arguments.width or standin.width_fraction,
            refit_steps=arguments.refit_steps or standin.refit_steps,
        ),
    )
    methods = arguments.methods.split(",")
    try:
        manifest = with_settings(manifest, arguments.set)
        for method in methods:
            Method.parse(method, manifest)
    except (ValueError, ManifestError) as error:
        parser.error(str(error))
    comparison = Comparison(
        manifest,
        arguments.composers,
        arguments.windows,
        workers=arguments.workers,
        seed_steps=arguments.seed_steps,
        flippers=arguments.flippers,
        late=arguments.late,
    )
    tokens = comparison.tokens
    results: list[Result] = []
    for method in methods:

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
