"""Presets are runs that can be trained."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
import torch
from shoal.node.config import PresetName
from shoal.node.model.build import build_model
from shoal.node.model.init import expert_shape
from shoal.node.model.presets import PRESETS, preset
from shoal.node.run.manifest import ModelSpec

# (experts, active per token, expert width, hidden, MoE layers)
EXPECTED = {
    "tiny": (16, 2, 64, 64, 3),
    "small": (64, 8, 128, 256, 6),
    "bench": (16, 2, 64, 64, 3),
    "standard": (8, 2, 256, 128, 3),
    "fine-grained": (64, 16, 32, 128, 3),
}


def test_the_command_line_knows_them_all() -> None:
    assert get_args(PresetName) == tuple(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_the_documented_ones(name: str) -> None:
    parts = preset(name)
    shape = expert_shape(parts.model)
    top_k = parts.model.config["num_experts_per_tok"]
    assert (shape.num_experts, top_k, shape.width, shape.hidden, shape.num_layers) == EXPECTED[name]
    assert parts.data.context_length <= parts.model.config["max_position_embeddings"]
    assert msgspec.convert(msgspec.json.decode(msgspec.json.encode(parts.model)), ModelSpec) == parts.model


@pytest.mark.parametrize("name", ["tiny", "bench", "standard", "fine-grained"])
def test_small_presets_learn_at_once(name: str) -> None:
    parts = preset(name)
    model = build_model(parts.model, owned=[0, 1, 2, 3], standin=parts.standin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=parts.train.learning_rate)
    tokens = (torch.arange(64) % 7 + 65).repeat(2, 1)
    first = model.loss(tokens).lm.item()
    assert first == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)  # knows nothing yet; small random logits
    for _ in range(12):
        model.loss(tokens).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(tokens).lm.item() < first - 1


def test_fine_grained_is_standard_cut_finer() -> None:
    """As many expert weights, in all and for each token."""
    of = {name: EXPECTED[name] for name in ("standard", "fine-grained")}
    assert len({experts * width for experts, _, width, _, _ in of.values()}) == 1
    assert len({active * width for _, active, width, _, _ in of.values()}) == 1
    assert len({(hidden, layers) for *_, hidden, layers in of.values()}) == 1


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tiny, small, bench, standard, fine-grained"):
        preset("huge")
