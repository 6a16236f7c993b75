"""`./dev bench surrogates`: what each kind of stand-in costs in loss, offline, on one trained model.

A lone composer trains a model with all of its experts. Then three quarters of them, the same in every layer, run as
stand-ins that were made after the training, of one kind at a time or of kinds that the node chooses within budgets, and
the held-out loss is taken. Last, one expert of
one layer at a time is replaced, to see what predicts the loss that it costs: the error of its weights, its fidelity, or
the part of the block's output that goes wrong. With `--upcycled` the model goes on from copies of a dense one's layers.

Prints Markdown tables; `--out` keeps them with JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from ..kernels.bases import Bases, common_bases
from ..kernels.experts import OwnedExpert
from ..kernels.interface import float_weights
from ..kernels.lowbit import LowbitStandIn
from ..kernels.narrow import NarrowPublisher, NarrowStandIn
from ..kernels.replay import ReplayBuffer
from ..kernels.shared import SharedStandIn
from ..kernels.standin import Form as StandInForm
from ..kernels.standin import StandIn
from ..kernels.ternary_standin import TernaryStandIn
from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.learning.evaluate import HELDOUT_SEED
from ..node.model.build import MoEModel
from ..node.model.init import expert_shape
from ..node.model.presets import preset
from ..node.run.manifest import Manifest, with_settings
from ..node.seed.split import NEAR
from ..node.standins.standin_choice import Option, choose
from ..node.upcycling.form import Form
from .probe import Probe, Rows
from .upcycling import RECIPE, Study

KEPT = 4  # one slot in so many stays exact
BUDGETS = ((0.5625, 1.0), (0.4, 1.0), (0.5625, 0.5), (1.0, 0.25), (2.0, 0.5))  # bytes a weight, part of the FLOPs
Make = Callable[[int, OwnedExpert, "Rows"], StandIn]  # layer, expert, its routed rows


@dataclass(frozen=True)
class Outcome:
    """One kind of stand-in in place of three quarters of the experts; means over these experts."""

    kind: str
    loss: float  # nats per token
    fidelity: float  # 1 - ||E(x) - S(x)|| / ||E(x)|| on held-out routed rows
    nbytes: float  # of a stand-in's state
    flops: float  # over the experts' own, for the tokens that are routed to them


@dataclass(frozen=True)
class Single:
    """One expert of one layer replaced."""

    kind: str
    cost: float  # held-out nats per token that it adds
    weight_error: float  # ||W - W'|| / ||W||
    infidelity: float  # 1 - fidelity
    output_error: float  # gate-weighted squared error per token of the corpus, over the block's routed output


def nothing(layer: int, expert: OwnedExpert, rows: Rows) -> StandIn:
    """A stand-in whose output is 0."""
    hidden = expert.masters()[1].shape[0]
    return NarrowStandIn({"gate_up": torch.zeros(2, hidden), "down": torch.zeros(hidden, 1)})


def copy_of(kind: type[LowbitStandIn] | type[TernaryStandIn]) -> Make:
    """The whole expert in few bits."""
    return lambda layer, expert, rows: kind.of(*float_weights(expert))


def narrow(part: int, fit_steps: int, act: str) -> Make:
    """The 1/`part` neurons of most energy on the rows, then `fit_steps` optimizer steps towards the expert's output."""

    def make(layer: int, expert: OwnedExpert, rows: Rows) -> StandIn:
        hidden, width = expert.masters()[1].shape
        small = max(1, width // part)
        start = NarrowStandIn.of(*float_weights(expert), small, rows if len(rows[0]) else None, act)
        publisher = NarrowPublisher(
            start,
            ReplayBuffer(max(8, len(rows[0])), hidden),
            rank=1,
            refit_steps=fit_steps,
            learning_rate=3e-3,
            generator=torch.Generator().manual_seed(0),
            act=act,
        )
        publisher.observe(*rows)
        publisher.refit(expert)
        return publisher.fitted

    return make


def shared(model: MoEModel, rank: int) -> Make:
    """Corrections of what experts have in common: of their groups' means where they are variants of a few, else of the
    mean of the layer's."""
    bases = []
    for shard in model.shards:
        weights = [float_weights(shard.expert(slot)) for slot in range(model.num_slots)]
        groups = common_bases(weights, NEAR)
        mean = [torch.stack(matrices).mean(0) for matrices in zip(*weights, strict=True)]
        bases.append(Bases(groups if 2 * len(groups) <= len(weights) else [(mean[0], mean[1])]))
    return lambda layer, expert, rows: SharedStandIn.near(*float_weights(expert), rank, bases[layer])


def kinds(model: MoEModel, fit_steps: int, act: str) -> dict[str, Make]:
    """How to make each kind."""
    table: dict[str, Make] = {"nothing": nothing}
    for part in (16, 8, 4, 2):
        table[f"narrow f/{part}"] = narrow(part, fit_steps, act)
    table["4-bit copy"] = copy_of(LowbitStandIn)
    table["ternary copy"] = copy_of(TernaryStandIn)
    for rank in (8, 32):
        table[f"shared, rank {rank}"] = shared(model, rank)
    return table


class Comparison:
    """Stand-ins in the place of three quarters of the experts."""

    def __init__(self, probe: Probe, fit_steps: int) -> None:
        self._probe = probe
        self._width = probe.model.expert_shapes[1][1]
        replaced = [slot for slot in range(probe.model.num_slots) if slot % KEPT]
        layers = list(enumerate(probe.model.shards))
        self._made = {
            name: {
                (layer, slot): make(layer, shard.expert(slot), probe.fitting(layer, slot))
                for layer, shard in layers
                for slot in replaced
            }
            for name, make in kinds(probe.model, fit_steps, probe.act).items()
        }

    def uniform(self, name: str) -> Outcome:
        """One kind for all."""
        return self._outcome(name, dict.fromkeys(self._made[name], name))

    def chosen(self, nbytes: float, flops: float) -> Outcome:
        """For each expert what the node's choice is, within so many bytes a weight and such a part of the FLOPs."""
        places = list(self._made["nothing"])
        options = []
        for layer, slot in places:
            seen = self._probe.seen(layer, slot)
            options.append([
                Option(
                    StandInForm(name), self._made[name][layer, slot].nbytes, seen * self._made[name][layer, slot].width,
                    self._probe.squared_error(layer, slot, self._made[name][layer, slot]),
                )
                for name in self._made
                if name != "nothing"
            ])  # fmt: skip
        weights = 3 * self._width * self._probe.model.expert_shapes[1][0]
        everything = sum(self._probe.seen(*place) for place in places) * self._width
        found = choose(options, nbytes=nbytes * weights * len(places), flops=flops * everything)
        kinds_of = {place: each[n].form.kind for place, each, n in zip(places, options, found, strict=True)}
        return self._outcome(f"chosen: {nbytes:g} bytes a weight, {flops:.0%} of FLOPs", kinds_of)

    def _outcome(self, name: str, kinds_of: dict[tuple[int, int], str]) -> Outcome:
        standins = {place: self._made[kind][place] for place, kind in kinds_of.items()}
        probe, count = self._probe, len(standins)
        seen = sum(probe.seen(*place) for place in standins)
        work = sum(s.width * probe.seen(*place) for place, s in standins.items() if kinds_of[place] != "nothing")
        size = sum(s.nbytes for place, s in standins.items() if kinds_of[place] != "nothing")
        fidelity = sum(probe.fidelity(*place, standin) for place, standin in standins.items()) / count
        return Outcome(name, probe.loss_with(standins), fidelity, size / count, work / (seen * self._width))


def compare(probe: Probe, fit_steps: int, report: Callable[[str], None]) -> list[Outcome]:
    """Every kind for all, then kinds that are chosen within budgets."""
    comparison = Comparison(probe, fit_steps)
    outcomes = [Outcome("experts themselves", probe.exact, 1.0, 0.0, 1.0)]
    runs: list[Callable[[], Outcome]] = [
        *(partial(comparison.uniform, name) for name in kinds(probe.model, fit_steps, probe.act)),
        *(partial(comparison.chosen, *budgets) for budgets in BUDGETS),
    ]
    for run in runs:
        outcome = run()
        outcomes.append(outcome)
        report(f"{outcome.kind}: {outcome.loss:.4f} nats per token, fidelity {outcome.fidelity:.3f}")
    return outcomes


def one_by_one(probe: Probe, fit_steps: int, slots: Sequence[int]) -> list[Single]:
    """What each of `slots` costs alone, in each layer, by some kinds."""
    table = kinds(probe.model, fit_steps, probe.act)
    singles = []
    for name in ("nothing", "narrow f/8", "narrow f/2", "ternary copy"):
        for layer, shard in enumerate(probe.model.shards):
            for slot in slots:
                expert = shard.expert(slot)
                standin = table[name](layer, expert, probe.fitting(layer, slot))
                singles.append(
                    Single(
                        name,
                        probe.loss_with({(layer, slot): standin}) - probe.exact,
                        _weight_error(expert, standin),
                        1.0 - probe.fidelity(layer, slot, standin),
                        probe.output_error(layer, slot, standin),
                    )
                )
    return singles


def _weight_error(expert: OwnedExpert, standin: StandIn) -> float:
    """||W - W'|| / ||W|| over both matrices; neurons that a narrow one lacks count as zeros."""
    exact, near = float_weights(expert), standin.dense()
    norm = math.sqrt(sum(float(m.square().sum()) for m in exact))
    if near[0].shape == exact[0].shape:
        return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(exact, near, strict=True))) / norm
    return math.sqrt(max(0.0, norm**2 - sum(float(m.square().sum()) for m in near))) / norm


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, which are in [0, n); ties keep their order."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort(stable=True).argsort().double() for values in (xs, ys)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def markdown(outcomes: Sequence[Outcome], singles: Sequence[Single]) -> str:
    """Both tables."""
    exact = outcomes[0].loss
    lines = ["| stand-ins of three experts in four | nats per token | more loss | fidelity | FLOPs | bytes |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {o.kind} | {o.loss:.4f} | {100 * (o.loss / exact - 1):+.1f}% "
        f"| {o.fidelity:.3f} | {o.flops:.0%} | {o.nbytes:,.0f} |"
        for o in outcomes
    ]
    if singles:
        costs = [single.cost for single in singles]
        lines += ["", "| what an expert's stand-in gets wrong | rank correlation with the loss it costs |", "|---|---|"]
        lines += [
            f"| {label} | {rank_correlation([getattr(single, name) for single in singles], costs):.2f} |"
            for name, label in (
                ("weight_error", "its weights"),
                ("infidelity", "its outputs, over its own (1 - fidelity)"),
                ("output_error", "its outputs, over the block's"),
            )
        ]
    return "\n".join(lines)


def from_scratch(arguments: argparse.Namespace) -> Composer:
    """One that owns all experts of a preset."""
    chosen = preset(arguments.preset)
    manifest = Manifest(
        name="bench", founder="none", created_at=0, model=chosen.model, data=chosen.data, train=chosen.train
    )
    manifest = with_settings(manifest, [f"train.steps={arguments.steps}", *arguments.set])
    batch = 4 * manifest.train.batch_size, manifest.data.context_length
    return Composer(
        manifest,
        owned=range(expert_shape(manifest.model).num_experts),
        next_batch=Batches(load_corpus(manifest.data.corpus).shard(0, 1), *batch, seed=0).next,
    )


def upcycled(arguments: argparse.Namespace) -> Composer:
    """The same of a dense model that is trained first. ValueError for what is no form."""
    found = RECIPE.fullmatch(arguments.upcycled)
    if found is None or not found[3] or found[7]:
        raise ValueError(f"{arguments.upcycled!r} is no form like E16G1T2")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        corpus = load_corpus("stdlib")
        study = Study(Path(name), corpus, dense_steps=arguments.dense_steps, steps=arguments.steps, windows=1)
        return study.upcycled(Form(int(found[3]), int(found[4]), int(found[5])))


def main() -> None:
    """Train, probe, print."""
    parser = argparse.ArgumentParser(
        prog="./dev bench surrogates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--steps", type=int, default=1000, help="of training, each of four composers' batches")
    parser.add_argument("--fit-steps", type=int, default=500, help="optimizer steps of narrow stand-ins")
    parser.add_argument("--rows", type=int, default=2048, help="routed inputs kept for each expert")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--singles", type=int, default=4, help="experts of each layer to replace one at a time")
    parser.add_argument("--upcycled", default="", metavar="E16G1T2", help="train on from a dense model, in that form")
    parser.add_argument("--dense-steps", type=int, default=1500, help="that it was trained before")
    parser.add_argument("--out", type=Path, default=None, help="folder for surrogates.md and surrogates.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    composer = upcycled(arguments) if arguments.upcycled else from_scratch(arguments)
    train, data = composer.train, composer.manifest.data
    corpus = load_corpus(data.corpus)
    batch = 4 * train.batch_size, data.context_length
    for step in range(1, arguments.steps + 1):
        loss = composer.train_step().loss
        if step % 100 == 0:
            print(f"step {step}, loss {loss:.4f}", flush=True)
    probe = Probe(
        composer.model,
        composer.shape.act,
        Batches(corpus.shard(0, 1), *batch, seed=1),
        corpus.heldout(arguments.windows, data.context_length, seed=HELDOUT_SEED),
        rows=arguments.rows,
        num_batches=8,
    )
    outcomes = compare(probe, arguments.fit_steps, lambda line: print(line, flush=True))
    singles = one_by_one(probe, arguments.fit_steps, range(min(arguments.singles, probe.model.num_slots)))
    table = markdown(outcomes, singles)
    print(table)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "surrogates.md").write_text(table + "\n")
        found = {"kinds": [asdict(o) for o in outcomes], "singles": [asdict(s) for s in singles]}
        (arguments.out / "surrogates.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
