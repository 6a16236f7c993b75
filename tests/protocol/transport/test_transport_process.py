"""The life of the host process: what it may import, why it cannot start, when it must die."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from shoal.protocol.errors import PeerUnreachable, TransportError
from shoal.protocol.identity import Identity
from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.limits import Limits


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        await asyncio.sleep(0.01)


def test_a_silent_host_is_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with await Transport.start(
            identity_path=tmp_path / "key", run_id="run", limits=Limits(silence_seconds=1.5)
        ) as peer:
            os.kill(peer.host_pid or 0, signal.SIGSTOP)
            await until(lambda: peer.restarts == 1, "a restart")

    run(scenario())


def test_the_host_is_out_of_the_terminals_reach(tmp_path: Path) -> None:
    """Ctrl-C signals the whole process group, and slots are handed over through the host after that."""

    async def scenario() -> None:
        async with await Transport.start(identity_path=tmp_path / "key", run_id="run") as peer:
            assert os.getpgid(peer.host_pid or 0) != os.getpgid(0)

    run(scenario())


def test_a_host_that_cannot_listen_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with await Transport.start(identity_path=tmp_path / "key", run_id="run") as peer:
            port = int(peer.addrs[0].split("/")[4])
            with pytest.raises(TransportError, match=f"port {port} on 127.0.0.1 is taken") as caught:
                await Transport.start(identity_path=tmp_path / "other.key", run_id="run", listen_port=port)
            assert caught.value.fix

    run(scenario())


_TRAINER = """
import asyncio, os, signal, sys, time
from pathlib import Path
from shoal.protocol.transport.client import Transport

async def main():
    transport = await Transport.start(identity_path=Path(sys.argv[1]), run_id="run")
    if sys.argv[2] == "fork" and os.fork() == 0:  # as hivemind does: the child holds the IPC channel open
        time.sleep(30)
        os._exit(0)
    print(transport.host_pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["alone", "fork"])
def test_the_host_dies_with_a_killed_trainer(tmp_path: Path, kind: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _TRAINER, str(tmp_path / "key"), kind],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdout is not None
        host = int(trainer.stdout.readline())
        assert trainer.wait(20) == -signal.SIGKILL
        try:
            run(until(lambda: not _runs(host), "the host's end"))
        finally:
            if kind == "fork":
                os.killpg(trainer.pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_peer_that_is_not_there_is_said_once_by_whoever_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with await Transport.start(identity_path=tmp_path / "key", run_id="run") as peer:
            stranger = Identity.load_or_create(tmp_path / "stranger.key").peer_id
            for _ in range(3):
                with pytest.raises(PeerUnreachable):
                    await peer.call([f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}"], "x", b"", deadline_seconds=10)

    run(scenario())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_neither_side_imports_what_it_must_not() -> None:
    def modules(statement: str) -> set[str]:
        code = f"import sys; {statement}; print(*sys.modules)"
        return set(subprocess.check_output([sys.executable, "-P", "-c", code], text=True).split())

    assert not modules("import shoal.protocol.transport.client") & {"libp2p", "trio", "torch", "hivemind"}
    assert not modules("import shoal.protocol.transport.host") & {"torch", "hivemind", "transformers", "numpy"}
