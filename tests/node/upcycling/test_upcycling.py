"""Upcycling: the MoE computes what the dense model does, and copies differ only where they were asked to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from shoal.node.cli import main
from shoal.node.errors import ConfigError
from shoal.node.upcycling.convert import Changes, Upcycled, upcycle
from shoal.node.upcycling.dense import Dense
from shoal.node.upcycling.form import Form
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def dense(family: str, folder: Path, *, tied: bool = False) -> Path:
    """A random dense model with weights large enough to matter."""
    torch.manual_seed(random.randrange(1 << 30))
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=5e4, tie_word_embeddings=tied))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=tied))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    path = folder / family
    model.save_pretrained(path)
    return path


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def relative_error(path: Path, moe: Path, tokens: torch.Tensor) -> float:
    wanted = logits(path, tokens)
    return float((logits(moe, tokens) - wanted).norm() / wanted.norm())


def make(path: Path, form: Form, changes: Changes = Changes()) -> Path:  # noqa: B008 - frozen
    out = path.parent / f"moe-{random.randrange(1 << 30)}"
    upcycle(path, out, form, changes, lambda done, total: None)
    return out


FORMS = {
    "E8G1T2": Form(experts=8, granularity=1, top_k=2),
    "E8G8T8": Form(experts=64, granularity=8, top_k=8),
    "G4T8, two copies taken": Form(experts=16, granularity=4, top_k=8),
    "shared": Form(experts=12, granularity=4, shared=1, top_k=6),
    "two shared": Form(experts=8, granularity=4, shared=2, top_k=2),
}
FIRST = {"llama": Form(12, 4, 6, shared=1, gates="softmax-first"), "qwen3": Form(16, 4, 8, gates="softmax-first")}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LlamaConfig(**SIZES, attention_bias=True), "attention has biases"),
        (LlamaConfig(**SIZES, mlp_bias=True), "feed-forward layers have biases"),
        (Qwen3Config(**SIZES, head_dim=16, use_sliding_window=True, sliding_window=4, max_window_layers=1), "a window"),
    ],
)
def test_what_experts_could_not_compute_is_refused(
    config: LlamaConfig | Qwen3Config, says: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=says):
        make(tmp_path / "dense", Form())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_function_is_preserved(family: str, form: Form, tmp_path: Path) -> None:
    path = dense(family, tmp_path, tied=random.random() < 0.5)
    tokens = torch.randint(0, 96, (3, 40))
    assert relative_error(path, make(path, form), tokens) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_softmax_first_all_but_a_few_tokens_are(family: str, tmp_path: Path) -> None:
    path = dense(family, tmp_path)
    tokens = torch.randint(0, 96, (64, 2))  # short, because attention spreads what one token gets wrong
    wanted, got = logits(path, tokens), logits(make(path, FIRST[family]), tokens)
    errors = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.quantile(0.9)) < 5e-4


def test_a_scale_on_the_gate_too_would_break_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dense("llama", tmp_path)
    real = Upcycled.expert

    def scaled(self: Upcycled, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = real(self, layer, expert)
        root = self.form.scale**0.5
        width = len(gate_up) // 2
        return torch.cat((gate_up[:width] * root, gate_up[width:])), down

    monkeypatch.setattr(Upcycled, "expert", scaled)
    assert relative_error(path, make(path, FORMS["E8G8T8"]), torch.randint(0, 96, (2, 30))) > 1e-2


def test_copies_differ_as_asked_and_the_first_does_not(tmp_path: Path) -> None:
    path = dense("llama", tmp_path)
    form = Form(experts=8, granularity=2, top_k=2)
    with Dense(path) as source:
        plain, noisy = Upcycled(source, form, Changes()), Upcycled(source, form, Changes(noise=0.5, seed=3))
        fresh, again = (Upcycled(source, form, Changes(reinit=0.25, seed=3)) for _ in range(2))
        for expert in (0, 1):
            assert torch.equal(noisy.expert(1, expert)[0], plain.expert(1, expert)[0])
            assert torch.equal(fresh.expert(1, expert)[1], plain.expert(1, expert)[1])
        (gate_up, down), (old_gate_up, old_down) = fresh.expert(1, 5), plain.expert(1, 5)
        changed = (down != old_down).any(0)
        assert int(changed.sum()) == 8, "a quarter of 32 neurons"
        assert torch.equal((gate_up != old_gate_up).any(1), changed.repeat(2)), "whole neurons"
        assert torch.equal(again.expert(1, 5)[0], gate_up), "the same again"
        assert not torch.equal(fresh.expert(1, 7)[0], fresh.expert(1, 5)[0])
        off = noisy.expert(0, 4)[1] - plain.expert(0, 4)[1]
        assert 0.35 < float(off.std() / plain.expert(0, 4)[1].std()) < 0.65


def test_all_shards_of_a_copy_share_a_row_of_the_router(tmp_path: Path) -> None:
    form = Form(experts=12, granularity=4, shared=1, top_k=3)
    with Dense(dense("qwen3", tmp_path)) as source:
        made = Upcycled(source, form, Changes())
        [router] = [made[name] for name in made if name.endswith("layers.1.mlp.gate.weight")]
    rows = router.view(4, 3, 32)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(torch.unique(rows[:, 0], dim=0)) == 4
    assert [form.copy_of(expert) for expert in range(12)] == [e // 3 for e in range(12)]


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"experts": 0}, "1 or more"),
        ({"experts": 1 << 20}, "too many"),
        ({"granularity": 2, "shared": 2}, "leave none to route"),
        ({"experts": 9, "granularity": 2, "top_k": 2}, "no multiple of 2"),
        ({"experts": 8, "granularity": 4, "top_k": 2}, "whole copies"),
        ({"experts": 2, "top_k": 4}, "whole copies"),
    ],
)
def test_numbers_that_do_not_go_together(numbers: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Form(**numbers)
    assert caught.value.fix


def test_what_cannot_be_upcycled_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upcycle", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    path = dense("llama", tmp_path)
    assert (
        main(["upcycle", str(path), str(tmp_path / "out"), "--granularity", "5", "--experts", "5", "--top-k", "5"]) == 2
    )
    assert "cannot be cut into 5" in capsys.readouterr().err
    assert main(["upcycle", str(path), str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    assert main(["upcycle", str(path), str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    moe = make(dense("qwen3", tmp_path), Form(experts=2, top_k=1))
    assert main(["upcycle", str(moe), str(tmp_path / "out")]) == 2
    assert "family qwen3_moe" in capsys.readouterr().err


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = dense("qwen3", tmp_path), tmp_path / "moe"
    assert main(["upcycle", str(path), str(out), "--experts", "8", "--granularity", "2", "--top-k", "4"]) == 0
    assert "qwen3_moe, 4 copies of 2 shards" in capsys.readouterr().out
    assert relative_error(path, out, torch.randint(0, 96, (2, 20))) < 1e-4
