"""A tape of faults: what happens to which peer, and when. The same tape plays the same faults again.

One JSON object a line; `at` and `seconds` are seconds, `at` after all composers have begun to merge:

    {"at": 10, "fault": "kill", "peers": ["c1"], "seconds": 20}      back on the same folder after that; never if 0
    {"at": 30, "fault": "partition", "peers": ["c1", "c2"], "seconds": 60}

Peers are `c0`, `c1`, ... (composers) and `founder`. `value` is what the fault has one of: see `FAULTS`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

# What each fault does, and what its `value` is.
FAULTS = {
    "kill": "SIGKILL; `seconds` later the peer starts again on its folder, never if 0",
    "stop": "SIGSTOP of all processes of the peer, then SIGCONT",
    "partition": "the peers see each other and nobody else",
    "rate": "a link of `value` Mbit/s, each way",
    "latency": "`value` ms more in every round trip to the peer",
    "loss": "`value` per cent of arriving packets are dropped",
    "straggler": "the peer's own process runs for `value` of the time (SIGSTOP and SIGCONT in turn)",
    "clock": "the peer's wall clock is `value` seconds ahead, or behind if below 0",
    "disk": "the peer's folder, a file system of 64 MB, is full",
    "sign-flipper": "from its start: sends its pseudo-gradients with the opposite sign",
    "nan": "from its start: sends NaN instead of pseudo-gradients",
    "weight-liar": "from its start: claims a million times the tokens it has trained on",
}
LIARS = ("sign-flipper", "nan", "weight-liar")  # not a moment in a run but what a peer is: `at` is 0
NEEDS_VALUE = ("rate", "latency", "loss", "straggler", "clock")


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a tape. Raises ValueError on what cannot be."""

    at: float
    fault: str
    peers: tuple[str, ...]
    seconds: float = 0.0  # 0: to the end
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"there is no fault {self.fault!r}; choose from {', '.join(FAULTS)}")
        if not self.peers or self.at < 0 or self.seconds < 0:
            raise ValueError(f"{self.fault} needs peers, and times of at least 0")
        if (self.fault in NEEDS_VALUE) != bool(self.value) or (self.value < 0 and self.fault != "clock"):
            raise ValueError(f"{self.fault} with a value of {self.value:g}")
        if self.fault == "straggler" and self.value >= 1:
            raise ValueError("a straggler runs for a part of the time, below 1")
        if self.fault in LIARS and (self.at or self.seconds):
            raise ValueError(f"{self.fault}: a liar lies from its start to its end")


Tape = tuple[Fault, ...]


def read(path: Path) -> Tape:
    """A tape from disk. Raises ValueError, with the line's number."""
    faults = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                faults.append(msgspec.json.decode(line, type=Fault))
            except ValueError as error:  # msgspec's errors are
                raise ValueError(f"{path}, line {number}: {error}") from error
    return tuple(faults)


def text(tape: Tape) -> str:
    """For `read`."""
    return "".join(json.dumps(msgspec.to_builtins(fault)) + "\n" for fault in tape)


def left(tape: Tape, composers: Sequence[str], seconds: float) -> float:
    """The part of all composers' time to train that the tape leaves: killed, stopped and slow ones have less.

    A perfect swarm would reach this goodput: who is cut off trains on, and restarts take no time.
    """
    ends = {fault: fault.at + fault.seconds if fault.seconds else seconds for fault in tape}
    moments = sorted({0.0, seconds, *(min(seconds, t) for fault in tape for t in (fault.at, ends[fault]))})
    total = 0.0
    for composer in composers:
        for begin, end in itertools.pairwise(moments):
            speeds = [
                fault.value if fault.fault == "straggler" else 0.0
                for fault in tape
                if fault.fault in ("kill", "stop", "straggler")
                and composer in fault.peers
                and fault.at <= begin < ends[fault]
            ]
            total += (end - begin) * min(speeds, default=1.0)
    return total / (len(composers) * seconds)


def standard(composers: Sequence[str], seconds: float) -> Tape:
    """Three kills, a partition of three composers in ten for a minute, one straggler at a quarter of the speed.

    Times are parts of `seconds`; a run shorter than four minutes has a shorter partition.
    """
    if len(composers) < 3:
        raise ValueError("the standard tape needs three composers")
    cut = max(1, round(0.3 * len(composers)))
    back = min(20.0, seconds / 12)
    killed = [composers[i % len(composers)] for i in (0, 1, 2)]
    return (
        Fault(at=0, fault="straggler", peers=(composers[-1],), value=0.25),
        Fault(at=seconds * 0.05, fault="kill", peers=(killed[0],), seconds=back),
        Fault(at=seconds * 0.30, fault="kill", peers=(killed[1],), seconds=back),
        Fault(
            at=seconds * 0.50, fault="partition", peers=tuple(composers[2 : 2 + cut]), seconds=min(60.0, seconds / 4)
        ),
        Fault(at=seconds * 0.80, fault="kill", peers=(killed[2],)),
    )


def flippers(composers: Sequence[str], seconds: float) -> Tape:
    """A quarter of the composers send their pseudo-gradients with the opposite sign."""
    return (Fault(at=0, fault="sign-flipper", peers=tuple(composers[-max(1, len(composers) // 4) :])),)


def seeded(seed: int) -> Callable[[Sequence[str], float], Tape]:
    """Faults at random, one every 20 seconds on average, none in the last quarter: what is left is for recovering."""

    def tape(composers: Sequence[str], seconds: float) -> Tape:
        chance = random.Random(seed)
        faults = []
        at = 0.0
        while (at := at + chance.uniform(10, 30)) < 0.75 * seconds:
            kind = chance.choice(("kill", "stop", "partition", "rate", "latency", "loss", "straggler"))
            count = max(1, round(0.3 * len(composers))) if kind == "partition" else 1
            value = {"rate": 2.0, "latency": 200.0, "loss": 5.0, "straggler": 0.25}.get(kind, 0.0)
            lasts = round(chance.uniform(5, min(40, seconds / 4)), 1)
            peers = tuple(sorted(chance.sample(list(composers), count)))
            faults.append(Fault(at=round(at, 1), fault=kind, peers=peers, seconds=lasts, value=value))
        return tuple(faults)

    return tape
