"""A member's process, once it is there (`nursery.py`): it obeys until its leader closes the pipe."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from .forms import replica_of
from .meeting import meet
from .orders import COME, Setup, receive, send


def serve(pipe: Connection) -> None:
    """Serve the leader at the other end."""
    setup: Setup = receive(pipe)
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    replica = replica_of(setup)
    send(pipe, COME)
    meet(setup.rank, setup.size, setup.port, device, setup.timeout_seconds)
    try:
        while True:
            replica.step(receive(pipe), answer=lambda message: send(pipe, message))
    except (EOFError, OSError, RuntimeError):
        return  # the leader has ended, or has given this island up
