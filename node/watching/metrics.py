"""Prometheus metrics: readings of `PeerState`, taken when Prometheus asks.

`METRICS` lists every metric once: name, type, labels, help and how to read it from a snapshot. The collector and the
table in the documentation (`reference`) both come from that list. Names follow Prometheus' conventions: `shoal_`, base
units, `_total` for counters. Rates are left to PromQL: `rate(shoal_tokens_total[1m])`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from .state import PeerState, Phase

MAX_LABEL_SETS = 64  # of a metric whose labels other peers choose; the rest is counted as "other"

Snapshot = dict[str, Any]
Sample = tuple[tuple[str, ...], Any]  # label values; a number, or for a histogram its snapshot


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric. `read` yields nothing while a value is not known: absent is not zero."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    read: Callable[[Snapshot], Iterable[Sample]]

    @property
    def exposed_name(self) -> str:
        """The name of the time series, with the suffix of its type."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def _value(*path: str) -> Callable[[Snapshot], Iterable[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        value: Any = snapshot
        for key in path:
            value = value[key] if value is not None else None
        if value is not None:
            yield (), value

    return read


def _each(*path: str) -> Callable[[Snapshot], Iterable[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        mapping: Any = snapshot
        for key in path:
            mapping = mapping[key]
        for label, value in mapping.items():
            if value is not None:
                yield (label,), value

    return read


def _slots(snapshot: Snapshot) -> Iterator[Sample]:
    slots = snapshot["slots"]
    yield ("owned",), len(slots["owned"])
    yield ("standby",), len(slots["standby"])


def _unowned(snapshot: Snapshot) -> Iterator[Sample]:
    if snapshot["peers"]:
        total = snapshot["slots_total"]
        owned = {slot for peer in snapshot["peers"] for slot in peer["slots"] if slot < total}
        yield (), total - len(owned)


def _peers(snapshot: Snapshot) -> Iterator[Sample]:
    kinds = Counter((peer["role"], peer["phase"], peer["version"][:32]) for peer in snapshot["peers"])
    listed = kinds.most_common(MAX_LABEL_SETS)
    yield from listed
    if rest := kinds.total() - sum(number for _, number in listed):
        yield ("other", "other", "other"), rest


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        name="shoal_peer",
        kind="info",
        labels=("version", "run_id", "peer_id", "role"),
        help="Who this peer is and in which run.",
        read=lambda s: [((s["version"], s["run_id"], s["peer_id"], s["role"]), 1)],
    ),
    MetricSpec(
        name="shoal_phase",
        kind="gauge",
        labels=("phase",),
        help="1 for the phase this peer is in, 0 for the others.",
        read=lambda s: [((phase.value,), int(phase.value == s["phase"])) for phase in Phase],
    ),
    MetricSpec(
        name="shoal_start_time_seconds", kind="gauge", help="Start of the peer, unix time.", read=_value("started_at")
    ),
    MetricSpec(
        name="shoal_heartbeat_age_seconds",
        kind="gauge",
        help="Since the main loop last said that it is alive.",
        read=_value("heartbeat_age_seconds"),
    ),
    MetricSpec(
        name="shoal_clock_offset_seconds",
        kind="gauge",
        help="This clock minus the swarm's.",
        read=_value("clock_offset_seconds"),
    ),
    # Training.
    MetricSpec(name="shoal_tokens", kind="counter", help="Tokens this process has trained on.", read=_value("tokens")),
    MetricSpec(
        name="shoal_steps", kind="counter", help="Inner steps this process has done.", read=_value("steps_done")
    ),
    MetricSpec(name="shoal_step", kind="gauge", help="This peer's step in the run.", read=_value("step")),
    MetricSpec(
        name="shoal_steps_planned", kind="gauge", help="Steps after which it is done.", read=_value("steps_total")
    ),
    MetricSpec(
        name="shoal_island_processes",
        kind="gauge",
        help="Processes that took the last step together; fewer than --island while lost ones are missing.",
        read=_value("processes"),
    ),
    MetricSpec(
        name="shoal_unmerged_steps",
        kind="gauge",
        help="Own inner steps that the common backbone does not have yet.",
        read=_value("unmerged_steps"),
    ),
    MetricSpec(
        name="shoal_steps_skipped",
        kind="counter",
        labels=("reason",),
        help="Steps whose update was thrown away.",
        read=_each("steps_skipped"),
    ),
    MetricSpec(
        name="shoal_loss",
        kind="gauge",
        help="Training loss in nats a token, moving average over about 20 steps.",
        read=_value("loss"),
    ),
    MetricSpec(
        name="shoal_step_seconds",
        kind="histogram",
        labels=("part",),
        help="Time of an inner step by what it went into.",
        read=_each("step_seconds"),
    ),
    MetricSpec(
        name="shoal_blocked_seconds",
        kind="counter",
        help="Time between steps on what the network's side asked for: stand-ins put in place, commits, copies taken. "
        "What other threads take from training is not in it.",
        read=_value("blocked_seconds"),
    ),
    MetricSpec(
        name="shoal_fit_seconds",
        kind="counter",
        help="Fits of stand-ins beside training.",
        read=_value("fits", "seconds"),
    ),
    MetricSpec(
        name="shoal_fits_skipped",
        kind="counter",
        help="Fits of a slot's stand-ins that were due again before they had begun: they take longer than steps.",
        read=_value("fits", "skipped"),
    ),
    MetricSpec(
        name="shoal_fidelity_ratio",
        kind="gauge",
        labels=("layer",),
        help="How well the published stand-ins of own experts answer, 1 = like the experts.",
        read=_each("fidelity"),
    ),
    # Swarm.
    MetricSpec(
        name="shoal_peers",
        kind="gauge",
        labels=("role", "phase", "version"),
        help="Live peers in the directory, this one included.",
        read=_peers,
    ),
    MetricSpec(
        name="shoal_peers_connected",
        kind="gauge",
        help="Other peers in the directory with an open connection to this one.",
        read=_value("sight", "connected"),
    ),
    MetricSpec(
        name="shoal_peers_silent",
        kind="gauge",
        help="Other peers that fell silent without leaving, until they come back or fifteen lifetimes of their records "
        "have passed.",
        read=_value("sight", "silent"),
    ),
    MetricSpec(
        name="shoal_cut_off",
        kind="gauge",
        help="1 while this peer sees no majority of those it knows: its network is gone, or the swarm has split.",
        read=lambda s: [((), int(s["sight"]["cut_off"]))] if s["sight"] else [],
    ),
    MetricSpec(
        name="shoal_cut_offs",
        kind="counter",
        help="Times that this peer lost sight of most others.",
        read=_value("cut_off"),
    ),
    MetricSpec(name="shoal_slots", kind="gauge", labels=("state",), help="Slots this peer holds.", read=_slots),
    MetricSpec(name="shoal_slots_planned", kind="gauge", help="Slots the model has.", read=_value("slots_total")),
    MetricSpec(name="shoal_slots_unowned", kind="gauge", help="Slots that no live peer holds.", read=_unowned),
    MetricSpec(
        name="shoal_slots_lost",
        kind="counter",
        help="Slots that no peer had a copy of and that restarted from the seed.",
        read=_value("slots", "lost"),
    ),
    MetricSpec(
        name="shoal_outer_rounds",
        kind="counter",
        labels=("outcome",),
        help="Outer rounds by how they ended.",
        read=_each("outer", "rounds"),
    ),
    MetricSpec(
        name="shoal_outer_round_seconds",
        kind="histogram",
        help="Time of an outer round, waiting for members included.",
        read=_value("outer", "seconds"),
    ),
    MetricSpec(
        name="shoal_outer_members",
        kind="gauge",
        help="Members of the last outer round.",
        read=_value("outer", "last", "members"),
    ),
    MetricSpec(
        name="shoal_outer_commit_timestamp_seconds",
        kind="gauge",
        help="When an outer round last committed, unix time.",
        read=_value("outer", "committed_at"),
    ),
    # Network.
    MetricSpec(
        name="shoal_network_bytes",
        kind="counter",
        labels=("kind", "direction"),
        help="Payload bytes by what they carry.",
        read=lambda s: [((row["kind"], row["direction"]), row["bytes"]) for row in s["bytes"]],
    ),
    MetricSpec(
        name="shoal_transport_restarts",
        kind="counter",
        help="Times the transport process had to be started again.",
        read=_value("transport_restarts"),
    ),
    MetricSpec(
        name="shoal_meetings",
        kind="counter",
        labels=("outcome",),
        help="Peers behind routers that were dialled: direct, past the relay, or relayed.",
        read=_each("meetings"),
    ),
    MetricSpec(
        name="shoal_gossip_dropped",
        kind="counter",
        labels=("reason",),
        help="Gossip messages dropped before being read.",
        read=_each("gossip_dropped"),
    ),
    MetricSpec(
        name="shoal_refusals",
        kind="counter",
        labels=("reason",),
        help="Records and messages that broke a rule.",
        read=_each("refusals"),
    ),
    MetricSpec(
        name="shoal_sketch_rows",
        kind="counter",
        labels=("direction",),
        help="Rows of sketches: out to the owners of experts, in from composers, learned from.",
        read=_each("sketch_rows"),
    ),
    MetricSpec(
        name="shoal_sketch_age_versions",
        kind="histogram",
        help="Stand-ins that were published between the one that a slot's sketches were taken at and their use.",
        read=_value("sketch_ages"),
    ),
    MetricSpec(
        name="shoal_sketch_rounds",
        kind="counter",
        labels=("outcome",),
        help="Rounds of gradient sketches, one a slot and interval, by how they ended for this peer.",
        read=_each("sketch_rounds"),
    ),
    MetricSpec(
        name="shoal_sketches_lost",
        kind="counter",
        labels=("reason",),
        help="Sketches of slots that were sent and that their owner did not take.",
        read=_each("sketches_lost"),
    ),
    MetricSpec(
        name="shoal_audits",
        kind="counter",
        labels=("outcome",),
        help="Audits of other peers' experts by this peer; docs/trust.md lists the outcomes.",
        read=_each("audits"),
    ),
    # Disk.
    MetricSpec(
        name="shoal_checkpoint_write_seconds",
        kind="histogram",
        help="Time to write a checkpoint.",
        read=_value("checkpoint_seconds"),
    ),
    MetricSpec(
        name="shoal_checkpoint_size_bytes",
        kind="gauge",
        help="Size of the last checkpoint.",
        read=_value("checkpoint", "bytes"),
    ),
    MetricSpec(
        name="shoal_checkpoint_timestamp_seconds",
        kind="gauge",
        help="When the last checkpoint was complete, unix time.",
        read=_value("checkpoint", "at"),
    ),
)


class StateCollector(Collector):
    """Turns a snapshot into metric families whenever the registry is scraped."""

    def __init__(self, state: PeerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Family]:
        snapshot = self._state.snapshot()
        for spec in METRICS:
            yield _family(spec, spec.read(snapshot))

    def describe(self) -> Iterator[Family]:
        for spec in METRICS:
            yield _family(spec, ())


def _family(spec: MetricSpec, samples: Iterable[Sample]) -> Family:
    if spec.kind == "histogram":
        histogram = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
        for labels, value in samples:
            histogram.add_metric(labels, [tuple(bucket) for bucket in value["buckets"]], value["sum"])
        return histogram
    if spec.kind == "info":
        info = InfoMetricFamily(spec.name, spec.help)
        for labels, _ in samples:
            info.add_metric((), dict(zip(spec.labels, labels, strict=True)))
        return info
    family = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(
        spec.name, spec.help, labels=spec.labels
    )
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def make_registry(state: PeerState) -> CollectorRegistry:
    """A registry of its own with the peer's metrics and those of its process (memory, CPU, open files)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateCollector(state))
    ProcessCollector(registry=registry)
    return registry


def reference() -> str:
    """The list of metrics as a Markdown table."""
    rows = ["| metric | type | labels | what it says |", "|---|---|---|---|"]
    rows += [
        f"| `{spec.exposed_name}` | {spec.kind} | {', '.join(f'`{label}`' for label in spec.labels)} | {spec.help} |"
        for spec in METRICS
    ]
    return "\n".join(rows) + "\n"
