"""The compose file, the systemd unit and the Kubernetes manifest fit the image, the command line and each other."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import DEPLOY, image_settings, peers, read_yaml, services
from shoal.node import cli
from shoal.node.config import PeerConfig

PORTS = [int(image_settings()[f"SHOAL_{name}_PORT"]) for name in ("HTTP", "DHT", "TRANSPORT")]
DRAIN_SECONDS = PeerConfig(data_dir=Path("/nowhere")).drain_seconds


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., PeerConfig]:
    """What `shoal COMMAND` makes of the image's settings and further ones; only invite and folder are the test's."""

    def configured(command: list[str], **settings: object) -> PeerConfig:
        seen: list[PeerConfig] = []
        monkeypatch.setattr(cli, "_start", lambda config, _: seen.append(config) or 0)
        ours = {"SHOAL_HOME": tmp_path, "SHOAL_DATA_DIR": tmp_path, "SHOAL_INVITE": "shoal://e/r-0123456789ab?v=1"}
        for name, value in (image_settings() | settings | ours).items():
            monkeypatch.setenv(name, str(value))
        assert cli.main(command) == 0
        return seen[0]

    return configured


@pytest.mark.parametrize("name", peers())
def test_composed_peers_are_told_what_they_need(name: str, configured: Callable[..., PeerConfig]) -> None:
    service = peers()[name]
    settings = service.get("environment", {})
    config = configured(service["command"], **settings)
    assert config.role == name.split("-")[0]
    assert config.http_host == "0.0.0.0"
    assert [config.http_port, config.dht_port, config.transport_port] == PORTS
    assert float(service["stop_grace_period"].removesuffix("s")) > config.drain_seconds
    assert service["volumes"] == [f"{name}:/data"]
    if config.role == "composer":
        assert config.data_shard == (int(name.split("-")[1]), 3)
    if config.role != "bootstrap":
        assert settings["SHOAL_INVITE"] == f"http://bootstrap:{PORTS[0]}"
        assert service["depends_on"]["bootstrap"]["condition"] == "service_healthy"


def test_the_compose_file_is_complete() -> None:
    whole = read_yaml(DEPLOY / "compose.yaml")
    used = set()
    for name, service in services().items():
        assert {"restart", "stop_grace_period", "healthcheck", "cpus", "mem_limit"} <= set(service), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "build" in service or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"]), name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                used.add(source)
    assert used == set(whole["volumes"])


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not there; on Debian: apt-get install systemd")
    text = (DEPLOY / "shoal.service").read_text(encoding="utf-8")
    installed = "/opt/shoal/bin/shoal"
    assert f"ExecStart={installed} join\n" in text
    unit = tmp_path / "shoal.service"
    unit.write_text(text.replace(installed, str(Path(sys.executable).with_name("shoal"))))
    done = subprocess.run([tool, "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "shoal.service" in line]) == (0, [])
    stop = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert stop is not None
    assert int(stop[1]) > DRAIN_SECONDS


def test_kubernetes_sample_fits_the_image(configured: Callable[..., PeerConfig]) -> None:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    service, peers = documents
    assert (service["kind"], peers["kind"]) == ("Service", "StatefulSet")
    pod = peers["spec"]["template"]
    assert service["spec"]["selector"] == peers["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert peers["spec"]["serviceName"] == service["metadata"]["name"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > DRAIN_SECONDS
    (container,) = pod["spec"]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == PORTS
    assert [port["port"] for port in service["spec"]["ports"]] == PORTS
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    volumes = pod["spec"]["volumes"] + [claim["metadata"] for claim in peers["spec"]["volumeClaimTemplates"]]
    assert {v["name"] for v in volumes} == {mount["name"] for mount in container["volumeMounts"]}
    (script,) = container["args"]
    commands = re.findall(r"exec shoal ([^;\n]+)", script)
    assert [command.split()[0] for command in commands] == ["found", "join"]
    assert commands[1] == f"join http://{peers['metadata']['name']}-0.{service['metadata']['name']}:{PORTS[0]}"
    assert configured(commands[0].split()).role == "bootstrap"
    done = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
