"""`./dev bench recipes`: few wide experts or many narrow ones, at equal weights, equal work and equal tokens.

A recipe is a preset, with what differs behind it:

    standard                           8 experts, 2 a token: softmax over the chosen ones, balanced by a loss
    fine-grained                       64 experts of an eighth of the width, 16 a token: as many weights, as much work
    ...+softmax-first                  gates are the softmax over all experts, not made to sum to one
    ...+shared                         an eighth of the work (in `standard`: half) by an expert that every token takes
    ...+sigmoid                        that, scored by sigmoids and selected by score + bias (GLM-4.5, as DeepSeek-V3)
    ...:train.balance_coef=0           any fact of the manifest; here without the balance loss
    ...:model.capacity_factor=1.25     experts drop tokens above 1.25 times the even share
    ...+sigmoid:train.balance_coef=0:train.bias_rate=0.001   balanced by biases alone

One composer owns everything; with `--composers` more, experts are split among them and each has stand-ins for the rest
(the node's code in one process). Loads are of held-out tokens: 1 is even, and an expert is dead if it gets less than a
hundredth of the even share. Writes a Markdown table and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..node.errors import ConfigError
from ..node.learning.data import Batches, load_corpus
from ..node.learning.evaluate import BATCH_WINDOWS, HELDOUT_SEED
from ..node.model.build import MoEModel
from ..node.model.init import backbone_shapes, expert_shape
from ..node.model.presets import preset
from ..node.run.manifest import Manifest, with_settings
from .inprocess import InProcessSwarm

RECIPES = (
    "standard,fine-grained,standard:train.balance_coef=0,fine-grained:train.balance_coef=0,"
    "standard+softmax-first,fine-grained+softmax-first,standard+shared,fine-grained+shared,"
    "fine-grained:train.z_coef=0,fine-grained:model.capacity_factor=1.25,"
    "fine-grained+sigmoid,fine-grained+sigmoid:train.balance_coef=0:train.bias_rate=0.001"
)
DEAD_SHARE = 0.01


def _softmax_first(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "norm_topk_prob": False}


def _make_room(config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Fewer routed experts, in all and for a token, and by how many: one shared expert as wide takes their place."""
    moved = max(1, config["num_experts_per_tok"] // 8)
    fewer = {key: config[key] - moved for key in ("num_experts", "num_experts_per_tok")}
    return config | fewer, moved


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-MoE, whose shared expert has a gate of its own."""
    fewer, moved = _make_room(config)
    return {key: value for key, value in fewer.items() if key != "head_dim"} | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": moved * config["moe_intermediate_size"],
    }


def _sigmoid(config: dict[str, Any]) -> dict[str, Any]:
    """GLM-4.5, without groups of experts."""
    fewer, moved = _make_room(config)
    return {key: value for key, value in fewer.items() if key != "num_experts"} | {
        "model_type": "glm4_moe",
        "n_routed_experts": fewer["num_experts"],
        "n_shared_experts": moved,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": True,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
    }


VARIANTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "softmax-first": _softmax_first,
    "shared": _shared,
    "sigmoid": _sigmoid,
}


@dataclass(frozen=True)
class Outcome:
    """One recipe with one seed; loss in nats per byte, loads and dead experts over held-out tokens."""

    recipe: str
    seed: int
    loss: float
    weights: int
    active_weights: int  # that a token meets
    heaviest: float  # load of a layer's busiest expert over the mean, mean over layers
    dead: float  # share of experts
    tokens_per_second: float


def manifest_of(recipe: str, steps: int, chance: int = 0) -> Manifest:
    """Raises ValueError or ConfigError for a recipe that there is not."""
    name, *settings = recipe.split(":")
    base, *variants = name.split("+")
    chosen = preset(base)
    config = chosen.model.config
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"no variant {variant!r}: choose from {', '.join(VARIANTS)}")
        config = VARIANTS[variant](config)
    train = msgspec.structs.replace(chosen.train, steps=steps, warmup_steps=min(chosen.train.warmup_steps, steps // 10))
    manifest = Manifest(
        name="bench",
        founder="none",
        created_at=0,
        model=msgspec.structs.replace(chosen.model, config=config, seed=chosen.model.seed + chance),
        data=chosen.data,
        train=train,
        outer=chosen.outer,
        standin=chosen.standin,
    )
    return with_settings(manifest, settings)


def weights_of(manifest: Manifest) -> tuple[int, int]:
    """All weights, and those that a token meets (embeddings left out of neither)."""
    shape, config = expert_shape(manifest.model), manifest.model.config
    backbone = sum(math.prod(size) for size in backbone_shapes(manifest.model).values())
    expert = 3 * shape.hidden * shape.width * shape.num_layers
    return backbone + shape.num_experts * expert, backbone + config["num_experts_per_tok"] * expert


def train(manifest: Manifest, composers: int, chance: int, report: Callable[[int, float], None]) -> MoEModel:
    """The model that `composers` make together, all experts in it."""
    corpus, spec = load_corpus(manifest.data.corpus), manifest.train
    sources = [
        Batches(corpus.shard(i, composers), spec.batch_size, manifest.data.context_length, seed=i + 1000 * chance)
        for i in range(composers)
    ]
    slots = range(expert_shape(manifest.model).num_experts)
    swarm = InProcessSwarm(
        manifest, [source.next for source in sources], [slots[i::composers] for i in range(composers)]
    )
    for step, loss in enumerate(swarm.run(spec.steps), start=1):
        report(step, loss)
    return swarm.composers[0].model if composers == 1 else swarm.merged().model


@torch.no_grad()
def held_out(model: MoEModel, windows_NS: Tensor) -> tuple[float, Tensor]:
    """Nats per token, and how many (L, E) tokens each expert of each layer was chosen for."""
    loss, counts = 0.0, []
    for batch in torch.split(windows_NS, BATCH_WINDOWS):
        losses = model.loss(batch)
        loss += losses.lm.item() * len(batch)
        counts.append(losses.counts)
    return loss / len(windows_NS), torch.stack(counts).sum(0)


def loads(counts_LE: Tensor) -> tuple[float, float]:
    """The heaviest load over the mean, averaged over layers, and the share of dead experts."""
    load_LE = counts_LE / counts_LE.double().mean(dim=1, keepdim=True)
    return load_LE.amax(dim=1).mean().item(), (load_LE < DEAD_SHARE).double().mean().item()


def run(recipe: str, steps: int, windows: int, composers: int, chance: int) -> Outcome:
    """Train and measure one recipe with one seed."""

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"{recipe}: step {step}, loss {loss:.4f}", flush=True)

    manifest = manifest_of(recipe, steps, chance)
    began = time.monotonic()
    model = train(manifest, composers, chance, report)
    seconds = time.monotonic() - began
    context = manifest.data.context_length
    loss, counts = held_out(model, load_corpus(manifest.data.corpus).heldout(windows, context, seed=HELDOUT_SEED))
    heaviest, dead = loads(counts)
    tokens = composers * steps * manifest.train.batch_size * context
    total, active = weights_of(manifest)
    return Outcome(recipe, chance, loss, total, active, heaviest, dead, tokens / seconds)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One line a recipe, means over seeds; `±` is half of the way from the least to the most."""
    first = {outcome.seed: outcome.loss for outcome in outcomes if outcome.recipe == outcomes[0].recipe}
    lines = [
        f"| recipe | weights, M | active, M | nats/byte | vs {outcomes[0].recipe} | heaviest load | dead | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in dict.fromkeys(outcome.recipe for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.recipe == recipe]
        losses = [one.loss for one in runs]
        gap = 100 * statistics.mean(one.loss / first[one.seed] - 1 for one in runs if one.seed in first)
        spread = f" ± {(max(losses) - min(losses)) / 2:.3f}" if len(losses) > 1 else ""
        lines.append(
            f"| `{recipe}` | {runs[0].weights / 1e6:.2f} | {runs[0].active_weights / 1e6:.2f} "
            f"| {statistics.mean(losses):.3f}{spread} | {gap:+.1f}% "
            f"| {statistics.mean(one.heaviest for one in runs):.2f} | {statistics.mean(one.dead for one in runs):.1%} "
            f"| {statistics.mean(one.tokens_per_second for one in runs):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train every recipe named, print and write the table."""
    parser = argparse.ArgumentParser(
        prog="./dev bench recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", default=RECIPES, help="comma-separated; the first is the reference")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each recipe, with other weights and batches")
    parser.add_argument("--composers", type=int, default=1)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for recipes.md and recipes.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipes = arguments.recipes.split(",")
    try:
        for recipe in recipes:
            weights_of(manifest_of(recipe, arguments.steps))
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    outcomes: list[Outcome] = []
    for chance in range(arguments.seeds):
        for recipe in recipes:
            outcomes.append(run(recipe, arguments.steps, arguments.windows, arguments.composers, chance))
            if arguments.out is not None:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "recipes.md").write_text(markdown(outcomes) + "\n")
                (arguments.out / "recipes.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    print(markdown(outcomes))


if __name__ == "__main__":
    main()
