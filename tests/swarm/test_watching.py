"""A real Prometheus watches a real swarm."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from harness import START_SECONDS, Swarm
from prometheus_server import prometheus_server, until

pytestmark = pytest.mark.timeout(300)


def test_prometheus_watches_a_swarm(swarm: Swarm, tmp_path: Path) -> None:
    founder = swarm.found("--steps", "100000", "--min-composers", "2")
    both = [swarm.join(name, "--data-shard", f"{index}/2") for index, name in enumerate("ab")]
    swarm.wait_for("both train and merge", lambda: all(peer.commits() > 1 for peer in both), START_SECONDS)
    targets = [urlsplit(peer.url).netloc for peer in (founder, *both)]
    with prometheus_server(targets, tmp_path) as prometheus:
        until("all are scraped", lambda: prometheus.query("count(up == 1)").get((), 0) == 3, prometheus.log)
        speed = until("a rate", lambda: prometheus.query("sum(rate(shoal_tokens_total[10s]))").get(()), prometheus.log)
        assert speed > 0
        commits = 'sum(shoal_outer_rounds_total{outcome="committed"})'
        before = prometheus.query(commits)[()]
        until("rounds go on", lambda: prometheus.query(commits)[()] > before, prometheus.log)
        assert prometheus.query('sum(shoal_slots{state="owned"})')[()] == 16
        assert prometheus.query("count(shoal_phase == 1)")[()] == 3
