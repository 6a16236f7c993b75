"""`./dev bench savings`: what a composer computes for a token, over what it would with all experts in full.

A model whose experts are most of it, as MoE models are, is trained by a swarm in one process, and by one composer with
all experts on the joint batch (`centralized`). Counted are FLOPs for a composer's own tokens: forward, backward, fits
of stand-ins, sketches, merges. Where workers own the experts (`workers:...`), what they compute for the same tokens is
a column of its own.

Forward accuracy is the held-out loss of the merged model with all experts in full, over that of the same model as a
composer runs it, with stand-ins: what is left of its forward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from ..node.composer import Composer
from ..node.data import Batches, load_corpus
from ..node.evaluate import HELDOUT_SEED, heldout_loss
from ..node.manifest import Manifest, SketchSpec, with_settings
from ..node.model.presets import preset
from .costs import Flops, counting
from .inprocess import InProcessSwarm

METHODS = (
    "centralized",
    "shoal:standin.kind=lowbit",
    "shoal:standin.kind=narrow:standin.width_fraction=0.25",
    "shoal:standin.kind=narrow:standin.width_fraction=0.125",
    "shoal:standin.kind=chosen:standin.flops_fraction=0.2:standin.bytes_per_weight=0.75:standin.choose_every=8",
    "workers:standin.kind=narrow:standin.width_fraction=0.25:sketch.kind=rows",
)
COUNTED_STEPS = 24  # whose FLOPs are counted: every cadence of a run comes in them
FIT_STEPS = 8  # of narrow stand-ins, each time that they are published


@dataclass(frozen=True)
class Saving:
    """One method."""

    method: str
    loss: float  # held-out nats per byte, of the merged model with all experts in full
    accuracy: float  # forward, about 1
    composer_flops: float  # per token of its own
    worker_flops: float  # of all workers, per token of any composer


def manifest_of(experts: int, top_k: int, width: int, steps: int) -> Manifest:
    """A run of a model whose experts are most of it. Without sketches, if they are not asked for."""
    base = preset("standard")
    config = base.model.config | {
        "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width,
    }  # fmt: skip
    return Manifest(
        name="savings",
        founder="none",
        created_at=0,
        model=msgspec.structs.replace(base.model, config=config),
        data=base.data,
        train=msgspec.structs.replace(base.train, steps=steps),
        outer=msgspec.structs.replace(base.outer, every_steps=8, fragments=1),
        standin=msgspec.structs.replace(base.standin, publish_every=8, refit_steps=FIT_STEPS),
        sketch=SketchSpec(kind="none"),
    )


def measure(text: str, manifest: Manifest, composers: int, workers: int, windows: int) -> Saving:
    """Train in one way, and measure.

    Args:
        text: `centralized`; or `shoal` or `workers`, who own the experts, and facts of the manifest behind it.

    Raises ValueError or ManifestError for a text that is none.
    """
    who, *settings = text.split(":")
    if who not in ("centralized", "shoal", "workers"):
        raise ValueError(f"{who!r} is neither centralized, shoal nor workers")
    manifest = with_settings(manifest, settings)
    data, train = manifest.data, manifest.train
    corpus = load_corpus(data.corpus)
    sources = [
        Batches(corpus.shard(i, composers), train.batch_size, data.context_length, seed=i).next
        for i in range(composers)
    ]
    heldout = corpus.heldout(windows, data.context_length, seed=HELDOUT_SEED)
    tokens = composers * min(train.steps, COUNTED_STEPS) * train.batch_size * data.context_length
    slots = list(range(int(manifest.model.config["num_experts"])))
    if who == "centralized":
        alone = Composer(manifest, owned=slots, next_batch=lambda: torch.cat([source() for source in sources]))
        flops = _last_steps(train.steps, lambda: alone.train_step())
        return Saving(text, heldout_loss(alone.model, heldout), 1.0, flops.total / tokens, 0.0)
    owned = [[] if who == "workers" else slots[i::composers] for i in range(composers)]
    lent = [slots[i::workers] for i in range(workers)] if who == "workers" else []
    swarm = InProcessSwarm(manifest, sources, owned, workers=lent)
    own = _own_flops(swarm.composers)
    running = swarm.run(train.steps)
    flops = _last_steps(train.steps, lambda: next(running), own)
    theirs = flops.total - own.total if lent else 0
    list(running)  # what is left of it: the last merge
    loss = heldout_loss(swarm.merged().model, heldout)
    as_it_runs = sum(heldout_loss(composer.model, heldout) for composer in swarm.composers) / composers
    return Saving(text, loss, loss / as_it_runs, (flops.total - theirs) / tokens, theirs / tokens)


def _last_steps(steps: int, step: Callable[[], object], *begun: Flops) -> Flops:
    """Take `steps` of them; FLOPs of the last ones. What was counted in `begun` before these is forgotten."""
    counted = min(steps, COUNTED_STEPS)
    for _ in range(steps - counted):
        step()
    for each in begun:
        each.total = 0
    with counting() as flops:
        for _ in range(counted):
            step()
    return flops


def _own_flops(composers: Sequence[Composer]) -> Flops:
    """What composers multiply in both halves of their steps, as it adds up from now on."""
    total = Flops()

    def counted(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with counting() as flops:
                result = work()
            total.total += flops.total
            return result

        return run

    for composer in composers:
        for half in ("compute", "apply"):
            setattr(composer, half, counted(getattr(composer, half)))
    return total


def markdown(savings: Sequence[Saving]) -> str:
    """One line a method; ratios are to the first."""
    first = savings[0]
    lines = [
        "| method | nats/byte | forward accuracy | MFLOPs/token, composer | less | MFLOPs/token, workers |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s.method} | {s.loss:.4f} | {s.accuracy:.2%} | {s.composer_flops / 1e6:.2f} "
        f"| {first.composer_flops / s.composer_flops:.2f} x | {s.worker_flops / 1e6:.2f} |"
        for s in savings
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure every method named, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench savings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; the first is the reference")
    parser.add_argument("--composers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16, help="in a layer")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="of an expert; the model is 128 wide")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--out", type=Path, default=None, help="folder for savings.md and savings.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest = manifest_of(arguments.experts, arguments.top_k, arguments.width, arguments.steps)
    manifest = with_settings(manifest, arguments.set)
    savings: list[Saving] = []
    for text in arguments.methods.split(","):
        found = measure(text, manifest, arguments.composers, arguments.workers, arguments.windows)
        savings.append(found)
        print(f"{text}: {found.loss:.4f} nats/byte, forward accuracy {found.accuracy:.2%}", flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "savings.md").write_text(markdown(savings) + "\n")
            (arguments.out / "savings.json").write_text(json.dumps([asdict(s) for s in savings], indent=1))
    print(markdown(savings))


if __name__ == "__main__":
    main()
