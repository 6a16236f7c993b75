"""Who runs on a data directory: real processes hold it, are killed, and are looked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from shoal.node.cli import main
from shoal.node.config import PeerConfig
from shoal.node.doctor.findings import Verdict
from shoal.node.doctor.machine import machine_checks
from shoal.node.errors import IdentityInUse, NoPeerHere, PeerDied
from shoal.node.storage.presence import announce_here, find_peer, hold_data_dir
from shoal.protocol.identity import Identity

URL = "http://127.0.0.1:1"
PEER = f"""
import sys, time
from pathlib import Path
from shoal.node.storage.presence import announce_here, hold_data_dir

with hold_data_dir(Path(sys.argv[1])), announce_here(Path(sys.argv[1]), "{URL}"):
    print("runs", flush=True)
    time.sleep(600)
"""
ASKER = """
import sys
from pathlib import Path
from shoal.node.errors import NoPeerHere
from shoal.node.storage.presence import find_peer

print("asks", flush=True)
while True:
    try:
        find_peer(Path(sys.argv[1]))
    except NoPeerHere:
        pass
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with start(PEER, tmp_path / "p") as process:
        yield process
        process.kill()


def say_pid(folder: Path, pid: int) -> None:
    (folder / "peer.json").write_text(json.dumps({"url": URL, "pid": pid}))


def test_one_peer_per_data_dir(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path / "p"):
        with pytest.raises(IdentityInUse), hold_data_dir(tmp_path / "p"):
            pass
        with announce_here(tmp_path / "p", URL):
            assert find_peer(tmp_path / "p") == URL
    with hold_data_dir(tmp_path / "p"):
        pass  # free again
    with pytest.raises(NoPeerHere, match="no peer runs"):
        find_peer(tmp_path / "p")


def test_a_peer_in_another_container_is_found(peer: subprocess.Popen[str], tmp_path: Path) -> None:
    """Its process id means nothing here."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    say_pid(tmp_path / "p", gone.pid)
    assert find_peer(tmp_path / "p") == URL


def test_a_killed_peer_has_died_before_anybody_has_waited_for_it(peer: subprocess.Popen[str], tmp_path: Path) -> None:
    assert find_peer(tmp_path / "p") == URL
    peer.kill()
    os.waitid(os.P_PID, peer.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which has its process id
    with pytest.raises(PeerDied, match=f"process {peer.pid}"):
        find_peer(tmp_path / "p")


def test_a_process_that_has_a_dead_peers_id_is_not_taken_for_it(
    peer: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.kill()
    peer.wait()
    say_pid(tmp_path / "p", os.getpid())
    assert main(["status", "--data-dir", str(tmp_path / "p")]) == 1
    told = capsys.readouterr().err
    assert "has died" in told
    assert "start it again" in told
    config = PeerConfig(data_dir=tmp_path / "p")
    Identity.load_or_create(config.identity_path)
    [found] = [each for each in machine_checks(config) if each.check == "data directory"]
    assert (found.verdict, "has died" in found.said) == (Verdict.WARN, True)


def test_what_was_copied_without_its_lock_runs_nowhere(tmp_path: Path) -> None:
    say_pid(tmp_path, os.getpid())
    with pytest.raises(PeerDied):
        find_peer(tmp_path)
    assert not (tmp_path / "lock").exists()
    (tmp_path / "peer.json").write_text("{")
    with pytest.raises(NoPeerHere, match="damaged"):
        find_peer(tmp_path)


def test_who_asks_keeps_no_peer_from_starting(tmp_path: Path) -> None:
    with hold_data_dir(tmp_path):
        pass
    say_pid(tmp_path, os.getpid())
    askers = [start(ASKER, tmp_path) for _ in range(2)]
    try:
        for _ in range(100):
            with hold_data_dir(tmp_path):
                assert find_peer(tmp_path) == URL
    finally:
        for asker in askers:
            asker.kill()
            asker.communicate()
