"""A real Prometheus server scrapes our HTTP server and answers queries about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_server import Prometheus, prometheus_server, until
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import Count, PeerState, Phase, StepPart


@pytest.fixture
def state() -> PeerState:
    state = PeerState("composer")
    state.identify(run_id="r-0123456789ab", peer_id="12D3KooWme", steps_total=1000, slots_total=4)
    state.enter(Phase.TRAINING)
    return state


@pytest.fixture
def prometheus(state: PeerState, tmp_path: Path) -> Iterator[Prometheus]:
    with StatusServer(state) as server, prometheus_server([f"127.0.0.1:{server.port}"], tmp_path) as prometheus:
        yield prometheus


def test_prometheus_scrapes_a_peer_that_advances(state: PeerState, prometheus: Prometheus) -> None:
    def healthy() -> bool:
        targets = prometheus.get("/api/v1/targets")["data"]["activeTargets"]
        errors = [
            target["lastError"] for target in targets if target["lastError"] and "deadline" not in target["lastError"]
        ]
        assert not errors, errors
        return [target["health"] for target in targets] == ["up"]

    until("the peer is scraped", healthy, prometheus.log)

    step = 0

    def advance() -> None:
        nonlocal step
        step += 1
        state.record_step(step=step, tokens=1024, loss=2.0, seconds={StepPart.FORWARD_BACKWARD: 0.1})
        state.count(Count.BYTES, "deltas", "out", by=100)

    def tokens_seen(least: int) -> bool:
        advance()
        return prometheus.query("shoal_tokens_total").get((), 0) >= least

    until("tokens arrive", lambda: tokens_seen(1024), prometheus.log)
    seen = prometheus.query("shoal_tokens_total")[()]
    until("tokens advance", lambda: tokens_seen(int(seen) + 5 * 1024), prometheus.log)
    rate = until(
        "a rate", lambda: (advance(), prometheus.query("rate(shoal_tokens_total[30s])").get((), 0))[1], prometheus.log
    )
    assert rate > 0
    assert prometheus.query("shoal_loss") == {(): 2.0}
    phases = prometheus.query("shoal_phase == 1")
    assert phases == {(("phase", "training"),): 1.0}
    assert prometheus.query("shoal_network_bytes_total").keys() == {(("direction", "out"), ("kind", "deltas"))}
    (labels,) = prometheus.query("shoal_peer_info")
    assert dict(labels)["run_id"] == "r-0123456789ab"
    # A PromQL quantile needs well-formed cumulative buckets.
    slowest = prometheus.query('histogram_quantile(0.9, shoal_step_seconds_bucket{part="forward_backward"})')
    assert 0.05 <= next(iter(slowest.values())) <= 0.1
    state.enter(Phase.FINISHED)
    until("the new phase", lambda: prometheus.query("shoal_phase{phase='finished'} == 1"), prometheus.log)
    types = {name: told[0]["type"] for name, told in prometheus.get("/api/v1/metadata")["data"].items()}
    assert types.get("shoal_step_seconds") == "histogram"
    assert "counter" in {types.get("shoal_tokens"), types.get("shoal_tokens_total")}
