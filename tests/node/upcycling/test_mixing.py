"""Branch-Train-MiX: what a mixture computes, and that it is worth it, on three kinds of text."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from shoal.node.cli import main
from shoal.node.errors import ConfigError
from shoal.node.learning.evaluate import evaluate_checkpoint
from shoal.node.upcycling.mixing import TIES_KEPT, domain_tokens, mix, route_by_domains, ties
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def dense(folder: Path, *, hidden: int = 32, **changes: Any) -> Path:
    torch.manual_seed(random.randrange(1 << 30))
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.06, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    config.update(changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits


@pytest.mark.parametrize("merge", ["mean", "ties"])
def test_a_mixture_of_equal_branches_computes_what_each_does(merge: str, tmp_path: Path) -> None:
    seed = dense(tmp_path / "seed")
    mix([seed] * 4, tmp_path / "mix", top_k=2, merge=merge, seed=0)  # type: ignore[arg-type]
    tokens = torch.randint(0, 256, (2, 40))
    wanted = logits(seed, tokens)
    assert float((logits(tmp_path / "mix", tokens) - wanted).norm() / wanted.norm()) < 1e-5


def test_experts_are_the_branches_and_the_rest_is_their_mean(tmp_path: Path) -> None:
    paths = [dense(tmp_path / name) for name in "abc"]
    assert mix(paths, tmp_path / "mix", top_k=1, merge="mean", seed=0)["num_local_experts"] == 3
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "mix")
    members = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    for number, member in enumerate(members):
        mlp = member.model.layers[1].mlp
        experts = mixed.model.layers[1].mlp.experts
        assert torch.equal(experts.down_proj[number], mlp.down_proj.weight)
        assert torch.equal(experts.gate_up_proj[number], torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    mean = torch.stack([member.model.layers[0].self_attn.q_proj.weight for member in members]).mean(0)
    assert torch.allclose(mixed.model.layers[0].self_attn.q_proj.weight, mean)


def test_weight_decay_of_a_branch_is_for_matrices_as_it_is_in_a_run(tmp_path: Path) -> None:
    seed = dense(tmp_path / "seed")
    model = AutoModelForCausalLM.from_pretrained(seed)
    torch.nn.init.zeros_(model.lm_head.weight)  # no gradient passes it, so that decay alone moves what is below
    model.save_pretrained(seed)
    (tmp_path / "text").write_text("branches of one seed " * 40_000)
    numbers = ["--steps", "1", "--batch-size", "2", "--context-length", "32", "--learning-rate", "0.1"]
    assert main(["branch", str(seed), str(tmp_path / "out"), "--data", str(tmp_path / "text"), *numbers]) == 0
    before = dict(model.named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name in before.keys() - {"lm_head.weight"}:
        kept = 1.0 if name.endswith("norm.weight") else 0.99
        torch.testing.assert_close(after[name], kept * before[name], msg=name)


def test_a_negative_bias_keeps_tokens_with_the_generalist(kinds: dict[str, Path], tmp_path: Path) -> None:
    paths = [dense(tmp_path / name) for name in "abcd"]
    tokens = domain_tokens(paths[0], [str(kind) for kind in kinds.values()])
    shares, routers = [], []
    for bias in (0.0, 1.0, 1000.0):
        folder = tmp_path / str(bias)
        mix(paths, folder, top_k=1, merge="mean", seed=0)
        route_by_domains(folder, tokens, bias)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        gate = network.model.layers[0].mlp.gate
        inputs: list[torch.Tensor] = []
        gate.register_forward_hook(lambda _, args, __, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            network(torch.cat(tokens))
        [seen] = inputs
        chosen = (seen @ gate.weight.T).argmax(1)
        shares.append(float((chosen == 0).float().mean()))
        routers.append((gate.weight.detach(), seen))
    (plain, seen), (biased, _), _ = routers
    assert torch.equal(plain[0], biased[0])
    taken = (seen @ (plain - biased)[1:].T).mean(0)
    assert torch.allclose(taken, torch.ones(3), atol=1e-4), "one off each logit, on average"
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[0] < shares[2]


def test_ties_against_one_number_at_a_time() -> None:
    base, others = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(3)]
    changes = [(other - base).flatten().tolist() for other in others]
    keep = round(TIES_KEPT * 35)
    trimmed = []
    for change in changes:
        least = sorted(map(abs, change))[-keep]
        trimmed.append([value if abs(value) >= least else 0.0 for value in change])
    wanted = []
    for start, *values in zip(base.flatten().tolist(), *trimmed, strict=True):
        sign = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [value for value in values if value and (value > 0) - (value < 0) == sign]
        wanted.append(start + (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    assert torch.allclose(ties(base, others).flatten(), torch.tensor(wanted), atol=1e-6)


def test_what_cannot_be_mixed_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = dense(tmp_path / "small"), dense(tmp_path / "large", hidden=64)
    changes: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 16, "hidden_act": "gelu"}
    other = [dense(tmp_path / name, **{name: value}) for name, value in changes.items()]
    for branch in (large, *other):
        with pytest.raises(ConfigError, match="another shape"):
            mix([small, branch], tmp_path / "mix", top_k=1, merge="mean", seed=0)
    with pytest.raises(ConfigError, match="a seed and a branch"):
        mix([small], tmp_path / "mix", top_k=1, merge="mean", seed=0)
    told = ["branch", str(small), str(tmp_path / "out"), "--only", "router", "--steps", "1", "--context-length", "64"]
    assert main(told) == 2
    assert "has no routers" in capsys.readouterr().err
    assert main(["mix", str(tmp_path / "mix"), str(small), str(small), "--generalist", "3"]) == 2
    assert "give --domain" in capsys.readouterr().err
    assert not (tmp_path / "mix").exists()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three kinds of text that every Python brings: tables, prose, code."""
    library, folder = Path(sysconfig.get_path("stdlib")), tmp_path_factory.mktemp("kinds")
    chosen = {
        "tables": sorted((library / "encodings").glob("cp*.py"))[:12],
        "prose": [library / "pydoc_data" / "topics.py"],
        "code": sorted((library / "asyncio").glob("*.py")),
    }
    for kind, paths in chosen.items():
        (folder / kind).mkdir()
        for path in paths:
            (folder / kind / path.name).write_bytes(path.read_bytes())
    return {kind: folder / kind for kind in chosen}


def test_a_mixture_is_better_than_its_seed_and_each_branch(kinds: dict[str, Path], tmp_path: Path) -> None:
    """On the union of the kinds; and tuning the router makes it better still."""

    def learn(start: Path, out: str, data: Path, steps: int, *more: str) -> Path:
        size = ["--batch-size", "8", "--context-length", "64", "--learning-rate", "4e-3", "--device", "cpu"]
        told = ["branch", str(start), str(tmp_path / out), "--data", str(data), "--steps", str(steps), *size, *more]
        assert main(told) == 0
        return tmp_path / out

    def loss(checkpoint: Path) -> float:
        found = [
            evaluate_checkpoint(checkpoint, data=str(kind), windows=24, context_length=64) for kind in kinds.values()
        ]
        return sum(each.nats_per_token for each in found) / len(found)

    union = next(iter(kinds.values())).parent
    seed = learn(dense(tmp_path / "first", hidden=64), "seed", union, 60)
    branches = [learn(seed, kind, data, 120) for kind, data in kinds.items()]
    domains = [option for data in kinds.values() for option in ("--domain", str(data))]
    mixed = tmp_path / "mixed"
    assert main(["mix", str(mixed), str(seed), *map(str, branches), "--top-k", "2", *domains]) == 0
    tuned = learn(mixed, "tuned", union, 160, "--only", "router")
    losses = {path.name: loss(path) for path in (seed, *branches, mixed, tuned)}
    print(losses)
    others = min(losses[path.name] for path in (seed, *branches))
    assert losses["tuned"] < others
    assert losses["tuned"] < losses["mixed"]
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (mixed, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".gate.weight")}
