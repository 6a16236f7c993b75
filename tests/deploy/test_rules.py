"""Prometheus' own tool reads the rules, and plays scenes in which each alert must fire, or must not."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deployed import DEPLOY, ROOT, dashboard_queries, peers, read_yaml, rules, series_of
from shoal.node.watching.metrics import METRICS

SCENES = Path(__file__).with_name("rules.yml")
ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def promtool(*words: str | Path) -> str:
    tool = shutil.which("promtool")
    assert tool, "promtool is missing: apt-get install -y prometheus"
    done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_configuration_and_rules() -> None:
    assert "2 rule files found" in promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_in_their_scenes_and_in_no_other() -> None:
    assert "SUCCESS" in promtool("test", "rules", SCENES)


def test_every_alert_has_a_scene() -> None:
    assert len(ALERTS) > 10
    text = SCENES.read_text(encoding="utf-8")
    assert not [rule["alert"] for rule in ALERTS if f'alertname="{rule["alert"]}"' not in text]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alerts_say_what_is_wrong_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]
    (section,) = (part for part in parts if part.splitlines()[0].lower().replace(" ", "-") == anchor)
    assert f"`{rule['alert']}`" in section


def test_only_series_that_exist_are_asked_for() -> None:
    known = {spec.exposed_name for spec in METRICS} | RECORDED | {"ALERTS", "up"}
    known |= {spec.name + end for spec in METRICS if spec.kind == "histogram" for end in ("_bucket", "_sum", "_count")}
    known |= {"process_resident_memory_bytes", "process_cpu_seconds_total"}
    asked = {rule.get("alert", rule.get("record")): rule["expr"] for rule in rules()} | dict(dashboard_queries())
    for name, expression in asked.items():
        assert series_of(expression), name
        assert series_of(expression) <= known, name


def test_all_peers_are_scraped() -> None:
    (job,) = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    (static,) = job["static_configs"]
    assert static["targets"] == [f"{name}:8470" for name in peers()]
