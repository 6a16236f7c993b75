"""`./dev demo` watches its peers by HTTP; that the swarm itself works is for tests/swarm."""

import argparse
import io
import json
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console
from shoal.node import demo
from shoal.node.demo import Demo, DemoFailed, Peer, peer_environment
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import Count, Lease, PeerState, Phase


def test_peers_are_asked_directly_whatever_proxy_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    waits = [sys.executable, "-c", "input()"]
    with (
        StatusServer(PeerState("composer")) as server,
        subprocess.Popen(waits, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        (tmp_path / "peer.json").write_text(json.dumps({"url": server.url}))
        peer = Peer("composer-0", process, tmp_path, tmp_path / "log")
        peer.poll()
        assert peer.get("role") == "composer"


def test_a_peer_that_ends_amid_its_answer_keeps_its_last_status(tmp_path: Path) -> None:
    class Half(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b'{"role": ')

        def log_message(self, *_: object) -> None:
            pass

    waits = [sys.executable, "-c", "input()"]
    with (
        HTTPServer(("127.0.0.1", 0), Half) as server,
        subprocess.Popen(waits, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        (tmp_path / "peer.json").write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}))
        peer = Peer("composer-0", process, tmp_path, tmp_path / "log", status={"phase": "training"})
        peer.poll()
        thread.join()
        assert peer.get("phase") == "training"


def test_peers_do_not_take_the_settings_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HTTP_PORT", "8470"), ("CONFIG", "/peer.toml"), ("INVITE", "shoal://somewhere")):
        monkeypatch.setenv(f"SHOAL_{name}", value)
    told = peer_environment(3)
    assert not [name for name in told if name.startswith("SHOAL_")]
    assert told["OMP_NUM_THREADS"] == "3"
    assert "PATH" in told


def test_the_end_of_a_log_is_shown_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Demo) -> None:
        raise DemoFailed("its log:\nrows[a:b] of [/data/text]")

    monkeypatch.setattr(Demo, "run", fail)
    monkeypatch.setattr(sys, "argv", ["demo", "--dir", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is not the demo's
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 1
    assert "demo failed: its log:\nrows[a:b] of [/data/text]" in capsys.readouterr().out


def test_a_folder_in_which_something_is_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for wanted in (tmp_path, tmp_path / "file"):
        monkeypatch.setattr(sys, "argv", ["demo", "--dir", str(wanted)])
        with pytest.raises(SystemExit) as ended:
            demo.main()
        assert ended.value.code == 2
        assert "name a new one" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("role", ["composer", "worker", "bootstrap"])
def test_the_live_table_fits_a_terminal(role: str, tmp_path: Path) -> None:
    now = 0.0
    state = PeerState(role, clock=lambda: now, wall=lambda: now)
    state.identify(run_id="demo-0123456789ab", steps_total=3000, slots_total=16)
    state.enter(Phase.TRAINING)
    state.resume(step=2998)
    for number in range(374):
        state.record_round(outcome="committed", round=number, fragment=0, members=3, seconds=1.0)
    for step in range(2988, 3000):
        now += 1.0
        state.record_step(step=step, tokens=12_345, loss=2.3456, seconds={}, rows=12_345)
    state.set_slots(leases=[Lease(slot=slot, epoch=1, version=0) for slot in range(10)])
    state.set_fidelity({0: 0.9123})
    state.count(Count.BYTES, "sketches", "out", by=123_456_789)
    shown = io.StringIO()
    screen = Console(file=shown, width=80, force_terminal=True, color_system=None)
    watched = Demo(argparse.Namespace(), tmp_path, screen)
    process = cast("subprocess.Popen[bytes]", None)
    watched.peers = [Peer(f"{role}-0", process, tmp_path, tmp_path / "log", status=state.snapshot())]
    screen.print(watched.table())
    lines = shown.getvalue().splitlines()
    assert len(lines) == 3
    assert "\u2026" not in shown.getvalue(), "something is cut"
    for cell in (f"{role}-0 ", "2.346", "0.912", "123 MB"):
        assert cell in lines[2]
    for cell in (" 10/16 ", "2999/3000", " 12,345 "):
        assert (cell in lines[2]) == (role != "bootstrap")
    assert (" 374 (12s) " in lines[2]) == (role == "composer")
