"""`./dev bench upcycling`: a dense model trained here, upcycled in several ways, beside the dense one trained on.

A dense Llama is trained first. Then every recipe goes on from it on the same text, with an optimizer of its own:

    dense                  the dense model itself
    E8G1T2, E64G8T8, ...   E experts of G shards, T a token (docs/upcycling.md)
    ...@minimum            at the rate that the dense model ended with; without it, warmed up to the first peak again
    ...@flops              the dense model alone: as many steps as cost what E8G1T2's cost
    ...@reinit             half of the neurons of copies start anew (drop-upcycling)
    ...@noise              a twentieth of noise on copies
    ...@drop               experts drop tokens above the even share

Loss is in nats per byte on held-out windows. FLOPs are counted in one step. Writes a Markdown table and JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ..node.learning.composer import Composer
from ..node.learning.data import Batches, Corpus, load_corpus
from ..node.learning.evaluate import HELDOUT_SEED, heldout_loss, mean_loss
from ..node.learning.optimizer import learning_rate, make_optimizer, set_rate
from ..node.run.manifest import DataSpec, Manifest, ModelSpec, StandInSpec, TrainSpec
from ..node.seed.split import Checkpoint
from ..node.seed.start import FromSeed
from ..node.seed.store import SeedStore
from ..node.upcycling.convert import Changes, upcycle
from ..node.upcycling.form import Form
from .costs import counting

RECIPES = (
    "dense@minimum,dense,dense@flops,E8G1T2@minimum,E8G1T2,E4G1T2,E16G1T2,E32G1T2,E64G8T8,E64G8T16,E8G1T2@drop,"
    "E8G1T2@noise,E8G1T2@reinit"
)
CONTEXT, BATCH = 256, 4
PEAK, FINAL = 3e-3, 0.1
RECIPE = re.compile(r"dense(@(minimum|flops))?|E(\d+)G(\d+)T(\d+)(@(minimum|drop|noise|reinit))?")


@dataclass(frozen=True)
class Outcome:
    """Of one recipe; `start` is its loss before the first step."""

    recipe: str
    steps: int
    start: float
    loss: float
    weights: int
    flops_per_token: float
    seconds: float


class Study:
    """One dense model, and what goes on from it."""

    def __init__(self, folder: Path, corpus: Corpus, *, dense_steps: int, steps: int, windows: int) -> None:
        self.folder, self.tokens, self.steps = folder, corpus.shard(0, 1), steps
        self.heldout = corpus.heldout(windows, CONTEXT, seed=HELDOUT_SEED)
        config = LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.04, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        self.dense: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        spec = TrainSpec(steps=dense_steps, batch_size=BATCH, learning_rate=PEAK, final_lr_fraction=FINAL)
        self.dense_flops = self._train_dense(self.dense, spec, seed=0)
        self.dense.save_pretrained(folder / "dense")

    def _train_dense(self, model: PreTrainedModel, spec: TrainSpec, seed: int) -> float:
        """Returns the FLOPs of a token, in the last step."""
        batches = Batches(self.tokens, BATCH, CONTEXT, seed=seed)
        optimizer = make_optimizer(spec, dict(model.named_parameters()))
        flops = 0.0
        for step in range(spec.steps):
            set_rate(optimizer, learning_rate(spec, step))
            tokens = batches.next()
            with counting() if step == spec.steps - 1 else nullcontext() as counted:
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            flops = 0.0 if counted is None else counted.total / tokens.numel()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return flops

    def _spec(self, change: str | None, steps: int) -> TrainSpec:
        if change == "minimum":
            return TrainSpec(
                steps=steps, batch_size=BATCH, learning_rate=PEAK * FINAL, final_lr_fraction=1.0, warmup_steps=0
            )
        return TrainSpec(steps=steps, batch_size=BATCH, learning_rate=PEAK, final_lr_fraction=FINAL)

    def run(self, recipe: str) -> Outcome:
        """Raises ValueError for no recipe."""
        found = RECIPE.fullmatch(recipe)
        if found is None:
            raise ValueError(f"no recipe {recipe!r}")
        began = time.monotonic()
        if recipe.startswith("dense"):
            steps = self.steps
            if found[2] == "flops":
                composer = self.upcycled(Form(experts=8, granularity=1, top_k=2), None)
                steps = round(steps * self._flops(composer) / self.dense_flops)
            model = copy.deepcopy(self.dense)
            start = mean_loss(model, self.heldout)
            flops = self._train_dense(model, self._spec(found[2], steps), seed=1)
            weights, loss = sum(p.numel() for p in model.parameters()), mean_loss(model, self.heldout)
            return Outcome(recipe, steps, start, loss, weights, flops, time.monotonic() - began)
        composer = self.upcycled(Form(int(found[3]), int(found[4]), int(found[5])), found[7])
        start = heldout_loss(composer.model, self.heldout)
        for _ in range(self.steps - 1):
            composer.train_step()
        flops = self._flops(composer)
        loss, weights = heldout_loss(composer.model, self.heldout), sum(p.numel() for p in composer.model.parameters())
        return Outcome(recipe, self.steps, start, loss, weights, flops, time.monotonic() - began)

    @staticmethod
    def _flops(composer: Composer) -> float:
        """Of a token, in the step that it takes."""
        with counting() as counted:
            report = composer.train_step()
        return counted.total / report.tokens

    def upcycled(self, form: Form, change: str | None = None) -> Composer:
        """A composer of the dense model's experts in that form, to be trained on."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder, standin = Path(name), StandInSpec()
            changes = Changes(0.05 if change == "noise" else 0.0, 0.5 if change == "reinit" else 0.0, 0)
            upcycle(self.folder / "dense", folder / "moe", form, changes, lambda done, of: None)
            checkpoint = Checkpoint(folder / "moe")
            start = checkpoint.split(folder / "seed", standin, lambda done, of: None)
            spec = ModelSpec(config=checkpoint.config(), start=start, capacity_factor=1.0 if change == "drop" else 0.0)
            manifest = Manifest(
                name="bench", founder="none", created_at=0, model=spec, data=DataSpec(context_length=CONTEXT),
                train=self._spec(change, self.steps), standin=standin,
            )  # fmt: skip
            batches = Batches(self.tokens, BATCH, CONTEXT, seed=1)
            slots = range(form.experts)
            return Composer(
                manifest, owned=slots, next_batch=batches.next, start=FromSeed(spec, SeedStore(folder / "seed", start))
            )


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One line a recipe: nats per byte at its start and end, and the gap of the latter to the first recipe's."""
    base = outcomes[0]
    lines = [
        f"| recipe | weights, M | MFLOPs a token | steps | start | end | vs {base.recipe} | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{one.recipe}` | {one.weights / 1e6:.2f} | {one.flops_per_token / 1e6:.2f} | {one.steps} | {one.start:.3f} "
        f"| {one.loss:.3f} | {100 * (one.loss / base.loss - 1):+.1f}% | {one.seconds:.0f} |"
        for one in outcomes
    ]
    return "\n".join(lines)


def main() -> None:
    """Train all, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench upcycling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=RECIPES, help="comma-separated; the first is the reference")
    parser.add_argument("--dense-steps", type=int, default=1500, help="that the dense model is trained before")
    parser.add_argument("--steps", type=int, default=600, help="that every recipe goes on for")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for upcycling.md and upcycling.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipes = arguments.recipes.split(",")
    if not all(map(RECIPE.fullmatch, recipes)):
        parser.error(f"recipes are like {RECIPES}")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        study = Study(
            Path(name), load_corpus("stdlib"), dense_steps=arguments.dense_steps, steps=arguments.steps,
            windows=arguments.windows,
        )  # fmt: skip
        for recipe in recipes:
            outcomes.append(study.run(recipe))
            print(markdown(outcomes).splitlines()[-1], flush=True)
    print(markdown(outcomes))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "upcycling.md").write_text(markdown(outcomes) + "\n")
        (arguments.out / "upcycling.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))


if __name__ == "__main__":
    main()
