"""The command line as a user meets it: help, errors and exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shoal import __version__
from shoal.node import cli, logs
from shoal.node.config import PeerConfig
from shoal.node.errors import IdentityInUse
from shoal.node.learning.tokenizer import byte_tokenizer
from shoal.node.model.init import backbone_shapes
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest
from shoal.node.storage.presence import announce_here, find_peer, hold_data_dir
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState, Phase
from transformers import AutoConfig, AutoModelForCausalLM


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(logs, "configure", lambda **_: None)


HEAVY = ("torch", "hivemind", "libp2p", "transformers", "bitsandbytes", "prometheus_client")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["join", "--help"], ["found", "--help"], ["status", "--help"], ["simulate", "--help"], ["version"]],
)
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    program = (
        "import sys\nfrom shoal.node.cli import main\ncode = main(sys.argv[1:])\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy\nsys.exit(code)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    # Alone it takes 0.3 s; torch alone would take more than the limit on a loaded machine too.
    assert time.monotonic() - started < 5


def test_a_worker_knows_its_experts_without_what_only_backbones_need() -> None:
    program = (
        "import sys\nfrom shoal.node.peer import peer, working\nfrom shoal.node.model.init import expert_shape\n"
        "from shoal.node.run.manifest import ExpertShape, ModelSpec\n"
        "shape = ExpertShape(num_layers=1, num_experts=2, hidden=4, width=4, act='silu', std=0.1)\n"
        "assert expert_shape(ModelSpec(config={}, experts=shape)) == shape\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command_and_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "found",
        "join",
        "status",
        "export",
        "evaluate",
        "simulate",
        "identity",
        "version",
        "shoal join shoal://",
        "--config",
    ):
        assert word in text
    assert cli.main(["join", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("INVITE", "--data-shard", "INDEX/COUNT", "--drain-seconds", "default: 30.0", "SIGTERM", "--announce"):
        assert word in text
    assert "--invite-" not in text
    assert "--empty" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert f"shoal {__version__}, protocol" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["jion"], "join"),
        (["join"], "invite"),
        (["join", "X", "--port", "1"], "--dht-port"),
        (["join", "X", "--http-port", "many"], "--http-port"),
        (["join", "X", "--data-shard", "3"], "INDEX/COUNT"),
        (["found", "--preset", "huge"], "huge"),
        (["found", "--name", "My Run"], "My Run"),
        (["found", "--steps", "0"], "steps"),
        (["found", "--lease-seconds", "0.1"], "lease_seconds"),
        (["found", "--private-layers", "3"], "--private-layers"),
        (["found", "--private-layers", "-1"], "--private-layers"),
    ],
    ids=" ".join,
)
def test_what_was_asked_wrongly_exits_2(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""
    assert "Traceback" not in err


def test_our_errors_show_cause_and_fix_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise IdentityInUse("somebody is here", fix="go elsewhere")

    monkeypatch.setattr(cli, "_start", fail)
    assert cli.main(["join", "X"]) == 1
    err = capsys.readouterr().err
    assert "somebody is here [SHOAL-225]" in err
    assert "fix: go elsewhere" in err
    assert "Traceback" not in err


def test_unexpected_errors_are_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_start", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["join", "X"])


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_the_system_is_one_line_with_its_path(
    debug: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG if debug else logging.INFO)
    (tmp_path / "peer.json").mkdir()  # where the peer says that it is here
    assert cli.main(["join", "shoal://e/r-0123456789ab?v=1", "--data-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("shoal: Is a directory: ")
    assert str(tmp_path) in err.splitlines()[-1]
    assert ("Traceback" in err) == debug


@pytest.mark.parametrize("command", [["found"], ["join", "shoal://e/r-0123456789ab?v=1"]], ids=["found", "join"])
def test_a_data_directory_that_cannot_be_one(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    (tmp_path / "locked" / "lock").mkdir(parents=True)
    for folder in (file, file / "below", Path("/proc/nobody"), tmp_path / "locked"):
        assert cli.main([*command, "--data-dir", str(folder)]) == 2, folder
        err = capsys.readouterr().err
        assert f"the data directory {folder} " in err
        assert "SHOAL-228" in err
        assert "fix: give a --data-dir of your own" in err
        assert "Traceback" not in err


def test_a_peers_address_stands_in_for_its_invite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(config.invite) or 0)
    state = PeerState("bootstrap")
    with StatusServer(state) as server:
        assert cli.main(["join", server.url]) == 1
        assert "no invite yet" in capsys.readouterr().err
        state.identify(invite="shoal://e/r-0123456789ab?v=1")
        assert cli.main(["join", server.url]) == 0
        monkeypatch.setenv("SHOAL_INVITE", f"{server.url}/status")
        assert cli.main(["join"]) == 0
    assert seen == ["shoal://e/r-0123456789ab?v=1"] * 2
    assert cli.main(["join", server.url]) == 1
    assert "nobody answers" in capsys.readouterr().err


def test_found_makes_a_manifest_of_the_preset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append((config, manifest)) or 0)
    assert cli.main(["found", "--name", "my-run", "--steps", "40", "--role", "composer", "--lease-seconds", "5"]) == 0
    config, manifest = seen[0]
    assert manifest.ownership.lease_seconds == 5
    assert (config.role, config.invite) == ("composer", None)
    assert (manifest.name, manifest.train.steps, manifest.train.warmup_steps) == ("my-run", 40, 4)
    assert manifest.model.config["model_type"] == "qwen3_moe"
    assert manifest.founder.startswith("12D3KooW")
    assert cli.main(["found"]) == 0
    again = seen[1][1]
    assert (again.name, again.founder, seen[1][0].role) == ("tiny", manifest.founder, "bootstrap")
    assert cli.main(["found", "--private-layers", "2"]) == 0
    assert [each.model.private_layers for _, each in seen] == [0, 0, 2]


def test_found_takes_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = preset("fine-grained").model.config | {"num_experts": 24, "use_cache": True, "architectures": ["X"]}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert cli.main(["found", "--model", str(tmp_path), "--preset", "tiny", "--name", "mine"]) == 0
    assert cli.main(["found", "--model", str(file)]) == 0
    for manifest in seen:
        assert manifest.model.experts.num_experts == 24
        assert not {"use_cache", "architectures"} & manifest.model.config.keys()
        assert manifest.standin == preset("tiny").standin
        assert (manifest.train.optimizer, manifest.train.learning_rate) == ("adamw", 3e-3), (
            "muon's is for a preset's model"
        )
    for bad in (
        {"vocab_size": 100},
        {"vocab_size": None},
        {"max_position_embeddings": 8},
        {"max_position_embeddings": None},
        {"model_type": "llama"},
        {"num_experts": "many"},
    ):
        file.write_text(json.dumps(config | bad))
        assert cli.main(["found", "--model", str(file)]) == 2, bad
        assert "fix: " in capsys.readouterr().err
    for bad_text in ("[]", "{", "{}"):
        file.write_text(bad_text)
        assert cli.main(["found", "--model", str(file)]) == 2
    assert cli.main(["found", "--model", str(tmp_path / "nothing")]) == 2
    file.write_text(json.dumps(config))
    assert cli.main(["found", "--model", str(file), "--seed", str(tmp_path)]) == 2
    assert len(seen) == 2


def test_paths_may_begin_at_home_where_no_shell_says_where_that_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen: list[tuple[PeerConfig, Manifest]] = []
    monkeypatch.setattr(cli, "_start", lambda *told: seen.append(told) or 0)
    (tmp_path / "peer.toml").write_text('http_port = 8470\nmodel = "~/m"\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(preset("fine-grained").model.config))
    for argv, variable in ((["--config=~/peer.toml"], {}), ([], {"SHOAL_CONFIG": "~/peer.toml"})):
        for name, value in variable.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["found", *argv]) == 0, capsys.readouterr().err
        assert seen[-1][0].http_port == 8470
        assert seen[-1][1].model.experts.num_experts == 64
    monkeypatch.delenv("SHOAL_CONFIG")
    assert cli.main(["found", "--seed=~/nothing"]) == 2
    assert f"{tmp_path}/nothing is no checkpoint" in capsys.readouterr().err


def test_what_a_config_says_is_null_is_no_familys_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    sizes = {
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
        "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0,
    }  # fmt: skip
    config = AutoConfig.for_model("deepseek_v2", **sizes, q_lora_rank=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for option in ("--model", "--seed"):
        assert cli.main(["found", option, str(tmp_path)]) == 0
        assert "model.layers.0.self_attn.q_proj.weight" in backbone_shapes(seen[-1].model)
        assert seen[-1].model.config["eos_token_id"] is None


def test_found_compares_the_models_positions_with_what_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(preset("tiny").model.config | {"max_position_embeddings": 128}))
    assert cli.main(["found", "--model", str(file)]) == 2
    assert "--set data.context_length=128" in capsys.readouterr().err
    assert cli.main(["found", "--model", str(file), "--set", "data.context_length=128"]) == 0
    assert seen[0].data.context_length == 128
    assert cli.main(["found", "--model", str(file), "--set", "data.context_length=129"]) == 2


@pytest.mark.parametrize(("vocabulary", "says"), [(300, "no tokenizer.json"), (200, "no tokenizer.json"), (256, "")])
def test_a_seed_whose_tokens_nobody_knows_is_refused(
    vocabulary: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = dict(preset("tiny").model.config) | {"vocab_size": vocabulary}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(tmp_path / "moe")
    capsys.readouterr()
    assert cli.main(["found", "--seed", str(tmp_path / "moe")]) == (2 if says else 0)
    assert says in capsys.readouterr().err
    assert [manifest.data.tokenizer for manifest in seen] == ([] if says else ["bytes"])


@pytest.mark.parametrize(("added", "says"), [(44, ""), (45, "has 301 tokens"), (-1, "tokenizer.json is none")])
def test_a_seed_with_a_tokenizer_of_another_model_is_refused(
    added: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[Manifest] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    config = dict(preset("tiny").model.config) | {"vocab_size": 300}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    model.save_pretrained(tmp_path / "moe")
    tokenizer = byte_tokenizer(64).backend_tokenizer
    tokenizer.add_tokens([f"<word {number}>" for number in range(added)])
    (tmp_path / "moe/tokenizer.json").write_text(tokenizer.to_str() if added >= 0 else "{nope")
    capsys.readouterr()
    assert cli.main(["found", "--seed", str(tmp_path / "moe")]) == (2 if says else 0)
    assert says in capsys.readouterr().err
    assert [manifest.data.tokenizer for manifest in seen] == ([] if says else ["seed"])


def test_found_chooses_sketches_by_what_may_be_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest.sketch) or 0)
    assert cli.main(["found", "--sketch-budget", "200000"]) == 0
    assert (seen[-1].kind, seen[-1].budget_bytes) == ("rows", 200_000)
    assert cli.main(["found", "--sketch-budget", "4000"]) == 0  # of 430 kB
    assert (seen[-1].kind, seen[-1].rank, seen[-1].gradient_every, seen[-1].budget_bytes) == ("gradient", 4, 44, 0)
    assert cli.main(["found", "--sketch-budget", "4000", "--set", "sketch.rank=8"]) == 0
    assert (seen[-1].kind, seen[-1].rank) == ("gradient", 8)
    assert cli.main(["found", "--sketch-budget", "4000", "--set", "standin.kind=narrow"]) == 0
    assert (seen[-1].kind, seen[-1].budget_bytes) == ("rows", 4_000)
    assert cli.main(["found", "--sketch-budget", "10"]) == 2
    err = capsys.readouterr().err
    assert "rank 4 need" in err
    assert "--sketch-budget" in err


def test_identity_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from shoal.protocol.identity import Identity

    assert cli.main(["identity", "show"]) == 1
    assert "no identity" in capsys.readouterr().err
    identity = Identity.load_or_create(tmp_path / "peer" / "identity.key")
    assert cli.main(["identity", "show", "--data-dir", str(tmp_path / "peer")]) == 0
    assert capsys.readouterr().out.splitlines() == [identity.peer_id, str(tmp_path / "peer" / "identity.key")]


def test_status_finds_the_peer_of_a_data_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--data-dir", str(tmp_path)]) == 1
    assert "no peer runs" in capsys.readouterr().err
    state = PeerState("composer")
    state.identify(run_id="r-0123456789ab", peer_id="12D3KooWx", steps_total=10)
    state.enter(Phase.READY)
    with hold_data_dir(tmp_path), StatusServer(state) as server, announce_here(tmp_path, server.url):
        assert cli.main(["status", "--data-dir", str(tmp_path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["run_id"] == "r-0123456789ab"
        assert cli.main(["status", server.url]) == 0
        assert "r-0123456789ab" in capsys.readouterr().out
    assert not (tmp_path / "peer.json").exists()
    assert cli.main(["status", server.url]) == 1


def test_a_dead_peer_is_not_taken_for_a_running_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / "peer.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": child.pid}))
    assert cli.main(["status", "--data-dir", str(tmp_path)]) == 1
    assert "has died" in capsys.readouterr().err
    (tmp_path / "peer.json").write_text("{")
    assert cli.main(["status", "--data-dir", str(tmp_path)]) == 1
    assert "damaged" in capsys.readouterr().err


def test_one_peer_per_data_dir(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path / "p"):
        with pytest.raises(IdentityInUse), hold_data_dir(tmp_path / "p"):
            pass
        with announce_here(tmp_path / "p", "http://127.0.0.1:5"):
            assert find_peer(tmp_path / "p") == "http://127.0.0.1:5"
    with hold_data_dir(tmp_path / "p"), contextlib.nullcontext():
        pass  # free again


def test_export_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "X", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
