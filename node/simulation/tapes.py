"""Random fault tapes for small swarms: whatever happens, nothing that was committed is lost, and all ends well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .engine import Engine
from .scenario import Scenario
from .swarm import Fault, Kind, Swarm

STRIKES_SECONDS = 300.0
SETTLE_LEASES = 40  # for silent peers to be forgotten, and slots to find their owners
LEASE = 8.0


@dataclass(frozen=True)
class TapeResult:
    """What a tape came to. A broken invariant raises instead."""

    seed: int
    faults: int
    commits: int
    lost_slots: int  # whose owner and standby died together
    avoidable_losses: int
    refetched: int
    mended: int


def tape_of(seed: int) -> tuple[Scenario, list[Fault]]:
    """A small swarm and what happens to it, drawn from a seed."""
    rng = Engine(seed).rng("tape")
    scenario = Scenario(
        peers=rng.randint(3, 8),
        hours=1.0,
        seed=seed,
        preset="tiny",
        mean_capacity=12.0,
        step_seconds=0.5,
        latency_ms=rng.choice([20.0, 100.0, 400.0]),
        loss=rng.choice([0.0, 0.05, 0.3]),
        lease_seconds=LEASE,
        round_seconds=60.0,  # whoever is drawn gets through: one that never does lets no round commit, fault or not
    )
    kinds: tuple[Kind, ...] = ("join", "join", "crash", "leave", "restart", "cut")
    faults = []
    for _ in range(rng.randint(2, 10)):
        at = rng.uniform(10, STRIKES_SECONDS)
        kind = rng.choice(kinds)
        # Shorter than silent peers are remembered: a longer split forks, which docs/failures.md says.
        seconds = rng.uniform(2, 10 * LEASE)
        faults.append(Fault(at, kind, rng.randrange(8), seconds, rng.choice([0.2, 0.4, 0.5])))
    return scenario, sorted(faults, key=lambda fault: fault.at)


def play(seed: int) -> TapeResult:
    """Play one tape to its end. Raises BrokenInvariant, with the last events, if anything went wrong."""
    scenario, faults = tape_of(seed)
    swarm = Swarm(scenario, tape=faults)
    swarm.run(STRIKES_SECONDS + SETTLE_LEASES * LEASE)
    swarm.finish()
    _require_well(swarm)
    measured = swarm.world.measures
    return TapeResult(
        seed=seed,
        faults=len(faults),
        commits=measured.commits,
        lost_slots=measured.lost_slots,
        avoidable_losses=measured.avoidable_losses,
        refetched=measured.refetched,
        mended=measured.mended,
    )


def _require_well(swarm: Swarm) -> None:
    """All that live hold the newest committed states, and every slot that fits has one owner."""
    world, engine = swarm.world, swarm.world.engine
    peers = [peer for peer in world.peers.values() if peer.active]
    for fragment, chain in enumerate(swarm.commits.chains):
        behind = [peer.name for peer in peers if len(peers) > 1 and peer.held[fragment].digest not in chain[-2:]]
        engine.require(not behind, f"{behind} do not hold what was committed last of fragment {fragment}")
        last = swarm.commits.states[chain[-1]].round
        idle = len(peers) > 1 and world.now - world.measures.last_commit > 10 * LEASE
        engine.require(not idle, f"nothing is committed any more after round {last}")
    room = sum(peer.capacity for peer in peers)
    owned = sum(bool(holders) for holders in swarm.slots.holders.values())
    engine.require(owned == min(room, world.num_slots), f"{owned} slots have owners, and there is room for {room}")
    engine.require(all(len(h) <= 1 for h in swarm.slots.holders.values()), "a slot has two owners at the end")


def play_all(count: int, first_seed: int, progress: Callable[[int], None] = lambda done: None) -> list[TapeResult]:
    """Play so many tapes; `progress` hears how many are done."""
    results = []
    for seed in range(first_seed, first_seed + count):
        results.append(play(seed))
        progress(len(results))
    return results
