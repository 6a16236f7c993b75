"""A model so small that a test can train it, and what tests of the composer need around it."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import torch
from shoal.node.learning.composer import Composer
from shoal.node.model.start import Seeded
from shoal.node.run.manifest import DataSpec, Manifest, ModelSpec, OuterSpec, SketchSpec, StandInSpec, TrainSpec
from torch import Tensor

SLOTS, LAYERS, HIDDEN, WIDTH = 4, 2, 32, 24
CONTEXT, BATCH = 16, 2

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": SLOTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def manifest_of(
    *,
    train: dict[str, Any] | None = None,
    outer: dict[str, Any] | None = None,
    standin: dict[str, Any] | None = None,
    sketch: dict[str, Any] | None = None,
) -> Manifest:
    """A run of the smallest model. Keywords go to the spec of that name."""
    return Manifest(
        name="tiny",
        founder="12D3KooWtiny",
        created_at=0,
        model=ModelSpec(config=CONFIG),
        data=DataSpec(context_length=CONTEXT),
        train=TrainSpec(**{"batch_size": BATCH, "steps": 100, "warmup_steps": 4} | (train or {})),
        outer=OuterSpec(**outer or {}),
        standin=StandInSpec(**standin or {}),
        sketch=SketchSpec(**sketch or {}),
    )


def batches(seed: int | None = None) -> Callable[[], Tensor]:
    """Random tokens, another batch at every call; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(secrets.randbits(32) if seed is None else seed)
    return lambda: torch.randint(0, 256, (BATCH, CONTEXT), generator=generator)


def composer_of(
    manifest: Manifest | None = None,
    *,
    owned: Any = range(SLOTS),
    seed: int | None = None,
    next_batch: Callable[[], Tensor] | None = None,
    fit_seed: int = 0,
    secret: bytes = b"",
    device: str = "cpu",
) -> Composer:
    """A composer of `manifest`, by default of `manifest_of()`."""
    next_batch, manifest = next_batch or batches(seed), manifest or manifest_of()
    start = Seeded(manifest.model, secret)
    return Composer(manifest, owned=owned, next_batch=next_batch, fit_seed=fit_seed, start=start, device=device)


def train(composer: Composer, steps: int) -> list[float]:
    """The losses of `steps` inner steps."""
    return [composer.train_step().loss for _ in range(steps)]


def backbone_bits(composer: Composer) -> dict[str, bytes]:
    """The backbone's exact bytes, by name."""
    return {name: parameter.detach().numpy().tobytes() for name, parameter in composer.backbone.items()}


def expert_bits(composer: Composer, slot: int) -> list[bytes]:
    """An owned slot's exact bytes."""
    experts = composer.model.experts_of(slot)
    return [t.detach().numpy().tobytes() for expert in experts for t in (expert.gate_up, expert.down)]
