"""How commands end: real ones are told to stop in the middle of their work, and read no further."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState
from shoal.protocol.identity import Identity

SHOAL = [sys.executable, "-m", "shoal.node.cli"]


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Somebody who takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        yield silent


@pytest.mark.parametrize(
    ("command", "stop"),
    [("export", signal.SIGTERM), ("doctor", signal.SIGTERM), ("export", signal.SIGINT), ("doctor", signal.SIGHUP)],
)
def test_what_is_half_done_is_removed(
    command: str, stop: signal.Signals, silent: socket.socket, tmp_path: Path
) -> None:
    work = tmp_path / ("long" * 20)  # too long for the path of a socket, as temporary folders of clusters can be
    work.mkdir()
    port = silent.getsockname()[1]
    invite = f"shoal://{Identity.generate().peer_id}@127.0.0.1:{port}/demo-0123456789ab?v=1"
    arguments = {"export": ["export", invite, str(work / "model")], "doctor": ["doctor", invite, "--host", "127.0.0.1"]}
    environment = os.environ | {"TMPDIR": str(work), "SHOAL_HOME": str(tmp_path / "home")}
    made = {"export": "model.*.partial", "doctor": "shoal-doctor-*/identity.key"}[command]
    with (
        # Tests that a shell runs in the background ignore Ctrl-C, and what they start inherits that.
        subprocess.Popen(
            ["env", "--default-signal", *SHOAL, *arguments[command]], env=environment, stderr=subprocess.DEVNULL
        ) as process,
        ExitStack() as connections,
    ):
        # It reaches for the run by then. A library that is being imported may take a signal for an error of its own.
        while not any(work.glob(made)):
            connections.enter_context(silent.accept()[0])
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(stop)
        if stop == signal.SIGTERM:
            process.send_signal(stop)  # `timeout` sends two
        code = process.wait(60)
    assert code == 128 + stop
    assert not any(work.glob(made))
    assert not any(work.glob("model*"))


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", [["--help"], ["join", "--help"], ["version"], ["status"], ["status", "--json"]])
def test_a_reader_that_goes_ends_a_command_quietly(command: list[str], buffered: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # `head` has what it wanted
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with StatusServer(PeerState("composer")) as server:
        asked = [*command, server.url] if command[0] == "status" else command
        done = subprocess.run(
            [sys.executable, *([] if buffered else ["-u"]), *SHOAL[1:], *asked],
            stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False,
        )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_peer_is_not_ended_by_a_broken_pipe_without_a_word(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom shoal.node.ending import as_a_peer, ended\n"
        "def live():\n    raise BrokenPipeError(32, 'gone')\n"
        "sys.exit(ended(lambda: as_a_peer(live)))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "shoal: gone\n")
