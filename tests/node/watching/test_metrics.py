"""Metrics: named as Prometheus asks, complete, and true to the state they read."""

from __future__ import annotations

import math
import pickle
import random
import re
import shutil
import subprocess
import threading

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from shoal import __version__
from shoal.node.watching.metrics import MAX_LABEL_SETS, METRICS, make_registry, reference
from shoal.node.watching.series import Histogram, History, Rate
from shoal.node.watching.state import Count, Lease, PeerSeen, PeerState, Phase, StepPart
from shoal.protocol.directory.sight import Sight


def busy_state() -> PeerState:
    """A state in which every metric has a value."""
    state = PeerState("composer")
    state.identify(run_id="r-0123456789ab", peer_id="12D3KooWa", steps_total=100, slots_total=8)
    state.enter(Phase.TRAINING)
    for step in (1, 2):
        seconds = {
            StepPart.FORWARD_BACKWARD: 0.2,
            StepPart.OPTIMIZER: 0.02,
            StepPart.EXCHANGE: 0.01,
            StepPart.WAITING: 0.5,
        }
        state.record_step(step=step, tokens=1024, loss=3.0, seconds=seconds)
    state.set_unmerged(5)
    state.set_processes(4)
    state.record_round(outcome="committed", round=7, fragment=1, members=4, seconds=1.2)
    state.record_checkpoint(step=2, seconds=0.3, nbytes=1000)
    state.set_slots(leases=[Lease(slot=2, epoch=1, version=2)], standby=[3, 4])
    state.set_fidelity({0: 0.9, 1: 0.8})
    state.set_peers(
        [
            PeerSeen(peer_id="12D3KooWa", role="composer", phase="training", version="0.1.0", slots=(2,)),
            PeerSeen(peer_id="12D3KooWb", role="composer", phase="training", version="0.1.0", slots=(0, 1)),
        ]
    )
    state.set_sight(Sight(live=1, connected=1, silent=3))
    state.count(Count.CUT_OFF)
    state.set_clock_offset(-0.2)
    state.count(Count.BYTES, "deltas", "in", by=500)
    state.count(Count.REFUSALS, "stale_epoch")
    state.count(Count.GOSSIP_DROPPED, "queue_full", by=2)
    state.count(Count.TRANSPORT_RESTARTS)
    state.count(Count.MEETINGS, "direct", by=2)
    state.count(Count.LOST_SLOTS)
    state.count(Count.STEPS_SKIPPED, "non_finite")
    state.count(Count.SKETCH_ROWS, "out", by=300)
    state.count(Count.SKETCH_ROUNDS, "complete", by=4)
    state.count(Count.AUDITS, "passed", by=6)
    state.count(Count.SKETCHES_LOST, "busy", by=3)
    return state


def scraped(state: PeerState) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(make_registry(state)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_values_are_the_states() -> None:
    samples = scraped(busy_state())
    expected = {
        ("shoal_tokens_total",): 2048,
        ("shoal_steps_total",): 2,
        ("shoal_step",): 2,
        ("shoal_steps_planned",): 100,
        ("shoal_unmerged_steps",): 5,
        ("shoal_island_processes",): 4,
        ("shoal_loss",): 3.0,
        ("shoal_blocked_seconds_total",): 1.0,
        ("shoal_phase", "phase", "training"): 1,
        ("shoal_phase", "phase", "ready"): 0,
        ("shoal_peers_connected",): 1,
        ("shoal_peers_silent",): 3,
        ("shoal_cut_off",): 1,
        ("shoal_cut_offs_total",): 1,
        ("shoal_meetings_total", "outcome", "direct"): 2,
        ("shoal_slots", "state", "owned"): 1,
        ("shoal_slots", "state", "standby"): 2,
        ("shoal_slots_unowned",): 5,
        ("shoal_slots_lost_total",): 1,
        ("shoal_fidelity_ratio", "layer", "1"): 0.8,
        ("shoal_outer_rounds_total", "outcome", "committed"): 1,
        ("shoal_outer_members",): 4,
        ("shoal_refusals_total", "reason", "stale_epoch"): 1,
        ("shoal_gossip_dropped_total", "reason", "queue_full"): 2,
        ("shoal_sketch_rows_total", "direction", "out"): 300,
        ("shoal_sketch_rounds_total", "outcome", "complete"): 4,
        ("shoal_audits_total", "outcome", "passed"): 6,
        ("shoal_sketches_lost_total", "reason", "busy"): 3,
        ("shoal_transport_restarts_total",): 1,
        ("shoal_clock_offset_seconds",): -0.2,
        ("shoal_checkpoint_size_bytes",): 1000,
    }
    for (name, *label), value in expected.items():
        key = (name, ((label[0], label[1]),) if label else ())
        assert samples[key] == pytest.approx(value), key
    assert samples["shoal_network_bytes_total", (("direction", "in"), ("kind", "deltas"))] == 500
    assert samples["shoal_peers", (("phase", "training"), ("role", "composer"), ("version", "0.1.0"))] == 2
    assert samples["shoal_step_seconds_bucket", (("le", "0.25"), ("part", "forward_backward"))] == 2
    assert samples["shoal_step_seconds_bucket", (("le", "0.1"), ("part", "forward_backward"))] == 0
    assert samples["shoal_step_seconds_count", (("part", "waiting"),)] == 2
    assert samples["shoal_step_seconds_sum", (("part", "waiting"),)] == pytest.approx(1.0)
    info = (("peer_id", "12D3KooWa"), ("role", "composer"), ("run_id", "r-0123456789ab"), ("version", __version__))
    assert samples["shoal_peer_info", info] == 1


def test_slots_that_do_not_exist_hide_none_that_nobody_owns() -> None:
    """What a peer lists in its record, it alone has signed."""
    state = busy_state()
    state.set_peers([PeerSeen(peer_id="12D3KooWz", role="worker", phase="training", slots=(0, *range(8, 100)))])
    assert scraped(state)["shoal_slots_unowned", ()] == 7


def test_every_metric_of_the_list_has_a_value_and_no_other_exists() -> None:
    names = {name for name, _ in scraped(busy_state()) if name.startswith("shoal_")}
    listed = {spec.exposed_name for spec in METRICS}
    histograms = {
        spec.name + suffix for spec in METRICS if spec.kind == "histogram" for suffix in ("_bucket", "_sum", "_count")
    }
    assert names == {spec.exposed_name for spec in METRICS if spec.kind != "histogram"} | histograms
    assert all(f"`{name}`" in reference() for name in listed)


def test_what_is_not_known_is_absent() -> None:
    names = {name for name, _ in scraped(PeerState("bootstrap"))}
    assert not names & {"shoal_loss", "shoal_clock_offset_seconds", "shoal_outer_members", "shoal_slots_unowned"}
    assert names >= {"shoal_tokens_total", "shoal_phase", "shoal_heartbeat_age_seconds"}


def test_names_follow_the_conventions() -> None:
    for spec in METRICS:
        assert re.fullmatch(r"shoal_[a-z_]+[a-z]", spec.name), spec.name
        assert spec.help.endswith("."), spec.name
        assert not spec.name.endswith(("_total", "_info", "_count", "_sum", "_bucket")), spec.name
        assert not re.search(r"_(ms|millis|minutes|mb|kb|percent)(_|$)", spec.name), spec.name
    assert len({spec.name for spec in METRICS}) == len(METRICS)


def test_promtool_finds_nothing_to_say() -> None:
    tool = shutil.which("promtool")
    assert tool, "promtool is missing: apt-get install -y prometheus"
    text = generate_latest(make_registry(busy_state()))
    done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_peers_cannot_blow_up_the_number_of_series() -> None:
    state = PeerState("composer")
    state.set_peers(
        PeerSeen(peer_id=f"p{i}", role="composer", phase="ready", version=f"{i}" * 100)
        for i in range(3 * MAX_LABEL_SETS)
    )
    peers = {labels: value for (name, labels), value in scraped(state).items() if name == "shoal_peers"}
    assert len(peers) == MAX_LABEL_SETS + 1
    assert sum(peers.values()) == 3 * MAX_LABEL_SETS
    assert max(len(value) for labels in peers for _, value in labels) <= 32


def test_absorbed_totals_never_go_down_when_the_source_restarts() -> None:
    state = PeerState("composer")
    for total in (10, 25, 5, 8):  # it restarted between 25 and 5
        state.absorb("transport", Count.BYTES, {("gossip", "in"): total})
    state.absorb("dht", Count.BYTES, {("gossip", "in"): 100})
    assert state.snapshot()["bytes"] == [{"kind": "gossip", "direction": "in", "bytes": 133}]


def test_loss_average_starts_at_the_first_loss_and_skips_the_non_finite() -> None:
    state = PeerState("composer")
    for step, loss in enumerate([4.0, math.nan, math.inf, 4.0], start=1):
        state.record_step(step=step, tokens=1, loss=loss, seconds={})
    snapshot = state.snapshot()
    assert snapshot["loss"] == pytest.approx(4.0)
    assert snapshot["steps_done"] == 4


def test_rate_against_a_direct_count() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    rate, now, arrivals = Rate(10.0), 100.0, []
    for _ in range(200):
        now += rng.uniform(0.01, 1.0)
        amount = rng.randrange(1, 1000)
        rate.add(now, amount)
        arrivals.append((now, amount))
    recent = [(at, amount) for at, amount in arrivals if at >= now - 10.0]
    assert rate.per_second(now) == pytest.approx(sum(amount for _, amount in recent[1:]) / (now - recent[0][0]))
    assert rate.per_second(now + 60) == 0.0


def test_histogram_against_a_direct_count() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    values = [rng.choice([0.1, 1.0, 2.5, rng.expovariate(0.3)]) for _ in range(500)]
    histogram = Histogram((0.1, 1.0, 2.5))
    for value in values:
        histogram.observe(value)
    told = histogram.snapshot()
    assert told["buckets"] == [
        [bound, sum(value <= float(bound) for value in values)] for bound in ("0.1", "1.0", "2.5", "+Inf")
    ]
    assert told["sum"] == pytest.approx(sum(values))
    with pytest.raises(ValueError, match="nan"):
        histogram.observe(math.nan)


@pytest.mark.parametrize("pushes", [0, 1, 7, 8, 9, 1000, 4099])
def test_history_covers_everything_in_bounded_memory(pushes: int) -> None:
    history = History(2, capacity=8)
    for i in range(pushes):
        history.push(float(i), math.nan if i % 2 else 1.0)
    first, second = history.columns()
    assert len(first) == len(second) <= 8
    assert first == sorted(first)
    assert all(value == 1.0 or math.isnan(value) for value in second)
    if pushes > 1:
        assert first[0] < pushes / 3
        assert first[-1] >= pushes * 0.7


def test_a_point_of_many_steps_takes_no_more_memory_than_one_of_few() -> None:
    history = History(3, capacity=8)
    sizes = []
    for i in range(20_000):
        history.push(float(i), 1.0, math.nan)
        if i % 500 == 0:
            sizes.append(len(pickle.dumps(history)))
    assert max(sizes) < 1000


def test_writing_and_reading_from_many_threads_loses_nothing() -> None:
    state = PeerState("composer")

    def write(thread: int) -> None:
        for step in range(200):
            state.record_step(step=step, tokens=3, loss=1.0, seconds={StepPart.OPTIMIZER: 0.1})
            state.count(Count.REFUSALS, f"reason{thread}")
            if step % 20 == 0:
                state.snapshot()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = state.snapshot()
    assert snapshot["tokens"] == 2400
    assert snapshot["refusals"] == {f"reason{i}": 200 for i in range(4)}
