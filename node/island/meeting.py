"""How an island's processes find each other: a store on loopback, then gloo on CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def meet(rank: int, size: int, port: int, device: torch.device, timeout_seconds: float) -> None:
    """Become one of the island's processes. Blocks until all have come; RuntimeError if they do not."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timeout)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
