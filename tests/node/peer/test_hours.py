"""Hours of the day: when they are open, and a peer that lives by them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.node.peer.hours import Hours
from shoal.node.peer.way_in import free_port
from shoal.node.storage.last_ports import keep_ports
from shoal.node.storage.presence import find_peer
from shoal.node.watching.status import fetch_status

minutes = st.integers(0, 24 * 60 - 1)


@pytest.mark.parametrize(
    ("text", "open_at", "closed_at"),
    [
        ("09:00-17:30", ["09:00", "12:00", "17:29"], ["08:59", "17:30", "00:00"]),
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "21:59", "12:00"]),
    ],
)
def test_the_first_minute_is_in_and_the_last_is_not(text: str, open_at: list[str], closed_at: list[str]) -> None:
    hours = Hours.parse(text)
    assert all(hours.now_open(datetime.fromisoformat(f"2026-11-27T{at}")) for at in open_at)
    assert not any(hours.now_open(datetime.fromisoformat(f"2026-11-27T{at}")) for at in closed_at)


@given(begin=minutes, length=st.integers(1, 24 * 60 - 1), at=minutes)
def test_open_as_long_as_they_say_and_next_when_they_begin(begin: int, length: int, at: int) -> None:
    hours = Hours(begin, (begin + length) % (24 * 60))
    day = datetime.fromisoformat("2026-11-27")
    opened = [hours.now_open(day + timedelta(minutes=minute)) for minute in range(24 * 60)]
    assert sum(opened) == length
    now = day + timedelta(minutes=at, seconds=30)
    opens = hours.opens(now)
    assert now < opens <= now + timedelta(days=1)
    assert hours.now_open(opens)
    assert not hours.now_open(opens - timedelta(minutes=1))


# A peer that only says what happens to it, under the real parent and a clock that the test sets.
SCRIPT = """
    import os, signal, sys, time
    from datetime import datetime
    from pathlib import Path
    from shoal.node.config import PeerConfig
    from shoal.node.peer.hours import Hours
    from shoal.node.peer.reviving import StartOver
    from shoal.protocol.errors import AveragerEnded
    from shoal.node.peer.resting import ByHours

    folder = Path(sys.argv[1])
    told = []

    def note(what):
        with (folder / "notes").open("a") as file:
            file.write(what + "\\n")

    def forked():
        if (folder / "slow").exists():
            note("forked")
            time.sleep(1.0)

    os.register_at_fork(after_in_child=forked)

    def live():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: told.append(1))
        note("began")
        while not told:
            time.sleep(0.05)
            if (folder / "fail").exists():
                raise RuntimeError("broken")
            if (folder / "lose").exists():
                (folder / "lose").unlink()
                raise StartOver(AveragerEnded("the averager is gone"))
        if (folder / "joining").exists():
            raise SystemExit(128 + signal.SIGTERM)
        note("drained")
        return 0

    def clock():
        return datetime.fromisoformat("2026-11-27T" + (folder / "clock").read_text())

    sys.exit(ByHours(PeerConfig(data_dir=folder / "peer"), Hours.parse("22:00-07:00"), live, clock).run())
"""


class Living:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.set("12:00")
        with (folder / "said").open("w") as said:
            command = [sys.executable, "-P", "-c", textwrap.dedent(SCRIPT), str(folder)]
            self.process = subprocess.Popen(command, stderr=said)

    def set(self, clock: str) -> None:
        temporary = self.folder / "clock.tmp"
        temporary.write_text(clock)
        temporary.replace(self.folder / "clock")

    def notes(self) -> list[str]:
        path = self.folder / "notes"
        return path.read_text().split() if path.exists() else []

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.notes()
            assert self.process.poll() is None
            time.sleep(0.05)

    def resting(self) -> bool:
        try:
            return bool(fetch_status(find_peer(self.folder / "peer"))["phase"] == "resting")
        except Exception:  # noqa: BLE001 - it is not there yet
            return False


@pytest.fixture
def living(tmp_path: Path):
    living = Living(tmp_path)
    yield living
    living.process.kill()
    living.process.wait()


def test_it_rests_serves_drains_and_serves_again(living: Living) -> None:
    living.until(living.resting)
    assert living.notes() == []
    living.set("22:00")
    living.until(lambda: living.notes() == ["began"])
    living.set("07:00")
    living.until(lambda: living.notes() == ["began", "drained"])
    living.until(living.resting)
    living.set("23:00")
    living.until(lambda: living.notes() == ["began", "drained", "began"])
    living.process.send_signal(random.choice([signal.SIGINT, signal.SIGHUP]))  # Ctrl-C, or its terminal is closed
    assert living.process.wait(20) == 0
    assert living.notes() == ["began", "drained", "began", "drained"]


def test_a_signal_that_comes_while_it_forks_is_not_lost(living: Living) -> None:
    (living.folder / "slow").touch()
    living.until(living.resting)
    living.set("22:00")
    living.until(lambda: living.notes() == ["forked"])
    living.process.send_signal(signal.SIGTERM)
    assert living.process.wait(20) == 128 + signal.SIGTERM
    assert living.notes() == ["forked"]


def test_it_rests_too_when_the_hours_end_before_it_has_joined(living: Living) -> None:
    (living.folder / "joining").touch()
    living.set("22:00")
    living.until(lambda: living.notes() == ["began"])
    living.set("07:00")
    living.until(living.resting)
    living.set("23:00")
    living.until(lambda: living.notes() == ["began", "began"])
    living.process.send_signal(signal.SIGTERM)
    assert living.process.wait(20) == 128 + signal.SIGTERM


def test_it_can_be_stopped_while_it_rests(living: Living) -> None:
    living.until(living.resting)
    living.process.send_signal(signal.SIGTERM)
    assert living.process.wait(20) == 0
    assert living.notes() == []


def test_it_rests_at_the_port_of_last_time(tmp_path: Path) -> None:
    def rest() -> str:
        living = Living(tmp_path)
        try:
            living.until(living.resting)
            return find_peer(tmp_path / "peer")
        finally:
            living.process.terminate()
            living.process.wait(20)

    assert rest() == rest()
    ports = {"dht_port": 4001, "transport_port": 4002, "http_port": free_port("127.0.0.1")}
    keep_ports(tmp_path / "peer", **ports)  # as the peer does in its hours
    assert rest() == f"http://127.0.0.1:{ports['http_port']}"
    assert json.loads((tmp_path / "peer" / "ports.json").read_text()) == ports


def test_a_peer_that_fails_ends_it(living: Living) -> None:
    living.set("22:00")
    living.until(lambda: living.notes() == ["began"])
    (living.folder / "fail").touch()
    assert living.process.wait(20) == 1
    assert "RuntimeError: broken" in (living.folder / "said").read_text()


def test_a_peer_that_lost_a_helper_process_is_started_again(living: Living) -> None:
    living.set("22:00")
    for times in range(1, 4):
        living.until(lambda times=times: living.notes() == ["began"] * times)
        (living.folder / "lose").touch()
    living.until(lambda: living.notes() == ["began"] * 4)
    (living.folder / "lose").touch()  # too often
    assert living.process.wait(20) == 1
    assert (living.folder / "said").read_text().count("shoal: the averager is gone") == 4


def test_the_peer_does_not_outlive_the_parent(living: Living) -> None:
    living.set("22:00")
    living.until(lambda: living.notes() == ["began"])
    [child] = Path(f"/proc/{living.process.pid}/task/{living.process.pid}/children").read_text().split()
    living.process.kill()
    living.process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(int(child), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def open_now() -> str:
    now = datetime.now()  # noqa: DTZ005 - hours are of the local day
    return f"{now - timedelta(hours=6):%H:%M}-{now + timedelta(hours=6):%H:%M}"


@pytest.mark.parametrize("hours", [[], ["--hours", open_now()]], ids=["always", "by hours"])
def test_an_error_of_the_system_is_one_line(hours: list[str], tmp_path: Path) -> None:
    (tmp_path / "peer.tmp").mkdir()  # where the peer writes
    command = ["join", "shoal://e/r-0123456789ab?v=1", "--host", "127.0.0.1", "--data-dir", str(tmp_path), *hours]
    done = subprocess.run(
        [sys.executable, "-m", "shoal.node.cli", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.splitlines() == [f"shoal: Is a directory: {tmp_path / 'peer.tmp'}"]
    assert done.returncode == 1
