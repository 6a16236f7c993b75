"""What deploy/ says, read for tests: the services of the compose file, the rules, the dashboard's queries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RULE_FILES = [DEPLOY / "prometheus" / name for name in ("recording.yml", "alerts.yml")]
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
# What Grafana puts in place of variables; the interval suits five scrapes a second.
VARIABLES = {"$job": "shoal", "$peer": ".*", "$__rate_interval": "10s"}


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def services() -> dict[str, dict[str, Any]]:
    return dict(read_yaml(DEPLOY / "compose.yaml")["services"])


def peers() -> dict[str, dict[str, Any]]:
    """Those services that are peers."""
    return {name: service for name, service in services().items() if service["image"] == "shoal"}


def image_settings() -> dict[str, str]:
    """SHOAL_* variables that the image sets."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in line.split() if word.startswith("SHOAL_"))


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULE_FILES for group in read_yaml(path)["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Without the rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """(panel's title, expression with its variables filled in) of every target."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], filled(target["expr"], VARIABLES)


def filled(text: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace(name, value)
    return text


def series_of(expression: str) -> set[str]:
    """Names of the time series that it reads."""
    return set(re.findall(r"\b(?:shoal[_:][a-z0-9_:]+|process_\w+|ALERTS|up\b(?=\{| ))", expression))
