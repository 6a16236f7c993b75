"""A member's process: `python -m shoal.node.island.member FD PARENT`. It obeys until its leader closes the pipe."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

import torch

from ...protocol.process_death import end_with_parent
from .forms import replica_of
from .meeting import meet
from .orders import Setup, receive, send


def main() -> None:
    """Serve the leader at the other end of the pipe."""
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the leader, which hands over first
    pipe = Connection(int(sys.argv[1]))
    setup: Setup = receive(pipe)
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    replica = replica_of(setup)
    meet(setup.rank, setup.size, setup.port, device, setup.timeout_seconds)
    try:
        while True:
            replica.step(receive(pipe), answer=lambda message: send(pipe, message))
    except (EOFError, OSError, RuntimeError):
        return  # the leader has ended, or has given this island up


if __name__ == "__main__":
    main()
