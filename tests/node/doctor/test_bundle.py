"""The support archive: what is in it, and what must not be."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from shoal.node.cli import main
from shoal.node.config import PeerConfig
from shoal.node.doctor.bundle import LOG_BYTES, write_bundle
from shoal.node.doctor.findings import ok
from shoal.node.errors import ConfigError
from shoal.node.slots.handle_key import found_key
from shoal.node.storage.presence import announce_here, hold_data_dir
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState
from shoal.protocol.identity import Identity

INVITE = f"shoal://{Identity.generate().peer_id}@203.0.113.5:4001/demo-0123456789ab?v=1&relay=203.0.113.5:31400"


@pytest.fixture
def config(tmp_path: Path) -> PeerConfig:
    config = PeerConfig(data_dir=tmp_path / "peer", invite=INVITE)
    Identity.load_or_create(config.identity_path)
    found_key(config.handle_key_path)
    return config


def contents(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            entry.name.removeprefix("shoal-support/"): archive.extractfile(entry).read().decode()  # type: ignore[union-attr]
            for entry in archive
        }


def test_what_helps_is_in_and_what_lets_others_in_is_not(config: PeerConfig, tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    log.write_text(f"joined {INVITE}\nouter.round committed\n")
    state = PeerState("composer")
    state.identify(run_id="demo-0123456789ab", invite=INVITE)
    folder = config.data_dir
    with hold_data_dir(folder), StatusServer(state) as server, announce_here(folder, server.url):
        names = write_bundle(tmp_path / "out.tar.gz", config, [ok("memory", "enough")], log)
    inside = contents(tmp_path / "out.tar.gz")
    assert list(inside) == names == ["README.txt", "findings.json", "settings.json", "status.json", "log.txt"]
    assert json.loads(inside["findings.json"])[0]["said"] == "enough"
    assert json.loads(inside["status.json"])["run_id"] == "demo-0123456789ab"
    assert json.loads(inside["settings.json"])["invite"] == "<invite to demo-0123456789ab>"
    assert "outer.round committed" in inside["log.txt"]
    for name, text in inside.items():
        assert "203.0.113.5" not in text, name
        assert "relay=" not in text, name
    packed = (tmp_path / "out.tar.gz").read_bytes()
    for key in config.data_dir.glob("*.key"):
        assert key.read_bytes() not in packed
        assert key.read_bytes().hex() not in "".join(inside.values())


@pytest.mark.parametrize("home", ["/", "~"])
def test_a_home_that_is_no_folder_of_the_users_hides_nothing(
    home: str, config: PeerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)  # of user ids that a container does not know
    write_bundle(tmp_path / "out.tar.gz", config, [ok("disk", "a/b")], None)
    assert json.loads(contents(tmp_path / "out.tar.gz")["findings.json"])[0]["said"] == "a/b"


@pytest.mark.parametrize("form", [bytes.hex, lambda secret: secret.hex().upper()], ids=["lower", "upper"])
def test_a_log_with_a_key_in_it_is_refused(form: Callable[[bytes], str], config: PeerConfig, tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    log.write_text(f"handle key {form(config.handle_key_path.read_bytes())}\n")
    with pytest.raises(ConfigError, match=r"log\.txt holds what is in handle\.key"):
        write_bundle(tmp_path / "out.tar.gz", config, [], log)
    assert not (tmp_path / "out.tar.gz").exists()


def test_of_a_long_log_the_end_is_taken(config: PeerConfig, tmp_path: Path) -> None:
    log = tmp_path / "peer.log"
    log.write_text("old " * LOG_BYTES + "newest")
    write_bundle(tmp_path / "out.tar.gz", config, [], log)
    text = contents(tmp_path / "out.tar.gz")["log.txt"]
    assert len(text) == LOG_BYTES
    assert text.endswith("newest")


def test_nothing_is_overwritten(config: PeerConfig, tmp_path: Path) -> None:
    (tmp_path / "out.tar.gz").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(tmp_path / "out.tar.gz", config, [], None)
    assert (tmp_path / "out.tar.gz").read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot read the log"):
        write_bundle(tmp_path / "other.tar.gz", config, [], tmp_path / "missing.log")


def test_from_the_command_line(config: PeerConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "support.tar.gz"
    assert main(["doctor", "--data-dir", str(config.data_dir), "--bundle", str(out)]) == 0
    assert "findings.json" in capsys.readouterr().out
    assert {"README.txt", "findings.json", "settings.json"} == set(contents(out))
