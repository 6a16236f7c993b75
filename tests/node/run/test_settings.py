"""What founders and workers may choose: facts by `--set`, and how much of a machine a worker takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from shoal.node import cli
from shoal.node.config import PeerConfig
from shoal.node.errors import ConfigError
from shoal.node.run.manifest import canonical_bytes, run_id_of, with_settings
from tiny import manifest_of


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sketch.kappa=20", 20.0),
        ("sketch.budget_bytes=2e5", 200_000),
        ("sketch.kind=none", "none"),
        ("sketch.patience_seconds=0.25", 0.25),
        ("train.learning_rate=1e-3", 1e-3),
        ("standin.kind=ternary", "ternary"),
        ("model.seed=7", 7),
        ("data.corpus=a=b", "a=b"),
    ],
)
def test_a_setting_replaces_one_fact_and_no_other(setting: str, value: Any) -> None:
    base = manifest_of()
    changed = with_settings(base, [setting])
    part, _, name = setting.partition("=")[0].partition(".")
    assert getattr(getattr(changed, part), name) == value
    assert type(getattr(getattr(changed, part), name)) is type(value)
    back = msgspec.structs.replace(getattr(changed, part), **{name: getattr(getattr(base, part), name)})
    assert canonical_bytes(msgspec.structs.replace(changed, **{part: back})) == canonical_bytes(base)
    assert run_id_of(changed) != run_id_of(base)
    assert with_settings(base, []) == base


def test_the_last_of_several_settings_holds() -> None:
    changed = with_settings(manifest_of(), ["sketch.rank=3", "train.steps=7", "sketch.rank=5"])
    assert (changed.sketch.rank, changed.train.steps) == (5, 7)


@pytest.mark.parametrize(
    "setting",
    [
        "", "sketch", "sketch=1", "sketch.kappa", "sketch.nothing=1", "nothing.kappa=1", "name=other", ".kappa=1",
        "sketch.=1", "sketch.kappa.x=1", " sketch.kappa=1", "train.learning_rate=nan", "train.learning_rate=-1",
        "train.steps=0", "train.steps=1.5", "train.steps=many", "sketch.kind=other", "sketch.kind=", "model.config={}",
        "sketch.kappa=-2", "ownership.lease_seconds=inf", "privacy.handle_key_digest=00",
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_a_fix(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(manifest_of(), [setting])
    assert caught.value.fix


def test_a_misspelt_fact_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(manifest_of(), ["train.learnrate=1"])
    assert "learning_rate" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["ownership.lease_seconds=0.1"], "lease_seconds"),
        (["ownership.lease_seconds=3600"], "lease_seconds"),
        (["model.private_layers=3"], "private"),
        (["sketch.kindness=1"], "sketch.kindness"),
        (["foo=1"], "foo=1"),
        (["train.steps=abc"], "steps"),
    ],
    ids=str,
)
def test_settings_do_not_get_around_what_options_refuse(
    settings: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["found", "--data-dir", str(tmp_path)]
    for setting in settings:
        argv += ["--set", setting]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "fix:" in err
    assert out == ""


def test_settings_reach_the_manifest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(manifest) or 0)
    argv = ["found", "--data-dir", str(tmp_path), "--lease-seconds", "9"]
    assert cli.main([*argv, "--set", "sketch.kappa=4", "--set", "ownership.lease_seconds=5"]) == 0
    assert (seen[0].sketch.kappa, seen[0].ownership.lease_seconds) == (4.0, 5.0)


def test_a_worker_is_told_its_device_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[PeerConfig] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest: seen.append(config) or 0)
    base = ["join", "shoal://x", "--data-dir", str(tmp_path)]
    assert cli.main([*base, "--role", "worker", "--device", "cuda:1", "--max-memory", "1.5", "--max-slots", "3"]) == 0
    assert cli.main([*base, "--own", "none"]) == 0
    assert cli.main(base) == 0
    worker, bare, usual = seen
    assert (worker.role, worker.device, worker.max_memory, worker.max_slots) == ("worker", "cuda:1", 1.5, 3)
    assert (bare.role, bare.own) == ("composer", "none")
    assert (usual.own, usual.device, usual.max_memory) == ("share", "auto", None)


@pytest.mark.parametrize(
    "bad",
    [
        {"device": "gpu"}, {"device": "cuda:"}, {"device": "cuda:1234"}, {"device": ""}, {"device": "cpu\n"},
        {"max_memory": 0.0}, {"max_memory": -1.0}, {"max_memory": float("nan")}, {"max_memory": float("inf")},
        {"own": "all"}, {"own": "none", "role": "worker"}, {"max_slots": 0, "role": "worker"},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_worker_can_do_is_refused_with_a_fix(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        PeerConfig(**bad)
    assert caught.value.fix
    assert next(iter(bad)) in str(caught.value)
