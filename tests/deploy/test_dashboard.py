"""The dashboard is built as Grafana wants it; that its queries answer is tested with a swarm, in tests/swarm."""

import itertools
import json
from typing import Any

import pytest
from deployed import DASHBOARD, DEPLOY, panels, read_yaml, services

BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))


def test_rows_answer_the_operators_questions() -> None:
    rows = [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Swarm", "Training", "Experts", "Network", "Health"]


def test_panels_have_places_of_their_own() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert len({panel["title"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_panels_can_be_read(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    steps = defaults["thresholds"]["steps"]
    assert steps[0]["value"] is None  # the colour below the first threshold
    bounds = [step["value"] for step in steps[1:]]
    assert bounds == sorted(bounds)
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])
    for target in panel["targets"]:
        assert target["legendFormat"] or panel["type"] == "table"
        assert 'job=~"$job"' in target["expr"]
        assert "[5m]" not in target["expr"]  # recording rules look back that far; panels follow the zoom


def test_grafana_finds_data_source_and_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = read_yaml(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    asked = [panel["datasource"] for panel in panels()]
    asked += [variable["datasource"] for variable in BOARD["templating"]["list"]]
    assert all(asked == {"type": "prometheus", "uid": source["uid"]} for asked in asked)
    assert source["url"] == "http://prometheus:9090"
    (provider,) = read_yaml(provisioning / "dashboards" / "shoal.yaml")["providers"]
    grafana = services()["grafana"]
    mounts = dict(mount.split(":")[1::-1] for mount in grafana["volumes"])
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / mounts[home]).samefile(DASHBOARD)
    assert home.startswith(provider["options"]["path"] + "/")
    assert (DEPLOY / mounts["/etc/grafana/provisioning"]).samefile(provisioning)
