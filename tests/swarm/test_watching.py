"""What an operator watches a swarm with: a real Prometheus answers all that the dashboard and the rules ask."""

import json
import re
import secrets
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from deployed import RULE_FILES, dashboard_queries, image_settings, peers, rules, series_of
from harness import START_SECONDS, Peer, Swarm, wait_until
from prometheus_server import Prometheus, prometheus_server, until

pytestmark = pytest.mark.timeout(300)

COMPOSED = ("bootstrap", "composer-0", "composer-1", "worker")
# Their labels are reasons: before the first fault there is no series.
AFTER_A_FAULT = {"shoal_refusals_total", "shoal_sketches_lost_total", "shoal_steps_skipped_total"}


class Composed:
    """Services of deploy/compose.yaml as processes: same command and settings, an address of this machine for each."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        network = f"127.{1 + secrets.randbelow(254)}.{secrets.randbelow(256)}"
        self.hosts = {name: f"{network}.{number}" for number, name in enumerate(peers(), 1)}

    def up(self, name: str, *options: str, **settings: str) -> Peer:
        service, host = peers()[name], self.hosts[name]
        told = image_settings() | service.get("environment", {}) | settings
        told |= {"SHOAL_HOST": host, "SHOAL_HTTP_HOST": host, "SHOAL_HOME": str(self.swarm.folder)}
        del told["SHOAL_DATA_DIR"]
        resolved = {
            key: re.sub(r"(?<=//)[a-z0-9-]+(?=:)", lambda found: self.hosts[found[0]], str(value))
            for key, value in told.items()
        }
        return self.swarm.launch(name, [*service["command"], *options], **resolved)


def test_prometheus_answers_what_operators_ask(swarm: Swarm, tmp_path: Path) -> None:
    composed = Composed(swarm)
    founder = composed.up("bootstrap", "--set", "train.batch_size=2", "--set", "trust.audit_every=10")
    wait_until(lambda: bool(founder.status().get("in_the_run")), START_SECONDS, lambda: f"founding\n{founder.tail()}")
    joined = [composed.up(name, SHOAL_CHECKPOINT_EVERY="20") for name in COMPOSED[1:]]
    composers = joined[:2]
    swarm.wait_for("both train and merge", lambda: all(peer.commits() > 1 for peer in composers), START_SECONDS)
    swarm.wait_for("all are known", lambda: len(founder.status()["peers"]) == len(COMPOSED), START_SECONDS)

    look_around(swarm, founder)
    targets = [urlsplit(peer.url).netloc for peer in (founder, *joined)]
    with prometheus_server(targets, tmp_path, RULE_FILES) as prometheus:
        until("all are scraped", lambda: prometheus.query("count(up == 1)").get((), 0) == len(targets), prometheus.log)
        commits = 'sum(shoal_outer_rounds_total{outcome="committed"})'
        before = prometheus.query(commits)[()]
        until("rounds go on", lambda: prometheus.query(commits)[()] > before, prometheus.log)
        assert prometheus.query('sum(shoal_slots{state="owned"})')[()] == 16
        assert prometheus.query("count(shoal_phase == 1)")[()] == len(targets)

        for panel, query in dashboard_queries():
            if not series_of(query) <= AFTER_A_FAULT:
                until(f"{panel}: {query}", lambda query=query: prometheus.query(query), prometheus.log)
            else:
                prometheus.query(query)
        check_rules(prometheus)


def look_around(swarm: Swarm, founder: Peer) -> None:
    """What a newcomer asks before it joins: which runs are here, and would a peer of mine work?"""
    [run] = json.loads(swarm.call("runs", "--bootstrap", founder.url, "--json").stdout)
    assert (run["composers"], run["workers"]) == (2, 1)
    assert run["invite"] == founder.status()["invite"]
    assert run["steps_total"] == founder.status()["steps_total"] > 0, "a bootstrap peer knows how long the run is"
    assert founder.status()["slots_total"] == 16
    wrong = swarm.call("join", run["invite"], "--host", "127.0.0.1", "--data", "/no/such/text")
    assert (wrong.returncode, wrong.stdout) == (1, ""), "no invite is printed: others have not heard of it"
    assert "no text at '/no/such/text'" in wrong.stderr
    asked = swarm.call("doctor", run["invite"], "--host", "127.0.0.1", "--json")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found = {each["check"]: each for each in json.loads(asked.stdout)}
    for check in ("invite", "bootstrap", "run", "clock", "streams"):
        assert found[check]["verdict"] == "ok", found[check]
    assert "2 composers, 1 worker, 1 bootstrap" in found["run"]["said"]
    assert "no relay" in found["way in"]["said"]


def check_rules(prometheus: Prometheus) -> None:
    """All are evaluated without an error, read series that exist, and no alert fires."""
    told = prometheus.get("/api/v1/rules")["data"]["groups"]
    seen = {rule["name"]: rule for group in told for rule in group["rules"]}
    assert len(seen) == len(rules())
    assert not {name: rule["lastError"] for name, rule in seen.items() if rule["health"] != "ok"}
    assert not [name for name, rule in seen.items() if rule.get("state") == "firing"]
    names = set(prometheus.get("/api/v1/label/__name__/values")["data"]) | AFTER_A_FAULT
    for rule in rules():
        assert series_of(rule["expr"]) <= names, rule
        if "record" in rule:
            assert prometheus.query(rule["record"]), rule
