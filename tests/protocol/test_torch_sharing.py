"""A command that is told to stop while torch starts to share memory ends; torch alone would spin for ever."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

SCRIPT = """
import signal, sys, time
def end(number, frame): raise SystemExit(number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
import torch
from shoal.protocol.torch_sharing import start_sharing
torch.multiprocessing.set_sharing_strategy("file_system")  # as hivemind does
print("ready", flush=True)
start_sharing() if sys.argv[1] == "guarded" else torch.zeros(1).share_memory_()
time.sleep(30)
"""


def told_to_stop(how: str, number: signal.Signals) -> int | None:
    """Its exit code; None where it went on for 5 s."""
    command = [sys.executable, "-P", "-c", SCRIPT, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        server = None
        while server is None:
            server = next(iter(psutil.Process(process.pid).children()), None)
        server.suspend()  # torch waits for it now, mostly
        process.send_signal(number)
        time.sleep(0.05)
        with suppress(psutil.NoSuchProcess):
            server.resume()
        try:
            return process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends(number: signal.Signals) -> None:
    assert told_to_stop("guarded", number) == number


def test_torch_alone_does_not() -> None:
    assert None in (told_to_stop("alone", signal.SIGHUP) for _ in range(3))
