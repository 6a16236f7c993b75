"""Router losses against naive float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from shoal.node.model.balance import router_losses
from shoal.node.model.build import build_model
from shoal.node.model.families import Scoring
from shoal.node.model.presets import preset
from shoal.node.run.manifest import ModelSpec, StandInSpec
from torch import Tensor

LAYERS, TOKENS, EXPERTS, TOP_K = 3, 40, 8, 2


def draw() -> tuple[list[Tensor], Tensor]:
    seed = torch.seed() % 2**31
    print("seed", seed)
    rng = torch.Generator().manual_seed(seed)
    logits = [torch.randn(TOKENS, EXPERTS, generator=rng).mul(2).requires_grad_() for _ in range(LAYERS)]
    counts = torch.stack([torch.bincount(x.topk(TOP_K).indices.flatten(), minlength=EXPERTS) for x in logits])
    return logits, counts


def naive(logits: list[Tensor], counts: Tensor, scoring: Scoring) -> tuple[float, float]:
    balance = z = 0.0
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            mean = 0.0
            for row in logits[layer].tolist():
                score = [math.exp(v) if scoring == "softmax" else 1 / (1 + math.exp(-v)) for v in row]
                mean += score[expert] / sum(score) / TOKENS
            share = float(counts[layer, expert]) / float(counts[layer].sum())
            balance += EXPERTS * share * mean / LAYERS
        z += sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits[layer].tolist()) / TOKENS / LAYERS
    return balance, z


@pytest.mark.parametrize("swarm", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_matches_the_formulas(scoring: Scoring, swarm: bool) -> None:
    logits, counts = draw()
    others = torch.randint(0, 500, counts.shape) if swarm else None
    balance, z = router_losses(logits, counts, scoring=scoring, swarm_counts_LE=others)
    expected = naive(logits, counts if others is None else counts + others, scoring)
    assert balance.item() == pytest.approx(expected[0], rel=1e-5)
    assert z.item() == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradients_are_those_of_the_formulas(scoring: Scoring) -> None:
    logits, counts = draw()
    balance, z = router_losses(logits, counts, scoring=scoring)
    (balance + z).backward()
    layer, token, expert = 1, 7, 3
    gradient = logits[layer].grad
    assert gradient is not None
    ends = []
    for sign in (1, -1):
        moved = [x.detach().double() for x in logits]
        moved[layer][token, expert] += sign * 1e-5
        ends.append(sum(naive(moved, counts, scoring)))
    numeric = (ends[0] - ends[1]) / 2e-5
    assert gradient[token, expert].item() == pytest.approx(numeric, rel=1e-3, abs=1e-6)


def test_even_routing_gives_one_and_collapse_gives_the_number_of_experts() -> None:
    even, _ = router_losses([torch.zeros(5, EXPERTS)], torch.full((1, EXPERTS), 7), scoring="softmax")
    counts = torch.zeros(1, EXPERTS)
    counts[0, 2] = 9
    logits = torch.full((5, EXPERTS), -50.0)
    logits[:, 2] = 50
    collapsed, _ = router_losses([logits], counts, scoring="softmax")
    assert even.item() == pytest.approx(1)
    assert collapsed.item() == pytest.approx(EXPERTS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, "shape"])
def test_bad_counts_from_the_swarm_are_refused(bad: float | str) -> None:
    logits, counts = draw()
    others = torch.zeros(counts.shape)
    if isinstance(bad, str):
        others = others[:, 1:]
    else:
        others[0, 0] = bad
    with pytest.raises(ValueError, match="swarm counts"):
        router_losses(logits, counts, scoring="softmax", swarm_counts_LE=others)


def test_the_models_losses_are_made_of_its_own_routing() -> None:
    spec = preset("tiny").model
    model = build_model(spec, owned=range(16), standin=StandInSpec())
    logits: list[Tensor] = []
    for shard_block in model.network.model.layers:
        shard_block.mlp.gate.register_forward_hook(lambda _m, _i, out: logits.append(out[0]))
    tokens = torch.randint(256, (2, 32))
    losses = model.loss(tokens, balance_coef=0.5, z_coef=0.25)
    probs = [x.double().softmax(-1) for x in logits]
    chosen = [torch.bincount(p.topk(2).indices.flatten(), minlength=16) for p in probs]
    assert losses.counts.tolist() == [c.tolist() for c in chosen]
    balance = sum(16 * (c / c.sum() * p.mean(0)).sum() for c, p in zip(chosen, probs, strict=True)) / 3
    z = sum(x.double().logsumexp(-1).square().mean() for x in logits) / 3
    lm = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(losses.balance, balance.float())
    torch.testing.assert_close(losses.z, z.float())
    torch.testing.assert_close(losses.lm, lm)
    torch.testing.assert_close(losses.total, losses.lm + 0.5 * losses.balance + 0.25 * losses.z)
    # The counts of others change the balance loss only.
    swarm = torch.zeros(3, 16)
    swarm[:, 0] = 1e6
    other = model.loss(tokens, swarm_counts=swarm)
    torch.testing.assert_close(other.balance.double(), sum(16 * p.mean(0)[0] for p in probs) / 3, rtol=1e-2, atol=0)
    torch.testing.assert_close(other.lm, losses.lm)
    losses.balance.backward()
    assert all(layer.mlp.gate.weight.grad.any() for layer in model.network.model.layers)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3_moe", "softmax"), ("mixtral", "softmax"), ("deepseek_v3", "sigmoid"), ("glm4_moe", "sigmoid")],
)
@pytest.mark.parametrize("norm", [False, True])
def test_scoring_is_asked_of_the_router(family: str, expected: str, norm: bool) -> None:
    experts = "num_experts" if family == "qwen3_moe" else "n_routed_experts"
    config = {"model_type": family, "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, experts: 4}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "norm_topk_prob": norm}
    config |= {"intermediate_size": 8, "moe_intermediate_size": 8, "max_position_embeddings": 32, "pad_token_id": None}
    if expected == "sigmoid":
        config |= {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    if family == "deepseek_v3":
        config |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    if family == "mixtral":
        config = {k: v for k, v in config.items() if k not in (experts, "norm_topk_prob")} | {"num_local_experts": 4}
    model = build_model(ModelSpec(config=config), owned=range(4), standin=StandInSpec())
    with torch.no_grad():  # evaluation has losses too
        model.loss(torch.randint(32, (2, 24)))
    assert model._scoring == expected
