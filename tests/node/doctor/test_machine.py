"""What `shoal doctor` says of a machine: each check on one that is right and on one that is not."""

from __future__ import annotations

import json
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shoal.node.cli import main
from shoal.node.config import PeerConfig
from shoal.node.doctor import machine
from shoal.node.doctor.findings import Finding, Verdict
from shoal.node.storage.presence import announce_here, hold_data_dir
from shoal.protocol.identity import Identity


def finding(check: str, config: PeerConfig) -> Finding:
    [found] = [each for each in machine.machine_checks(config) if each.check == check]
    assert bool(found.fix) == (found.verdict is not Verdict.OK), "what is wrong has a fix"
    return found


@pytest.fixture
def config(tmp_path: Path) -> PeerConfig:
    return PeerConfig(data_dir=tmp_path / "peer")


def test_a_machine_that_runs_these_tests_passes(config: PeerConfig) -> None:
    found = {each.check: each for each in machine.machine_checks(config)}
    assert not [each for each in found.values() if each.verdict is Verdict.FAIL]
    assert found["versions"].verdict is Verdict.OK
    assert [path.name for path in config.data_dir.iterdir()] == ["lock"], "no key is made, nothing is left"


def test_a_version_that_does_not_fit_is_named(config: PeerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "2.4.1" if name == "numpy" else real(name))
    found = finding("versions", config)
    assert found.verdict is Verdict.FAIL
    assert "numpy 2.4.1 is not" in found.said


@pytest.mark.parametrize(("free", "verdict"), [(0, Verdict.FAIL), (1 << 30, Verdict.WARN), (1 << 40, Verdict.OK)])
def test_disk(free: int, verdict: Verdict, config: PeerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 41, 0, free))  # type: ignore[attr-defined]
    assert finding("disk", config).verdict is verdict


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert finding("disk", PeerConfig(data_dir=tmp_path / "file" / "peer")).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("text", "verdict"), [(None, Verdict.FAIL), ("word", Verdict.FAIL), ("so it goes\n" * 60_000, Verdict.OK)]
)
def test_text(text: str | None, verdict: Verdict, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if text is not None:
        path.write_text(text)
    assert finding("text", PeerConfig(data_dir=tmp_path / "peer", data=str(path))).verdict is verdict


def test_few_files(config: PeerConfig) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        assert finding("files", config).verdict is Verdict.WARN
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_gpu_that_is_asked_for_and_not_there(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert finding("GPU", PeerConfig(data_dir=tmp_path, device="cuda")).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("device", "island", "verdict"),
    [("cuda:1", 1, Verdict.OK), ("cuda:2", 1, Verdict.FAIL), ("auto", 2, Verdict.OK), ("cuda:1", 2, Verdict.FAIL)],
)
def test_the_gpus_that_are_asked_for_are_looked_at(
    device: str, island: int, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: asked.append(index) or (1 << 34, 1 << 35))
    found = finding("GPU", PeerConfig(data_dir=tmp_path, device=device, island=island))
    assert found.verdict is verdict
    if verdict is Verdict.OK:
        assert asked == [1 if device == "cuda:1" else 0]
    else:
        assert "this machine has 2 GPUs" in found.said


def test_a_data_directory_in_use(config: PeerConfig) -> None:
    identity = Identity.load_or_create(config.identity_path)
    assert identity.peer_id in finding("data directory", config).said
    with hold_data_dir(config.data_dir):
        assert finding("data directory", config).verdict is Verdict.WARN
        with announce_here(config.data_dir, "http://127.0.0.1:8470"):
            assert "http://127.0.0.1:8470/status" in finding("data directory", config).said


def test_a_damaged_key_is_what_a_peer_would_end_with(config: PeerConfig) -> None:
    Identity.load_or_create(config.identity_path)
    config.identity_path.write_bytes(b"no key")
    assert finding("data directory", config).verdict is Verdict.FAIL


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use(tmp_path: Path) -> None:
    with listening() as port:
        config = PeerConfig(data_dir=tmp_path, host="127.0.0.1", dht_port=port)
        found = finding("ports", config)
        assert found.verdict is Verdict.WARN
        assert f"--dht-port {port}" in found.said
    assert finding("ports", config).verdict is Verdict.OK


@pytest.mark.parametrize("port", [0, 31337])
def test_an_address_that_is_not_this_machines(port: int, tmp_path: Path) -> None:
    found = finding("ports", PeerConfig(data_dir=tmp_path, host="203.0.113.5", dht_port=port))
    assert found.verdict is Verdict.FAIL
    assert "--dht-port on 203.0.113.5" in found.said
    assert "--http-port" not in found.said


def test_the_command_takes_a_peers_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_DATA_DIR", str(tmp_path / "from environment"))
    with listening() as port:
        assert main(["doctor", "--json", "--http-port", str(port)]) == 0
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["ports"]["verdict"] == "warn"
    assert "from environment" in found["data directory"]["said"]
    assert main(["doctor", "--device", "cuda:99"]) == 1
    assert "fail" in capsys.readouterr().out


def test_a_bad_invite_is_one_of_the_findings(config: PeerConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "shoal://nobody", "--json", "--data-dir", str(config.data_dir)]) == 1
    found = json.loads(capsys.readouterr().out)[-1]
    assert (found["check"], found["verdict"]) == ("invite", "fail")
    assert found["fix"]
