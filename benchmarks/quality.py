"""`./dev bench quality`: the same model on the same tokens, trained in several ways, side by side.

The ways are those of `comparison.py`, which `--help` shows too.

`--tune` finds each method's learning rate and outer step first. `--vary NAME=VALUE,VALUE` trains with all methods at
each of these values: of `composers`, of `tokens`, or of a fact of the manifest (`outer.every_steps=2,8,24`).

Writes Markdown tables, JSON, and loss curves as a PNG into the folder `--out`, and goes on there with what it has been
told before: empty it after a change of the code. `./dev bench swarm` trains through real processes and a real network.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import torch

from ..node.model.presets import preset
from ..node.run.manifest import Manifest, with_settings
from ..protocol.errors import ShoalError
from . import comparison
from .cells import Cell, Cells
from .comparison import PLAIN, Comparison, Method
from .curves import draw
from .results import Result, gaps_to, markdown, spread
from .tuning import CHANCE, Sweep, table, tune

METHODS = (*PLAIN, "shoal-lowbit", "shoal-lowbit+rows", "shoal-narrow", "shoal-narrow+rows")


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options and read the command line."""
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the first is the reference")
    parser.add_argument("--composers", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2, help="owners of all experts in extreme-KIND")
    horizon = parser.add_mutually_exclusive_group()
    horizon.add_argument("--steps", type=int, default=1000, help="of each composer")
    horizon.add_argument("--tokens", type=int, help="of all composers together, in place of --steps")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method, with other weights and batches")
    parser.add_argument("--first-seed", type=int, default=0, help=f"number of the first of them; --tune has {CHANCE}")
    parser.add_argument("--tune", action="store_true", help="each method at its own learning rate and outer step")
    parser.add_argument("--vary", metavar="NAME=VALUES", help="composers, tokens, or a fact of the manifest")
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
        arguments.tokens, arguments.refit_steps = None, arguments.refit_steps or 4
    return arguments


class Bench:
    """One command's comparisons. Every outcome is kept as soon as it is known, and never found out twice."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path | None = arguments.out
        self.seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
        self.cells = Cells(None if self.out is None else self.out / "cells.jsonl")
        self._comparison = functools.lru_cache(maxsize=1)(self._make_comparison)

    def manifest(self, composers: int, tokens: int | None, settings: Sequence[str] = ()) -> Manifest:
        """The run's facts. Raises ConfigError, ValueError."""
        said = self.arguments
        chosen = preset(said.preset)
        outer, standin = chosen.outer, chosen.standin
        made = Manifest(
            name="bench",
            founder="none",
            created_at=0,
            model=chosen.model,
            data=chosen.data,
            train=msgspec.structs.replace(chosen.train, steps=said.seed_steps + said.steps),
            outer=msgspec.structs.replace(outer, every_steps=said.every or outer.every_steps, fragments=1),
            standin=msgspec.structs.replace(
                standin,
                publish_every=said.publish_every or standin.publish_every,
                width_fraction=said.width or standin.width_fraction,
                refit_steps=said.refit_steps or standin.refit_steps,
            ),
            sketch=chosen.sketch,
        )
        made = with_settings(made, [*said.set, *settings])
        if tokens is None:
            return made
        steps = max(1, math.ceil(tokens / (composers * made.train.batch_size * made.data.context_length)))
        return msgspec.structs.replace(made, train=msgspec.structs.replace(made.train, steps=said.seed_steps + steps))

    def comparison(self, chance: int, varied: str = "") -> Comparison:
        """With one seed; `varied` is NAME=VALUE."""
        return self._comparison(chance, varied)

    def _make_comparison(self, chance: int, varied: str) -> Comparison:
        said = self.arguments
        name, _, value = varied.partition("=")
        composers = int(value) if name == "composers" else said.composers
        tokens = int(value) if name == "tokens" else said.tokens
        settings = [varied] if "." in name else []
        return Comparison(
            self.manifest(composers, tokens, settings),
            composers,
            said.windows,
            workers=said.workers,
            seed_steps=said.seed_steps,
            flippers=said.flippers,
            late=said.late,
            chance=chance,
            folder=self.out,
        )

    def outcome(self, text: str, chance: int, varied: str = "", *, costs: bool = True) -> Cell:
        """What a method comes to with one seed."""
        comparison = self.comparison(chance, varied)
        key = comparison.key(text)
        known = self.cells.get(key)
        if not costs:
            key += ", loss alone"
            known = known or self.cells.get(key)
        if known is not None:
            return Cell(replace(known.result, method=text), known.curve)
        curve: list[float] = []
        who = f"{text} {varied}".strip()

        def report(step: int, loss: float) -> None:
            curve.append(loss)
            if step % 100 == 0:
                print(f"{who}: step {step}, loss {loss:.4f}", flush=True)

        comparison.seed(lambda step, loss: None)
        result = comparison.run(text, report, costs=costs)
        print(f"{who}, seed {chance}: {result.loss:.4f} nats/byte in {result.seconds:.0f} s", flush=True)
        return self.cells.put(key, Cell(result, curve))

    def tuned(self, methods: Sequence[str]) -> list[str]:
        """The methods with the settings that are best for each."""
        sweeps: list[Sweep] = []
        for text in methods:
            method = Method.parse(text, self.comparison(CHANCE).manifest)
            sweeps.append(tune(method, lambda text: self.outcome(text, CHANCE, costs=False).result.loss))
            self._write("tuning.md", table(sweeps))
        print(table(sweeps), flush=True)
        return [sweep.best for sweep in sweeps]

    def compare(self, methods: Sequence[str]) -> str:
        """All methods, all seeds: the table of them."""
        results: list[Result] = []
        curves: dict[str, list[Sequence[float]]] = {}  # by method and seed, of every step
        for chance, text in itertools.product(self.seeds, methods):
            cell = self.outcome(text, chance, costs=chance == self.seeds[0])  # which differ little between seeds
            results.append(cell.result)
            curves.setdefault(text, []).append(cell.curve)
            self._write("quality.md", markdown(results))
            self._write("quality.json", json.dumps([asdict(result) for result in results], indent=1))
            self._write("curves.json", json.dumps(curves))
            if self.out is not None:
                draw(curves, self.out / "quality.png")
        return markdown(results)

    def vary(self, methods: Sequence[str], varied: str) -> str:
        """All methods at every value of one thing: losses, and gaps to the first method."""
        name, _, values = varied.partition("=")
        columns: list[dict[str, str]] = []
        for value in values.split(","):
            columns.append({})
            base: dict[int, Result] = {}
            for text in methods:
                runs = [self.outcome(text, chance, f"{name}={value}", costs=False).result for chance in self.seeds]
                base = base or {run.seed: run for run in runs}
                losses, gaps = [run.loss for run in runs], gaps_to(base, runs)
                mean, gap = sum(losses) / len(losses), sum(gaps) / len(gaps)
                columns[-1][text] = f"{mean:.4f}{spread(losses, 4)} ({gap:+.1f}%{spread(gaps, 1)})"
        heads = ["method", *(f"{name} {value}" for value in values.split(","))]
        lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        lines += ["| " + " | ".join([text, *(column[text] for column in columns)]) + " |" for text in methods]
        self._write(f"vary-{name}.md", "\n".join(lines))
        return "\n".join(lines)

    def _write(self, name: str, text: str) -> None:
        if self.out is not None:
            (self.out / name).write_text(text + "\n")


def main() -> None:
    """Train with every method named, print and write the tables."""
    parser = argparse.ArgumentParser(
        prog="./dev bench quality",
        description=f"{__doc__}\n{comparison.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments = arguments_of(parser)
    torch.set_num_threads(arguments.threads)
    bench, methods = Bench(arguments), arguments.methods.split(",")
    try:
        for value in (arguments.vary or "").partition("=")[2].split(","):
            varied = f"{arguments.vary.partition('=')[0]}={value}" if arguments.vary else ""
            manifest = bench.comparison(0, varied).manifest
            for method in methods:
                Method.parse(method, manifest)
    except (ValueError, ShoalError) as error:
        parser.error(str(error))
    if arguments.tune:
        methods = bench.tuned(methods)
    print(bench.vary(methods, arguments.vary) if arguments.vary else bench.compare(methods))


if __name__ == "__main__":
    main()
