"""`shoal simulate`: what the command line says, to a simulation and its tables. Heavy imports wait until it runs."""

from __future__ import annotations

import json as jsonlib
import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from ..config import PresetName
from ..errors import ConfigError
from .scenario import Scenario

if TYPE_CHECKING:
    from .report import Report

SWARM = Group("Swarm", sort_key=0)
FAILURES = Group("Failures", sort_key=1)
LINKS = Group("Links", sort_key=2)


def simulate(
    *,
    peers: Annotated[int, Parameter(group=SWARM)] = 100,
    hours: Annotated[float, Parameter(group=SWARM)] = 1.0,
    seed: int = 0,
    preset: Annotated[PresetName, Parameter(group=SWARM)] = "small",
    step_seconds: Annotated[float, Parameter(group=SWARM)] = 2.0,
    mean_capacity: Annotated[float, Parameter(group=SWARM)] = 8.0,
    lease_seconds: Annotated[float, Parameter(group=SWARM)] = 20.0,
    round_seconds: Annotated[float, Parameter(group=SWARM)] = 30.0,
    mean_session_minutes: Annotated[float, Parameter(group=FAILURES)] = 0.0,
    crash_share: Annotated[float, Parameter(group=FAILURES)] = 0.5,
    straggler_share: Annotated[float, Parameter(group=FAILURES)] = 0.05,
    partition_share: Annotated[float, Parameter(group=FAILURES)] = 0.0,
    partition_minutes: Annotated[float, Parameter(group=FAILURES)] = 0.0,
    latency_ms: Annotated[float, Parameter(group=LINKS)] = 60.0,
    uplink_mbit: Annotated[float, Parameter(group=LINKS)] = 40.0,
    loss: Annotated[float, Parameter(group=LINKS)] = 0.01,
    sweep: str | None = None,
    tapes: int | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Simulate a swarm of composers: the decisions that real peers take, on a virtual clock.

    Who owns what, groups, merging, votes and commits are decided by the code that peers run. Links, failures, speeds
    and what is learned are made up: docs/scale.md says how. That no slot has two owners for long and that no two states
    are committed for one round is checked all along.

        shoal simulate --peers 1000 --mean-session-minutes 60
        shoal simulate --sweep 10,30,100,300,1000 --hours 0.25
        shoal simulate --tapes 200

    Parameters
    ----------
    peers:
        Composers at the start. Those that go are replaced by as many newcomers.
    hours:
        How long the swarm lives, in its own time.
    seed:
        Of all randomness: the same seed gives the same history.
    preset:
        What is trained: its model gives the sizes of messages, its schedule the cadences.
    step_seconds:
        What a common peer takes for an inner step.
    mean_capacity:
        Slots that a peer can own, on average.
    lease_seconds:
        How long a peer is believed to be there after its last sign of life.
    round_seconds:
        How long an all-reduce may take. Who needs longer is missing in it.
    mean_session_minutes:
        How long a peer stays, on average; 0 for ever.
    crash_share:
        Of the peers that go, how many die. The others hand over what they own.
    straggler_share:
        Of the peers, how many are four times as slow, with a tenth of the uplink.
    partition_share:
        Of the peers, how many are cut off together in the middle of the run.
    partition_minutes:
        For how long they are.
    latency_ms:
        One way, of a common peer.
    uplink_mbit:
        Of a common peer.
    loss:
        Of gossip messages, how many are lost and have to be found in the directory.
    sweep:
        Numbers of peers, like 10,30,100: one run each, side by side, to see what grows.
    tapes:
        Play so many random tapes of faults on small swarms instead, and check how each ends. The other settings do not
        count for them, but for the seed, which is the first one.
    json:
        Print all numbers as JSON.
    """
    scenario = Scenario(
        peers=peers,
        hours=hours,
        seed=seed,
        preset=preset,
        mean_session_minutes=mean_session_minutes,
        crash_share=crash_share,
        mean_capacity=mean_capacity,
        step_seconds=step_seconds,
        straggler_share=straggler_share,
        latency_ms=latency_ms,
        uplink_mbit=uplink_mbit,
        loss=loss,
        partition_share=partition_share,
        partition_minutes=partition_minutes,
        lease_seconds=lease_seconds,
        round_seconds=round_seconds,
    )
    if tapes is not None:
        return _tapes(tapes, seed, json=json)
    reports = [_run(each, quiet=json) for each in _scenarios(scenario, sweep)]
    if json:
        print(jsonlib.dumps([report.as_json() for report in reports], indent=2))
        return 0
    from rich.console import Console

    from .report import table

    Console().print(table(reports))
    return 0


def _scenarios(scenario: Scenario, sweep: str | None) -> list[Scenario]:
    from dataclasses import replace

    if sweep is None:
        return [scenario]
    try:
        sizes = [int(size) for size in sweep.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep {sweep!r} is no list of numbers", fix="write it like 10,30,100") from None
    return [replace(scenario, peers=size) for size in sizes]


def _run(scenario: Scenario, *, quiet: bool) -> Report:
    from rich.console import Console
    from rich.progress import Progress

    from .report import report_of
    from .swarm import Swarm

    began = time.process_time()
    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as shown:
        task = shown.add_task(f"{scenario.peers} peers", total=3600 * scenario.hours)
        swarm = Swarm(scenario)
        swarm.run(3600 * scenario.hours, lambda seconds: shown.update(task, completed=seconds))
    swarm.finish()
    return report_of(swarm, time.process_time() - began)


def _tapes(count: int, first: int, *, json: bool) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress

    from .tapes import play_all

    if count < 1:
        raise ConfigError(f"--tapes {count} plays nothing", fix="give 1 or more")
    began = time.process_time()
    with Progress(console=Console(stderr=True), transient=True, disable=json) as shown:
        task = shown.add_task("tapes", total=count)
        results = play_all(count, first, lambda done: shown.update(task, completed=done))
    if json:
        print(jsonlib.dumps([asdict(result) for result in results], indent=2))
        return 0
    commits, faults = (sum(getattr(result, name) for result in results) for name in ("commits", "faults"))
    lost, avoidable = (sum(getattr(result, name) for result in results) for name in ("lost_slots", "avoidable_losses"))
    print(
        f"{count} tapes with {faults} faults: {commits} commits, none lost, no fork, no slot without its one owner at "
        f"the end.\n{lost} slots restarted without a copy, {avoidable} of them while a peer in reach had one. "
        f"{time.process_time() - began:.0f} s."
    )
    return 0
