"""`./dev bench quality`: the same model on the same tokens, trained in several ways, side by side.

    centralized        one process, the joint batch of all composers
    lone               one composer, its own share of the tokens
    diloco             full replicas, everything averaged every H steps
    spes               full models, each peer trains its own experts, takes the others' from their owners every H steps
                       (SPES, from its paper's description)
    shoal-KIND         experts split among composers, stand-ins of that kind    (in one process, the node's own code)
    extreme-KIND       experts split among workers; composers own none          (the same)

KIND is lowbit, narrow, ternary or chosen; ternary trains experts ternary too, whose copies are then exact. `+rows` or
`+gradient` after it sends sketches to owners, without it there are none. `@lora` or `@frozen` after that: owners train
low-rank factors beside 4-bit weights, or nothing; `@lora4` names a rank. Facts of the manifest that differ for one
method alone stand behind it: `shoal-narrow+rows:sketch.kappa=0:sketch.codec=float16`.

Writes a Markdown table, JSON, and loss curves as a PNG. `./dev bench swarm` runs the comparison through real processes
and a real network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from ..node.composer import Composer
from ..node.config import ExpertModeName
from ..node.data import Batches, load_corpus
from ..node.evaluate import HELDOUT_SEED, heldout_loss
from ..node.expert_mode import ExpertMode
from ..node.manifest import Manifest, with_settings
from ..node.manifest_errors import ManifestError
from ..node.model.presets import preset
from .costs import counting, state_bytes
from .curves import draw
from .inprocess import Bytes, InProcessSwarm
from .results import Result, markdown
from .seeding import Seed

PLAIN = ("centralized", "lone", "diloco", "spes")
METHODS = (*PLAIN, "shoal-lowbit", "shoal-lowbit+rows", "shoal-narrow", "shoal-narrow+rows")
STANDINS = ("lowbit", "narrow", "ternary", "chosen")  # shared ones need a checkpoint to start from
_METHOD = re.compile(
    rf"(?P<plain>{'|'.join(PLAIN)})|(?P<who>shoal|extreme)-(?P<kind>{'|'.join(STANDINS)})(\+(?P<sketch>rows|gradient))?"
    r"(@(?P<mode>frozen|lora(?P<rank>\d+)?))?"
)
NO_TOKENS = torch.empty(0)
COUNTED_STEPS = 24  # whose FLOPs are counted: every cadence of a run comes in them
MAX_COMPOSERS = 1000  # so that no two seeds share batches


@dataclass(frozen=True)
class Method:
    """One way of training."""

    name: str
    plain: str | None  # centralized, lone, diloco, spes; None for a swarm of owners
    extreme: bool
    manifest: Manifest
    mode: ExpertMode

    @classmethod
    def parse(cls, text: str, manifest: Manifest) -> Method:
        """Raises ValueError: no such method; ManifestError: a setting that is not possible."""
        name, *settings = text.split(":")
        found = _METHOD.fullmatch(name)
        if found is None:
            raise ValueError(f"no method {name!r}: {', '.join(PLAIN)}, shoal-KIND or extreme-KIND, see --help")
        if found["kind"] is not None:
            own = [f"standin.kind={found['kind']}", f"sketch.kind={found['sketch'] or 'none'}"]
            if found["kind"] == "ternary":
                own.append("train.expert_weights=ternary")
            settings = own + settings
        if found["plain"] == "spes":
            settings = ["sketch.kind=none", *settings]
        own_facts = with_settings(manifest, settings)
        mode: ExpertModeName = "frozen" if found["mode"] == "frozen" else "lora" if found["mode"] else "full"
        how = ExpertMode(own_facts.train, mode, int(found["rank"] or 16))
        return cls(text, found["plain"], found["who"] == "extreme", own_facts, how)


class Comparison:
    """All methods share model, seeds, data, schedule and evaluation.

    Args:
        windows: held-out windows.
        workers: that share the experts where composers own none.
        flippers: composers that send the opposite of what they learned.
        late: steps that sketches and deltas are under way.
        chance: what initial weights and batches are drawn by.
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
        chance: int = 0,
    ) -> None:
        model = msgspec.structs.replace(manifest.model, seed=manifest.model.seed + chance)
        self.manifest = msgspec.structs.replace(manifest, model=model)
        self.flippers, self.late, self.chance = flippers, late, chance
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
        seed = index + MAX_COMPOSERS * self.chance
        batches = Batches(self._shards[index], train.batch_size, self.manifest.data.context_length, seed=seed)
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
        swarm: InProcessSwarm | None = None
        if method.plain in ("centralized", "lone"):
            shards = self.num_composers if method.plain == "centralized" else 1
            merged = self._alone(method.manifest, shards, seed=seed)
            losses: Iterator[float] = (merged.train_step().loss for _ in range(self.steps))
        else:
            swarm = self._swarm(method, seed)
            shards = self.num_composers
            losses = swarm.run(self.steps)
        uncounted = max(0, self.steps - COUNTED_STEPS)
        for step in range(1, uncounted + 1):
            report(step, next(losses))
        with counting() as flops:
            for step, loss in enumerate(losses, start=uncounted + 1):
                report(step, loss)
        state = max(map(state_bytes, [merged] if swarm is None else swarm.owners))
        if swarm is not None:
            merged = swarm.composers[0] if swarm.replicas else swarm.merged()
        sent = Bytes() if swarm is None else swarm.bytes
        batch = self.manifest.train.batch_size * self.manifest.data.context_length
        return Result(
            method=text,
            loss=heldout_loss(merged.model, self.heldout),
            seconds=time.monotonic() - began,
            delta_bytes=sent.deltas,
            outer_bytes=sent.outer,
            sketch_bytes=sent.sketches,
            seed=self.chance,
            flops_per_token=flops.total / (batch * shards * (self.steps - uncounted)),
            state_bytes=state,
        )

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
        return InProcessSwarm(
            method.manifest,
            sources,
            owned,
            workers=workers,
            seed=seed,
            flippers=self.flippers,
            late=self.late,
            frozen=method.plain == "spes",
            mode=method.mode,
        )


def main() -> None:
    """Train with every method named, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the first is the reference")
    parser.add_argument("--composers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="owners of all experts in extreme-KIND")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, with other weights and batches")
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
    parser.add_argument("--out", type=Path, default=None, help="folder for tables, numbers and curves")
    parser.add_argument("--quick", action="store_true", help="few steps of a tiny model, for a look whether it runs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.preset, arguments.steps, arguments.windows, arguments.composers = "tiny", 12, 4, 2
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
    comparisons = [
        Comparison(
            manifest,
            arguments.composers,
            arguments.windows,
            workers=arguments.workers,
            seed_steps=arguments.seed_steps,
            flippers=arguments.flippers,
            late=arguments.late,
            chance=chance,
        )
        for chance in range(arguments.seeds)
    ]
    tokens = comparisons[0].tokens
    results: list[Result] = []
    curves: dict[str, list[list[float]]] = {}  # by method and seed, of every step

    def show(step: int, loss: float, who: str = "seed") -> None:
        if step % 100 == 0:
            print(f"{who}: step {step}, loss {loss:.4f}", flush=True)

    for comparison, method in itertools.product(comparisons, methods):
        comparison.seed(show)
        curves.setdefault(method, []).append([])

        def report(step: int, loss: float, method: str = method) -> None:
            curves[method][-1].append(loss)
            show(step, loss, method)

        results.append(comparison.run(method, report))
        print(f"{method}: held-out {results[-1].loss:.4f} nats/byte in {results[-1].seconds:.0f} s", flush=True)
        if arguments.out is not None:  # after every method: what took minutes must not die with the next one
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "quality.md").write_text(markdown(results, tokens=tokens) + "\n")
            (arguments.out / "quality.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
            (arguments.out / "curves.json").write_text(json.dumps(curves))
            draw(curves, arguments.out / "quality.png")
    print(markdown(results, tokens=tokens))


if __name__ == "__main__":
    main()
