"""One composer with the whole model, its own share of the text, and nobody to talk to: what a swarm has to beat."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..model.init import expert_shape
from ..run.manifest import Manifest, verify
from .composer import Composer
from .data import Batches, load_corpus, seed_of_peer
from .evaluate import HELDOUT_SEED, heldout_loss


def train_alone(manifest: Manifest, batches: Batches, progress: Path | None = None) -> Composer:
    """Train the full model for the run's steps on one composer's batches; `progress` tells in JSON how far it is."""
    slots = range(expert_shape(manifest.model).num_experts)
    composer = Composer(manifest, owned=slots, next_batch=batches.next)
    while composer.step < manifest.train.steps:
        report = composer.train_step()
        if progress is not None and composer.step % 20 == 0:
            progress.write_text(json.dumps({"step": composer.step, "loss": report.loss}))
    return composer


def main() -> None:
    """`python -m shoal.node.learning.lone MANIFEST --shard I/N --out FILE`: writes {"nats_per_token": ...}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path, help="a signed manifest file")
    parser.add_argument("--shard", default="0/1", help="which shard of the corpus to train on, e.g. 0/3")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows to evaluate on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    manifest = verify(arguments.manifest.read_bytes())
    index, count = map(int, arguments.shard.split("/"))
    corpus = load_corpus(arguments.data)
    batches = Batches(
        corpus.shard(index, count),
        manifest.train.batch_size,
        manifest.data.context_length,
        seed=seed_of_peer(f"lone-{index}", manifest.name),
    )
    composer = train_alone(manifest, batches, progress=arguments.out.with_suffix(".progress"))
    composer.model.set_tap(None)
    heldout = corpus.heldout(arguments.windows, manifest.data.context_length, seed=HELDOUT_SEED)
    loss = heldout_loss(composer.model, heldout)
    arguments.out.write_text(json.dumps({"nats_per_token": loss, "steps": composer.step, "tokens": composer.tokens}))


if __name__ == "__main__":
    main()
