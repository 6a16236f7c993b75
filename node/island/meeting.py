"""How an island's processes find each other: a store on loopback, then gloo on CPUs, NCCL between GPUs.

The store asks nobody who they are, and torch has it listen on all of the machine's addresses unless it is given a
socket.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist


def listen() -> socket.socket:
    """Where the leader's store will be, for this machine's processes alone."""
    return socket.create_server(("127.0.0.1", 0))


def meet(
    rank: int,
    size: int,
    port: int,
    device: torch.device,
    timeout_seconds: float,
    listener: socket.socket | None = None,
) -> None:
    """Become one of the island's processes. Blocks until all have come; RuntimeError if they do not.

    Args:
        listener: the leader's, from `listen`; the store's from now on. Others only know its port.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_seconds)
    taken = None if listener is None else listener.detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, size, is_master=taken is not None, timeout=timeout, master_listen_fd=taken
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
