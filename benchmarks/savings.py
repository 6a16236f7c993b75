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

from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.learning.evaluate import HELDOUT_SEED, heldout_loss
from ..node.model.presets import preset
from ..node.run.manifest import Manifest, SketchSpec, with_settings
from .costs import Flops, counting
from .inprocess import InProcessSwarm
from .seeding import Seed

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


class Texts:
    """What everybody reads: each composer's batches, and held-out windows."""

    def __init__(self, manifest: Manifest, composers: int, windows: int) -> None:
        self._batch_size, self._length = manifest.train.batch_size, manifest.data.context_length
        corpus = load_corpus(manifest.data.corpus)
        self._shards = [corpus.shard(i, composers) for i in range(composers)]
        self.heldout = corpus.heldout(windows, self._length, seed=HELDOUT_SEED)

    def sources(self, start: int) -> list[Callable[[], torch.Tensor]]:
        """Each composer's next batch, from number `start` on."""
        batches = [Batches(shard, self._batch_size, self._length, seed=i) for i, shard in enumerate(self._shards)]
        for each in batches:
            each.position = start
        return [each.next for each in batches]

    def joint(self, start: int) -> Callable[[], torch.Tensor]:
        """All composers' next batches in one."""
        sources = self.sources(start)
        return lambda: torch.cat([source() for source in sources])


def train_seed(manifest: Manifest, texts: Texts, steps: int) -> Seed:
    """What everybody starts from: a model after `steps` on the joint batch, without its optimizer's state."""
    alone = Composer(manifest, owned=range(_experts(manifest)), next_batch=texts.joint(0))
    for _ in range(steps):
        alone.train_step()
    return Seed.of(alone)


def measure(text: str, manifest: Manifest, texts: Texts, composers: int, workers: int, seed: Seed | None) -> Saving:
    """Train in one way for what is left of the manifest's steps, and measure.

    Args:
        text: `centralized`; or `shoal` or `workers`, who own the experts, and facts of the manifest behind it.
        seed: what it starts from; by default the run's initial weights.

    Raises ValueError or ConfigError for a text that is none.
    """
    who, *settings = text.split(":")
    if who not in ("centralized", "shoal", "workers"):
        raise ValueError(f"{who!r} is neither centralized, shoal nor workers")
    manifest = with_settings(manifest, settings)
    start = 0 if seed is None else seed.step
    steps = manifest.train.steps - start
    tokens = composers * min(steps, COUNTED_STEPS) * manifest.train.batch_size * manifest.data.context_length
    slots = list(range(_experts(manifest)))
    if who == "centralized":
        alone = Composer(manifest, owned=slots if seed is None else (), next_batch=texts.joint(start))
        if seed is not None:
            seed.start(alone, slots)
        flops = _last_steps(steps, lambda: alone.train_step())
        return Saving(text, heldout_loss(alone.model, texts.heldout), 1.0, flops.total / tokens, 0.0)
    owned = [[] if who == "workers" else slots[i::composers] for i in range(composers)]
    lent = [slots[i::workers] for i in range(workers)] if who == "workers" else []
    swarm = InProcessSwarm(manifest, texts.sources(start), owned, workers=lent, seed=seed)
    own = _own_flops(swarm.composers)
    running = swarm.run(steps)
    flops = _last_steps(steps, lambda: next(running), own)
    theirs = flops.total - own.total if lent else 0
    list(running)  # what is left of it: the last merge
    loss = heldout_loss(swarm.merged().model, texts.heldout)
    as_it_runs = sum(heldout_loss(composer.model, texts.heldout) for composer in swarm.composers) / composers
    return Saving(text, loss, loss / as_it_runs, (flops.total - theirs) / tokens, theirs / tokens)


def _experts(manifest: Manifest) -> int:
    """In a layer."""
    return int(manifest.model.config["num_experts"])


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
    parser.add_argument("--seed-steps", type=int, default=0, help="on the joint batch, that everybody starts from")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--set", action="append", default=[], metavar="PART.FIELD=VALUE", help="a fact of the manifest")
    parser.add_argument("--out", type=Path, default=None, help="folder for savings.md and savings.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest = manifest_of(arguments.experts, arguments.top_k, arguments.width, arguments.seed_steps + arguments.steps)
    manifest = with_settings(manifest, arguments.set)
    texts = Texts(manifest, arguments.composers, arguments.windows)
    seed = train_seed(manifest, texts, arguments.seed_steps) if arguments.seed_steps else None
    savings: list[Saving] = []
    for text in arguments.methods.split(","):
        found = measure(text, manifest, texts, arguments.composers, arguments.workers, seed)
        savings.append(found)
        print(f"{text}: {found.loss:.4f} nats/byte, forward accuracy {found.accuracy:.2%}", flush=True)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "savings.md").write_text(markdown(savings) + "\n")
            (arguments.out / "savings.json").write_text(json.dumps([asdict(s) for s in savings], indent=1))
    print(markdown(savings))


if __name__ == "__main__":
    main()
