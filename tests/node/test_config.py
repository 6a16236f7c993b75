"""Settings: what wins over what, what is refused, and that every error has a code of its own."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
from pathlib import Path

import pytest
from shoal.node import cli
from shoal.node.config import PeerConfig, outward_address, parse_shard
from shoal.node.doctor import machine, network
from shoal.node.errors import ConfigError, IdentityInUse, InviteError, exit_code
from shoal.protocol.errors import ShoalError
from shoal.protocol.pacing import UNLIMITED


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch):
    """Runs `shoal join` on a command line and returns the config that the peer would get."""
    monkeypatch.setattr(cli.logs, "configure", lambda **_: None)

    def run(*argv: str) -> PeerConfig:
        seen: list[PeerConfig] = []
        monkeypatch.setattr(cli, "_start", lambda config, _manifest: seen.append(config) or 0)
        assert cli.main(["join", "shoal://h/run?v=1", *argv]) == 0
        return seen[0]

    return run


def test_flags_win_over_environment_over_file(joined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = tmp_path / "peer.toml"
    settings.write_text('http_port = 1001\ndht_port = 1002\ntransport_port = 1003\ndata = "file"\nrole = "observer"\n')
    monkeypatch.setenv("SHOAL_HTTP_PORT", "2001")
    monkeypatch.setenv("SHOAL_DHT_PORT", "2002")
    config = joined("--config", str(settings), "--http-port", "3001")
    assert (config.http_port, config.dht_port, config.transport_port) == (3001, 2002, 1003)
    assert (config.data, config.role, config.invite) == ("file", "observer", "shoal://h/run?v=1")
    assert config.log_level == "info"  # said nowhere


def test_file_can_be_named_by_the_environment(joined, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "peer.toml").write_text('data_shard = "1/4"\nannounce = ["a.example", "b.example"]\nmax_slots = 3\n')
    monkeypatch.setenv("SHOAL_CONFIG", str(tmp_path / "peer.toml"))
    config = joined()
    assert (config.data_shard, config.announce, config.max_slots) == ((1, 4), ("a.example", "b.example"), 3)


def test_lists_and_shards_from_every_source(joined, monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined("--announce", "a", "--announce", "10.0.0.1", "--data-shard", "0/2").announce == ("a", "10.0.0.1")
    monkeypatch.setenv("SHOAL_ANNOUNCE", "c d")
    monkeypatch.setenv("SHOAL_DATA_SHARD", "2/3")
    config = joined()
    assert (config.announce, config.data_shard) == (("c", "d"), (2, 3))


def test_everything_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PeerConfig] = []
    monkeypatch.setattr(cli, "_start", lambda config, _manifest: seen.append(config) or 0)
    for name, value in {
        "INVITE": "shoal://e/r?v=1",
        "ROLE": "bootstrap",
        "DRAIN_SECONDS": "5",
        "DATA_DIR": "/d",
    }.items():
        monkeypatch.setenv(f"SHOAL_{name}", value)
    assert cli.main(["join"]) == 0
    assert (seen[0].invite, seen[0].role, seen[0].drain_seconds) == ("shoal://e/r?v=1", "bootstrap", 5.0)
    assert seen[0].data_dir == Path("/d")


def test_home_moves_the_default_data_dir(joined, tmp_path: Path) -> None:
    assert joined().data_dir == tmp_path / "home"
    assert joined("--data-dir", str(tmp_path / "x")).identity_path.parent == tmp_path / "x"
    assert PeerConfig(data_dir=Path("~/y")).data_dir == Path.home() / "y"


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SHOAL_HOME")
    monkeypatch.setenv("HOME", "~")  # what Python finds for a user id that the machine does not know
    for command in (["status"], ["found"], ["identity", "show"]):
        assert cli.main(command) == 2
        assert "no home folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("htp_port = 1\n", "htp_port"),
        ("http_port = 99999\n", "99999"),
        ("http_port = \n", "is not TOML"),
        ('log_level = "loud"\n', "loud"),
        ("[join]\nhttp_port = 8470\n", "table [join]"),
        ('[peer]\nannounce = ["a.example"]\n', "at the top"),
    ],
)
def test_bad_files_end_with_code_2(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peer.toml").write_text(text)
    assert cli.main(["join", "shoal://h/run?v=1", "--config", str(tmp_path / "peer.toml")]) == 2
    assert says in capsys.readouterr().err


def test_one_file_serves_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only another command knows is left out; what none knows is an error of each."""
    file = tmp_path / "peer.toml"
    file.write_text('invite = "shoal://h/run?v=1"\nrole = "worker"\nhttp_port = 3001\npreset = "small"\n')
    monkeypatch.setattr(cli.logs, "configure", lambda **_: None)
    seen: list[tuple[PeerConfig, object]] = []
    monkeypatch.setattr(cli, "_start", lambda config, manifest=None: seen.append((config, manifest)) or 0)
    checked: list[PeerConfig] = []
    monkeypatch.setattr(machine, "machine_checks", lambda _: [])
    monkeypatch.setattr(network, "network_checks", lambda config, _: checked.append(config) or [])
    assert cli.main(["join", "--config", str(file)]) == 0
    assert cli.main(["found", "--role", "composer", "--config", str(file)]) == 0
    assert cli.main(["doctor", "--config", str(file)]) == 0
    (joined, _), (founder, manifest) = seen
    assert manifest is not None
    assert (joined.role, joined.invite, joined.http_port) == ("worker", "shoal://h/run?v=1", 3001)
    assert (founder.role, founder.invite, founder.http_port) == ("composer", None, 3001)
    assert (checked[0].invite, checked[0].http_port) == ("shoal://h/run?v=1", 3001)
    file.write_text("htp_port = 1\n")
    for one in (["join"], ["found"], ["doctor"], ["status"], ["identity", "show"], ["export", "X", "out"]):
        assert cli.main([*one, "--config", str(file)]) == 2
        assert "htp_port" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The data directory that a command looks into; there is nothing in any, and its complaint names it."""
    from shoal.node.run import gather

    def export(_invite: str, _out: Path, config: PeerConfig) -> None:
        raise ConfigError(f"at {config.data_dir}")

    monkeypatch.setattr(gather, "export_run", export)
    monkeypatch.setattr(cli.logs, "configure", lambda **_: None)

    def run(*argv: str) -> Path:
        assert cli.main(argv) in (1, 2)
        [where] = re.findall(r"(?:on|at) (/[^ ]*)", capsys.readouterr().err)
        return Path(where.removesuffix("/identity.key"))

    return run


@pytest.mark.parametrize("command", [["status"], ["identity", "show"], ["export", "X", "out"]], ids=" ".join)
def test_all_who_look_for_a_peer_know_its_settings(
    asked, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = "export" if command[0] == "export" else ""  # a peer of its own, beside the one that may be running
    assert asked(*command) == tmp_path / "home" / inside
    (tmp_path / "peer.toml").write_text(f'data_dir = "{tmp_path}/file"\nhttp_port = 3001\nrole = "worker"\n')
    monkeypatch.setenv("SHOAL_CONFIG", str(tmp_path / "peer.toml"))
    assert asked(*command) == tmp_path / "file" / inside
    monkeypatch.setenv("SHOAL_DATA_DIR", f"{tmp_path}/variable")
    assert asked(*command) == tmp_path / "variable" / inside
    assert asked(*command, "--data-dir", f"{tmp_path}/flag") == tmp_path / "flag"
    monkeypatch.delenv("SHOAL_DATA_DIR")
    assert asked(*command, "--data-dir", f"{tmp_path}/flag") == tmp_path / "flag"


def test_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["join", "X", "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [
        {"http_port": -1},
        {"dht_port": 65536},
        {"dht_port": 4000, "transport_port": 4000},
        {"max_slots": -1},
        {"threads": 0},
        {"checkpoint_every": 0},
        {"island": 0},
        {"island": 2, "role": "worker"},
        {"island_form": "pipeline"},
        {"island": 2, "island_form": "tree"},
        {"island_every": 8},
        {"island": 2, "island_every": 0},
        {"island": 2, "island_every": 8, "island_form": "pipeline"},
        {"drain_seconds": -1.0},
        {"drain_seconds": float("nan")},
        {"data_shard": (4, 4)},
        {"data_shard": (-1, 4)},
        {"data": ""},
        {"host": "example.org"},
        {"http_host": ""},
        {"announce": ("http://x",)},
        {"announce": ("host:80",)},
        {"announce": ("",)},
        {"announce": ("a.example,b.example",)},
        {"announce": ("münchen.example",)},
        {"announce": ("foo?bar",)},
        {"announce": ("1.2.3",)},
        {"role": "boss"},
        {"max_upload": 0.0},
        {"max_download": -1.0},
        {"max_upload": float("nan")},
        {"hours": "22-7"},
        {"hours": "24:00-07:00"},
        {"hours": "07:00-07:00"},
        {"reach": "somehow"},
        {"relay": "31400"},
        {"relay": "31400-31401"},
        {"relay": "31410-31400"},
        {"relay": "0-10"},
        {"relay": "65530-65540"},
        {"log_format": "xml"},
        {"log_level": "loud"},
    ],
    ids=str,
)
def test_bad_values_are_refused_with_a_fix(bad: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        PeerConfig(**bad)
    assert caught.value.fix
    assert next(iter(bad)) in str(caught.value)


def test_bandwidth_is_shared_by_way_of_the_data_directory(tmp_path: Path) -> None:
    pace = PeerConfig(data_dir=tmp_path, max_upload=8.0).pace
    assert (pace.rates.up, pace.rates.down, pace.folder) == (1e6, None, tmp_path)
    assert PeerConfig().pace is UNLIMITED


def test_ports_to_lend() -> None:
    assert PeerConfig(relay="31400-31402").relay_ports == range(31400, 31403)
    assert PeerConfig().relay_ports is None


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "a/b", "1/2/3"])
def test_bad_shards(text: str) -> None:
    with pytest.raises(ConfigError, match="INDEX/COUNT"):
        parse_shard(text)


def test_config_cannot_change_and_every_field_is_explained() -> None:
    config = PeerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.http_port = 1  # type: ignore[misc]
    source = Path(importlib.import_module("shoal.node.config").__file__ or "").read_text().split("class PeerConfig")[1]
    for field in dataclasses.fields(PeerConfig):
        declared = source.index(f"\n    {field.name}: ")
        assert '\n    """' in source[declared : declared + 400], f"{field.name} has no docstring"


def test_dialable_hosts() -> None:
    assert PeerConfig(announce=("me.example",)).dialable_hosts() == ("me.example",)
    assert PeerConfig(host="127.0.0.1").dialable_hosts() == ("127.0.0.1",)
    assert PeerConfig().dialable_hosts() == (outward_address(),)
    assert "0.0.0.0" not in PeerConfig().dialable_hosts()


def _subclasses(kind: type[ShoalError]) -> set[type[ShoalError]]:
    return {kind}.union(*(_subclasses(sub) for sub in kind.__subclasses__()))


def test_error_codes_are_unique_and_exit_codes_tell_whose_fault_it_is() -> None:
    importlib.import_module("shoal.protocol.identity")
    kinds = _subclasses(ShoalError)
    codes = [kind.code for kind in kinds if "code" in vars(kind)]
    assert len(set(codes)) == len(codes), sorted((kind.code, kind.__name__) for kind in kinds)
    assert exit_code(ConfigError("x")) == exit_code(InviteError("x")) == 2
    assert exit_code(IdentityInUse("x")) == 1


def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As compose files have it: `SHOAL_RELAY: ${RELAY:-}`."""
    for name in ("CONFIG", "MAX_MEMORY", "ANNOUNCE", "RELAY", "HTTP_PORT", "DATA_DIR"):
        monkeypatch.setenv(f"SHOAL_{name}", "")
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path))
    seen: list[PeerConfig] = []
    monkeypatch.setattr(cli, "_start", lambda config, _: seen.append(config) or 0)
    assert cli.main(["join", "INVITE"]) == 0
    assert (seen[0].max_memory, seen[0].announce, seen[0].relay, seen[0].data_dir) == (None, (), None, tmp_path)


def test_a_variable_that_is_nearly_a_settings_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_start", lambda *_: 0)
    monkeypatch.setenv("SHOAL_DHT_PRT", "31337")
    for foreign in ("PORT", "SERVICE_HOST", "SERVICE_PORT", "PORT_8470_TCP_PORT"):  # a Kubernetes service's
        monkeypatch.setenv(f"SHOAL_{foreign}", "tcp://10.0.0.1:8470")
    assert cli.main(["join", "INVITE"]) == 0
    assert capsys.readouterr().err == "shoal: SHOAL_DHT_PRT is no setting, and not used: SHOAL_DHT_PORT is one\n"
