"""Initial weights are a pure function of the seed and the name."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import msgspec
import pytest
import torch
from shoal.node.model.build import build_model
from shoal.node.model.init import expert_shape, expert_weights, fill_normal, fill_uniform, random_stream
from shoal.node.model.presets import preset
from shoal.node.run.manifest import ModelSpec, StandInSpec

SPEC = ModelSpec(config={**preset("tiny").model.config, "initializer_range": 0.02})
GOLDEN = ["31d60319e28f985f", "172ba2a31c852ffa", "9bb24c6838ba6a73"]


def digest_of_everything(*, experts_first: bool, owned: list[int]) -> str:
    digest = hashlib.sha256()
    if experts_first:
        for layer in reversed(range(3)):
            expert_weights(SPEC, layer, 5)
    model = build_model(SPEC, owned=owned, standin=StandInSpec())
    for name, parameter in sorted(model.backbone.items()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    for layer in range(3):
        for slot in range(16):
            for tensor in expert_weights(SPEC, layer, slot):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def test_equal_in_other_processes_whatever_they_own_and_in_whatever_order() -> None:
    other = subprocess.run([sys.executable, __file__], check=True, capture_output=True, text=True, timeout=800)
    assert other.stdout.split() == [digest_of_everything(experts_first=False, owned=[2, 7])]


def test_equal_on_every_machine() -> None:
    """Fixed values: if this fails, peers of different versions would start a run from different models."""
    gate_up, down = expert_weights(SPEC, 1, 3)
    model = build_model(SPEC, owned=(), standin=StandInSpec())
    assert [sha(gate_up), sha(down), sha(model.backbone["model.embed_tokens.weight"])] == GOLDEN


def test_what_a_manifest_states_of_its_experts_must_be_so() -> None:
    shape = expert_shape(SPEC)
    stated = msgspec.structs.replace(SPEC, experts=shape)
    assert build_model(stated, owned=(), standin=StandInSpec()).num_slots == shape.num_experts
    other = msgspec.structs.replace(SPEC, experts=msgspec.structs.replace(shape, width=shape.width + 1))
    with pytest.raises(ValueError, match="states"):
        build_model(other, owned=(), standin=StandInSpec())


def test_owned_experts_start_from_their_seeded_weights() -> None:
    model = build_model(SPEC, owned=[3, 9], standin=StandInSpec())
    for layer in range(3):
        for slot in (3, 9):
            expert = model.experts_of(slot)[layer]
            for ours, seeded in zip(expert.dense(), model.initial_expert(layer, slot), strict=True):
                assert torch.equal(ours, seeded)


def test_every_seed_layer_slot_and_matrix_has_its_own_weights() -> None:
    other = ModelSpec(config=SPEC.config, seed=1)
    seen = [
        sha(tensor)
        for spec in (SPEC, other)
        for layer in range(3)
        for slot in range(16)
        for tensor in expert_weights(spec, layer, slot)
    ]
    assert len(set(seen)) == len(seen) == 2 * 3 * 16 * 2
    backbone = [
        sha(p)
        for spec in (SPEC, other)
        for name, p in build_model(spec, owned=(), standin=StandInSpec()).backbone.items()
        if "norm" not in name
    ]
    assert len(set(backbone)) == len(backbone)


def test_values_follow_the_familys_rules() -> None:
    spec = ModelSpec(config={**SPEC.config, "initializer_range": 0.05, "attention_bias": True, "pad_token_id": 7})
    model = build_model(spec, owned=(), standin=StandInSpec())
    for name, parameter in model.backbone.items():
        if "norm" in name:
            assert bool((parameter == 1).all()), name
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(parameter.mean().item()) < 5 * 0.05 / parameter.numel() ** 0.5, name
    assert not model.backbone["model.embed_tokens.weight"][7].any()


def test_normal_variates_are_normal() -> None:
    n = 1 << 20
    x = fill_normal(torch.empty(n), 0.0, 1.0, random_stream(int(torch.seed()), "test")).double()
    assert abs(x.mean().item()) < 5 / n**0.5
    assert x.var().item() == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert x.pow(4).mean().item() == pytest.approx(3, abs=0.06)  # 96/n of variance, and a bounded tail
    for level in (0.5, 1.0, 2.0, 3.0):
        expected = 1 - torch.special.ndtr(torch.tensor(level, dtype=torch.float64)).item()
        assert (x > level).double().mean().item() == pytest.approx(expected, abs=5 * (expected / n) ** 0.5)
    lagged = (x[1:] * x[:-1]).mean().item()
    assert abs(lagged) < 5 / n**0.5


def test_uniform_variates_are_uniform() -> None:
    n = 1 << 18
    x = fill_uniform(torch.empty(n), -2.0, 6.0, random_stream(int(torch.seed()), "test"))
    assert bool(((x >= -2) & (x < 6)).all())
    histogram = x.histc(16, -2, 6)
    assert bool(((histogram - n / 16).abs() < 6 * (n / 16) ** 0.5).all())


def test_filling_does_not_depend_on_the_layout_in_memory() -> None:
    plain = fill_normal(torch.empty(30, 50), 0.0, 1.0, random_stream(1, "layout"))
    strided = torch.empty(50, 30).t()
    fill_normal(strided, 0.0, 1.0, random_stream(1, "layout"))
    assert torch.equal(plain, strided)


def test_experts_that_do_not_exist_are_refused() -> None:
    assert expert_shape(SPEC).num_experts == 16
    for layer, slot in ((3, 0), (0, 16), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="no expert"):
            expert_weights(SPEC, layer, slot)


if __name__ == "__main__":
    sys.stdout.write(digest_of_everything(experts_first=True, owned=[]))
