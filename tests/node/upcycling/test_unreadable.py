"""Checkpoints that are not there, damaged or cut off: every command that reads one says so, and leaves nothing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from shoal.node.cli import main
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "dense"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    words = ["t", "1", "t1", *(f"x{number}" for number in range(93))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["t 1"])
    shapes = {"token_embd": (len(words), 32), "output": (len(words), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size - 1)])  # without a newline it is whole


DAMAGE: dict[str, Callable[[Path], object]] = {
    "not there": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config cut": lambda folder: cut(folder / "config.json"),
    "config of nothing": lambda folder: (folder / "config.json").write_text("{}"),
    "config no object": lambda folder: (folder / "config.json").write_text("[1]"),
    "unknown family": lambda folder: (folder / "config.json").write_text('{"model_type": "martian"}'),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": lambda folder: cut(folder / "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_command_says_what_it_cannot_read(
    damage: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "bad")
    DAMAGE[damage](Path("bad"))
    Path("text").mkdir()
    Path("text/a.txt").write_text("so it goes " * 2000)
    home = ["--data-dir", str(tmp_path / "home")]
    for bad in ("bad", "./bad", str(tmp_path / "bad")):
        for command in (
            ["upcycle", bad, "out"],
            ["branch", bad, "out", "--steps", "1", "--data", "text"],
            ["mix", "out", str(whole), bad],
            ["mix", "out", bad, str(whole)],
            ["plan", bad],
            ["evaluate", bad, "--data", "text", "--windows", "1"],
            ["found", "--seed", bad, *home],
            ["found", "--model", bad, *home],
        ):
            assert main(command) in (1, 2), command
            err = capsys.readouterr().err
            assert "fix: " in err, (command, err)
            assert not Path("out").exists()


def test_a_gguf_file_that_is_cut_off(whole_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upcycle", str(whole_gguf), str(tmp_path / "good")]) == 0
    data = whole_gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in (0, 10, 60, 300, *(random.randrange(len(data) - 32) for _ in range(4))):
        bad.write_bytes(data[:length])
        assert main(["upcycle", str(bad), str(tmp_path / "out")]) == 2, length
        err = capsys.readouterr().err
        assert f"{bad} cannot be read" in err
        assert "fix: download it again" in err
        assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    (bad / "tokenizer.json").write_text("{nope")
    for command in (["upcycle", str(bad), str(tmp_path / "out")], ["mix", str(tmp_path / "out"), str(bad), str(whole)]):
        assert main(command) == 2
        assert "cannot be read" in capsys.readouterr().err


def test_a_text_that_is_not_there_leaves_no_mixture(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("so it goes " * 60_000)
    out = tmp_path / "out"
    mix = ["mix", str(out), str(whole), str(whole), str(whole), "--domain", str(text)]
    for domains, says in ((["--domain", str(tmp_path / "typo")], "typo"), ([], "1 domains for 2 branches")):
        assert main([*mix, *domains]) in (1, 2)
        assert says in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert main([*mix, "--domain", str(text)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text"]


@pytest.mark.parametrize("command", ["upcycle", "branch", "mix"])
def test_a_folder_that_cannot_be_made_is_known_before_the_work(
    command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out, missing = str(tmp_path / "file" / "out"), str(tmp_path / "missing")
    arguments = [out, str(whole), missing] if command == "mix" else [missing, out]
    assert main([command, *arguments]) == 2
    assert f"{out} cannot be made" in capsys.readouterr().err


def test_numbers_that_nothing_can_be_trained_or_drawn_with(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("so it goes " * 60_000)
    branch = ["branch", str(whole), "out", "--data", "text", "--context-length", "16"]
    for command in (
        [*branch, "--steps", "0"],
        [*branch, "--steps", "-1"],
        [*branch, "--batch-size", "0"],
        [*branch[:-1], "1"],  # tokens that have none before them: the loss of nothing is not a number
        [*branch[:-1], str(1 << 20)],  # more positions than the model has
        [*branch, "--learning-rate", "nan"],
        [*branch, "--learning-rate", "0"],
        [*branch, "--seed", "-1"],
        [*branch, "--device", "tpu"],
        [*branch, "--steps", "4", "--learning-rate", "1e30"],  # diverges
        ["upcycle", str(whole), "out", "--seed", str(1 << 50)],
        ["mix", "out", str(whole), str(whole), "--chance", str(1 << 63)],
    ):
        assert main(command) == 2, command
        assert "fix: " in capsys.readouterr().err, command
        assert [path.name for path in Path().iterdir()] == ["text"], command
