"""The simulator: equal seeds, equal histories; what it checks can fail; what swarms of some sizes come to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from shoal.node import cli
from shoal.node.errors import ConfigError
from shoal.node.simulation.engine import BrokenInvariant, Engine
from shoal.node.simulation.report import Report, report_of
from shoal.node.simulation.scenario import Scenario
from shoal.node.simulation.swarm import Fault, Swarm
from shoal.node.simulation.tapes import play
from shoal.protocol.averaging.grouping import MAX_GROUP
from shoal.protocol.directory import view

SMALL = Scenario(peers=8, hours=0.1, preset="tiny", step_seconds=1.0, straggler_share=0.0)


def simulated(scenario: Scenario, tape: tuple[Fault, ...] = ()) -> tuple[Swarm, Report]:
    swarm = Swarm(scenario, tape=tape)
    swarm.run(3600 * scenario.hours)
    swarm.finish()
    return swarm, report_of(swarm, 0.0)


def test_the_clock_runs_actions_in_their_order() -> None:
    engine, seen = Engine(0), []
    engine.at(2.0, seen.append, "late")
    engine.at(1.0, lambda: engine.after(0.0, seen.append, "then"))
    engine.at(1.0, seen.append, "first")
    engine.run(1.5)
    assert (seen, engine.now) == (["first", "then"], 1.5)
    engine.run(9.0)
    assert seen[-1] == "late"


def test_one_seed_has_one_history_and_another_another() -> None:
    churned = replace(SMALL, mean_session_minutes=3.0, loss=0.1)
    first, again, other = (simulated(each)[1] for each in (churned, churned, replace(churned, seed=1)))
    assert first.as_json() == again.as_json()
    assert first.fingerprint != other.fingerprint
    assert first.crashes + first.leaves > 3


def test_whoever_is_not_asked_would_have_decided_nothing() -> None:
    scenario = replace(SMALL, peers=20, mean_session_minutes=3.0, mean_capacity=1.0, seed=3)
    fingerprints = set()
    for everybody in (False, True):
        swarm = Swarm(scenario, ask_everybody=everybody)
        swarm.run(180)
        fingerprints.add(swarm.world.engine.fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("peers", [2, 12])
def test_a_faultless_swarm_commits_nearly_all_that_it_learns(peers: int) -> None:
    swarm, report = simulated(replace(SMALL, peers=peers, hours=0.15, loss=0.0, mean_capacity=40.0))
    assert 0.93 < report.goodput <= 1.0
    assert report.coverage == pytest.approx(1.0)
    assert set(report.rounds) == {"committed"}
    assert report.lost_slots == report.refetched == 0
    assert all(len(holders) == 1 for holders in swarm.slots.holders.values())
    for fragment, chain in enumerate(swarm.commits.chains):
        assert {peer.held[fragment].digest for peer in swarm.world.peers.values()} == {chain[-1]}


def test_more_than_one_group_merges_in_rows_and_columns() -> None:
    swarm, report = simulated(replace(SMALL, peers=70, hours=0.02, loss=0.0))
    assert len(swarm.world.peers) > MAX_GROUP
    assert report.commits > 2
    last = swarm.commits.states[swarm.commits.chains[0][-1]]
    assert len(last.tokens) > MAX_GROUP
    assert report.coverage == pytest.approx(1.0)


def test_the_minority_of_a_partition_commits_nothing_and_catches_up() -> None:
    swarm = Swarm(replace(SMALL, peers=10, hours=0.2), tape=[Fault(200.0, "cut", 0, 120.0, 0.3)])
    swarm.run(319.0)
    cut = {peer for cohort in swarm.world.board.cohorts if cohort.cut_since is not None for peer in cohort.members}
    assert len(cut) == 3
    committed = [swarm.commits.states[name] for chain in swarm.commits.chains for name in chain]
    meanwhile = [state for state in committed if state.opened > 201.0]
    assert len(meanwhile) > 5
    assert all(not cut & set(state.tokens) for state in meanwhile)
    assert max(swarm.world.peers[p].held[0].round for p in cut) < min(state.round for state in meanwhile)
    swarm.run(420.0)
    newest = [chain[-2:] for chain in swarm.commits.chains]
    for peer in swarm.world.peers.values():
        assert all(held.digest in names for held, names in zip(peer.held, newest, strict=True))
    assert all(len(holders) == 1 for holders in swarm.slots.holders.values())


def test_a_fork_is_an_error_with_what_led_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were those that fell silent not counted, both sides of a split would commit."""
    monkeypatch.setattr(view, "ABSENT_LIFETIMES", 0)
    with pytest.raises(BrokenInvariant, match=r"committed as two states: a fork(.|\n)*links.cut") as caught:
        simulated(replace(SMALL, peers=10, hours=0.15), (Fault(100.0, "cut", 0, 200.0, 0.4),))
    assert "seed 0" in str(caught.value)


@pytest.mark.parametrize("seed", [*range(3), -5])  # of the last one, a peer takes 12 seconds for an all-reduce
def test_tapes_of_faults_end_well(seed: int) -> None:
    assert play(seed).commits > 10


def test_what_merging_costs_a_peer_does_not_grow_with_the_swarm() -> None:
    ten, hundred = (simulated(replace(SMALL, peers=peers, hours=0.04))[1] for peers in (10, 100))
    assert hundred.bytes_per_round < 3.5 * ten.bytes_per_round  # a second half, of row sums in float32
    for kind in ("deltas", "slots"):
        assert hundred.bytes_per_second[kind] < 1.2 * ten.bytes_per_second[kind]
    # Everybody hears everybody: docs/scale.md. Linear, and no worse.
    assert hundred.bytes_per_second["records"] < 12 * ten.bytes_per_second["records"]


def test_a_crash_costs_what_was_not_copied_and_no_more() -> None:
    swarm, report = simulated(replace(SMALL, hours=0.15), (Fault(200.0, "crash", 2),))
    assert report.crashes == 1
    assert report.lost_slots == 0
    assert 0 < report.orphaned_slot_seconds < 16 * 3 * SMALL.lease_seconds
    assert all(len(holders) == 1 for holders in swarm.slots.holders.values())


def test_the_command_prints_a_table_or_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--hours", "0.02", "--preset", "tiny"]
    assert cli.main(["simulate", "--sweep", "3,5", *common]) == 0
    text = capsys.readouterr().out
    assert "goodput" in text
    assert "sent per peer" in text
    assert cli.main(["simulate", "--peers", "4", "--json", *common]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert told["peers"] == 4
    assert cli.main(["simulate", "--tapes", "1"]) == 0
    assert "1 tapes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["--sweep", "3,x"], ["--peers", "0"], ["--loss", "1"], ["--tapes", "0"]], ids=" ".join
)
def test_what_cannot_be_simulated_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", *argv]) == 2
    assert argv[0].strip("-") in capsys.readouterr().err


def test_scenarios_are_checked() -> None:
    with pytest.raises(ConfigError, match="straggler_share"):
        Scenario(straggler_share=2.0)
