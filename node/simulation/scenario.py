"""What is simulated: how many peers, how they come, go and fail, over which links."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One simulated run. Equal scenarios have equal histories. Raises ConfigError on what cannot be."""

    peers: int = 100  # composers at the start; those that go are replaced, at random times, by as many newcomers
    hours: float = 1.0  # simulated
    seed: int = 0
    preset: str = "small"  # of the run that they train: its model gives the sizes, its manifest the cadences
    mean_session_minutes: float = 0.0  # exponential; 0: everybody stays
    crash_share: float = 0.5  # of those that go; the others hand over and say so
    mean_capacity: float = 8.0  # slots that a peer can own; exponential, 1 at least
    step_seconds: float = 2.0  # of a common peer's inner step; they differ by a factor of about 1.5
    straggler_share: float = 0.05  # of the peers, whose steps take four times as long and whose uplinks are a tenth
    latency_ms: float = 60.0  # one way, median over peers; they differ by a factor of about 1.7
    uplink_mbit: float = 40.0  # median over peers; they differ by a factor of about 2
    loss: float = 0.01  # of gossip; what is lost comes by the directory, at the next look
    partition_share: float = 0.0  # of the peers, cut off together
    partition_minutes: float = 0.0  # how long, from the middle of the run on
    lease_seconds: float = 20.0
    round_seconds: float = 30.0  # that an all-reduce may take; who needs longer is missing

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, fine in {
                "peers": 1 <= self.peers <= 4096,
                "hours": 0 < self.hours <= 1000,
                "mean_session_minutes": self.mean_session_minutes == 0 or self.mean_session_minutes >= 0.1,
                "crash_share": 0 <= self.crash_share <= 1,
                "mean_capacity": self.mean_capacity > 0,
                "step_seconds": self.step_seconds > 0,
                "straggler_share": 0 <= self.straggler_share <= 1,
                "latency_ms": self.latency_ms >= 0,
                "uplink_mbit": self.uplink_mbit > 0,
                "loss": 0 <= self.loss < 1,
                "partition_share": 0 <= self.partition_share <= 1,
                "partition_minutes": self.partition_minutes >= 0,
                "lease_seconds": self.lease_seconds >= 1,
                "round_seconds": self.round_seconds > 0,
            }.items()
            if not fine
        ]
        if wrong:
            raise ConfigError(f"{wrong[0]} = {getattr(self, wrong[0])} cannot be simulated", fix="see --help")
