"""Biases by which routers select experts: weights like others, but moved towards even load and never by gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from shoal.node import cli
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, restore_backbone
from shoal.node.model.export import write_checkpoint
from shoal.node.model.init import backbone_shapes
from shoal.node.run.manifest import Manifest
from shoal.node.seed.split import Checkpoint
from shoal.node.seed.start import FromSeed
from shoal.node.seed.store import SeedStore
from shoal.node.storage.checkpoint import CheckpointStore
from tiny import CONFIG, HIDDEN, LAYERS, SLOTS, WIDTH, composer_of, manifest_of, train
from transformers import AutoModelForCausalLM

RATE = 0.01
GLM: dict[str, Any] = {key: value for key, value in CONFIG.items() if key != "num_experts"} | {
    "model_type": "glm4_moe",
    "n_routed_experts": SLOTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "initializer_range": 0.2,
}
NAMES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(LAYERS)]


def glm(**train_spec: Any) -> Manifest:
    manifest = manifest_of(train={"bias_rate": RATE, **train_spec})
    return msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, config=GLM))


def biases(composer: Composer) -> list[list[float]]:
    return [composer.backbone[name].tolist() for name in NAMES]


def test_they_are_weights_of_the_backbone() -> None:
    composer = composer_of(glm())
    assert {name: backbone_shapes(composer.manifest.model).get(name) for name in NAMES} == dict.fromkeys(
        NAMES, (SLOTS,)
    )
    merged = [name for fragment in composer.fragments for name in fragment.names]
    assert set(NAMES) <= set(merged)
    assert not any(composer.backbone[name].requires_grad for name in NAMES)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_each_step_moves_them_towards_even_load(optimizer: str) -> None:
    composer = composer_of(glm(optimizer=optimizer, learning_rate=0.1))
    composer.swarm_counts = torch.zeros(LAYERS, SLOTS)
    composer.swarm_counts[0, 2] = 1e6  # whatever is routed here, expert 2 of the first layer has too much in the swarm
    train(composer, 1)
    assert composer.last_counts is not None
    counts = composer.last_counts + composer.swarm_counts
    missing = (counts.double().mean(1, keepdim=True) - counts).sign()
    assert missing[0].tolist() == [1, 1, -1, 1]
    assert torch.tensor(biases(composer)).numpy() == pytest.approx((RATE * missing).numpy())


def test_a_step_that_is_not_finite_moves_none() -> None:
    composer = composer_of(glm())
    with torch.no_grad():
        composer.backbone["model.layers.0.input_layernorm.weight"][0] = torch.nan
    composer.train_step()
    assert biases(composer) == [[0.0] * SLOTS] * LAYERS


def test_load_evens_out() -> None:
    def unevenness(rate: float) -> float:
        composer = composer_of(glm(bias_rate=rate, balance_coef=0.0, learning_rate=1e-6), seed=1)
        train(composer, 60)
        total = torch.zeros(LAYERS, SLOTS)
        for _ in range(8):
            train(composer, 1)
            assert composer.last_counts is not None
            total += composer.last_counts
        return (total / total.mean(1, keepdim=True)).amax().item()

    assert unevenness(RATE) < 1 + 0.6 * (unevenness(0.0) - 1)


def test_merging_makes_them_equal() -> None:
    pair = [composer_of(glm()) for _ in range(2)]
    for composer in pair:
        train(composer, 5)
    assert biases(pair[0]) != biases(pair[1])
    mean = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*map(biases, pair), strict=True)]
    for index in range(len(pair[0].fragments)):
        vectors = [composer.begin_round(index).vector for composer in pair]
        for composer in pair:
            composer.commit_round(index, *composer.propose(index, (vectors[0] + vectors[1]) / 2))
    assert biases(pair[0]) == biases(pair[1])
    assert torch.tensor(biases(pair[0])).numpy() == pytest.approx(torch.tensor(mean).numpy(), abs=1e-7)


def test_checkpoints_hold_them(tmp_path: Path) -> None:
    composer = composer_of(glm())
    train(composer, 3)
    store = CheckpointStore(tmp_path)
    store.save(composer.step, composer_tensors(composer), {"step": composer.step, "tokens": composer.tokens})
    checkpoint = store.latest()
    assert checkpoint is not None
    again = composer_of(glm(), owned=())
    restore_backbone(again, checkpoint.tensors, checkpoint.meta)
    assert biases(again) == biases(composer) != [[0.0] * SLOTS] * LAYERS


def test_they_are_exported_and_start_another_run(tmp_path: Path) -> None:
    composer = composer_of(glm(bias_rate=0.3))  # so large that they decide which experts are taken
    train(composer, 3)
    model, tokens = composer.model, torch.randint(256, (2, 16))

    def expert_of(layer: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        return model.shards[layer].expert(slot).dense()

    write_checkpoint(tmp_path / "out", model.spec, model.backbone, expert_of)
    with torch.no_grad():
        ours = model(tokens)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, local_files_only=True)
        torch.testing.assert_close(plain.eval()(input_ids=tokens).logits, ours, rtol=1e-5, atol=1e-5)
        for name in NAMES:
            plain.get_buffer(name).zero_()
        assert not torch.allclose(plain(input_ids=tokens).logits, ours, rtol=1e-2, atol=1e-2)

    checkpoint = Checkpoint(tmp_path / "out")
    start = checkpoint.split(tmp_path / "seed", composer.manifest.standin, lambda done, of: None)
    spec = msgspec.structs.replace(composer.manifest.model, config=checkpoint.config(), start=start)
    manifest = msgspec.structs.replace(composer.manifest, model=spec)
    store = SeedStore(tmp_path / "seed", start)
    again = Composer(
        manifest, owned=range(SLOTS), next_batch=lambda: torch.empty(0), start=FromSeed(manifest.model, store)
    )
    assert biases(again) == biases(composer)
    torch.testing.assert_close(again.model(tokens), ours, rtol=1e-5, atol=1e-5)
    assert (again.shape.hidden, again.shape.width) == (HIDDEN, WIDTH)


def test_who_has_none_cannot_be_balanced_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="selection biases"):
        composer_of(manifest_of(train={"bias_rate": RATE}))
    assert cli.main(["found", "--set", "train.bias_rate=0.001"]) == 2
    assert "leave it at 0" in capsys.readouterr().err
