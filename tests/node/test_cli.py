"""The command line as a user meets it: help, errors and exit codes."""

from __future__ import annotations

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
from shoal.node.errors import IdentityInUse
from shoal.node.storage.presence import announce_here, hold_data_dir
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState, Phase


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(logs, "configure", lambda **_: None)


def as_any_user() -> list[str]:
    """What to put before a command for it to be refused what is closed to its user."""
    if os.geteuid():
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


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


@pytest.mark.parametrize("command", [name for name in cli.app.resolved_commands() if not name.startswith("-")])
def test_help_shows_no_option_that_nobody_wants(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--empty" not in text
    assert "[default: ()]" not in text


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
        assert err.startswith(f"shoal: the data directory {folder} "), "and nothing before it"
        assert "SHOAL-228" in err
        assert "fix: give a --data-dir of your own" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("command", [["found"], ["join", "shoal://e/r-0123456789ab?v=1"]], ids=["found", "join"])
def test_a_data_directory_that_may_not_be_written_to(command: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    run = [*as_any_user(), sys.executable, "-m", "shoal.node.cli", *command, "--data-dir", str(tmp_path)]
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    finally:
        tmp_path.chmod(0o700)
    assert done.returncode == 2
    assert "Permission denied" in done.stderr
    assert "SHOAL-228" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_peers_address_stands_in_for_its_invite(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = ["--data-dir", str(tmp_path)]
    with StatusServer(PeerState("bootstrap")) as server:
        for command in (["join", server.url, "--join-seconds", "1"], ["export", server.url, str(tmp_path / "out")]):
            assert cli.main([*command, *settings]) == 1
            assert "no invite yet" in capsys.readouterr().err


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


def test_a_data_directory_that_may_not_be_read_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "peer.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid()}))
    tmp_path.chmod(0)
    program = "import sys\nfrom shoal.node.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [*as_any_user(), sys.executable, "-c", program, "status", "--data-dir", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        tmp_path.chmod(0o700)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr
    assert "as the user that the peer runs as" in done.stderr


def test_export_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "X", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
