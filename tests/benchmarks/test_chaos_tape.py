"""Tapes of faults: what is written is what is read, chance is a seed's, and what cannot be is refused."""

from pathlib import Path

import pytest
from shoal.benchmarks.chaos.tape import Fault, Tape, flippers, left, read, seeded, standard, text

COMPOSERS = [f"c{i}" for i in range(7)]


@pytest.mark.parametrize("tape", [standard(COMPOSERS, 240), flippers(COMPOSERS, 240), seeded(7)(COMPOSERS, 240)])
def test_a_tape_survives_the_disk(tape: Tape, tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_text(text(tape))
    assert read(path) == tape


def test_a_seed_is_a_tape() -> None:
    assert seeded(7)(COMPOSERS, 240) == seeded(7)(COMPOSERS, 240) != seeded(8)(COMPOSERS, 240)


def test_the_standard_tape_is_what_it_says() -> None:
    faults = standard(COMPOSERS, 240)
    assert sum(fault.fault == "kill" for fault in faults) == 3
    [partition] = [fault for fault in faults if fault.fault == "partition"]
    assert (len(partition.peers), partition.seconds) == (2, 60.0)
    gone = {p for f in faults if f.fault == "kill" and f.at < partition.at <= f.at + f.seconds for p in f.peers}
    assert not gone & set(partition.peers)


def test_what_a_tape_leaves_of_the_time_to_train() -> None:
    faults = (
        Fault(at=0, fault="straggler", peers=("a",), value=0.25),
        Fault(at=10, fault="kill", peers=("a", "b"), seconds=20),
        Fault(at=20, fault="stop", peers=("b",), seconds=20),
        Fault(at=90, fault="kill", peers=("c",)),
        Fault(at=0, fault="partition", peers=("d",)),
    )
    assert left((), "abcd", 100.0) == 1.0
    assert left(faults, "abcd", 100.0) == pytest.approx((20 + 70 + 90 + 100) / 400)


@pytest.mark.parametrize(
    "line",
    [
        '{"at": 1, "fault": "flood", "peers": ["c0"]}',
        '{"at": 1, "fault": "kill", "peers": []}',
        '{"at": -1, "fault": "kill", "peers": ["c0"]}',
        '{"at": 1, "fault": "kill", "peers": ["c0"], "value": 2}',
        '{"at": 0, "fault": "straggler", "peers": ["c0"], "value": 1.5}',
        '{"at": 1, "fault": "clock", "peers": ["c0"], "value": 0}',
        '{"at": 1, "fault": "rate", "peers": ["c0"], "value": -2}',
        '{"at": 3, "fault": "nan", "peers": ["c0"]}',
        '{"at": 3, "fault": "kill", "peers": ["c0"], "who": "c1"}',
    ],
)
def test_what_cannot_be_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read(path)
