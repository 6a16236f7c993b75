"""A member's process: `python -m shoal.node.island.member FD PARENT`. It obeys until its leader closes the pipe."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from ...protocol.process_death import end_with_parent
from ..model.build import MoEModel, build_model
from .orders import Setup, Slot, Step, packed_gradients, receive, send, trained_of, weights_of
from .rows import Encoded, Raw, StepRows


def join(rank: int, size: int, port: int, device: torch.device, timeout_seconds: float) -> None:
    """Become one of the island's processes. Blocks until all have come; RuntimeError if they do not."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timeout)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def sum_counts(counts_LE: Tensor) -> Tensor:
    """Routed pairs of all of the island, for the balance of experts."""
    total = counts_LE.clone()
    dist.all_reduce(total)
    return total


class Member:
    """Forward and backward of a model that somebody else trains."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._device = setup, torch.device(setup.device)
        manifest = setup.manifest
        self._train = manifest.train
        self._model: MoEModel = build_model(manifest.model, owned=(), standin=manifest.standin, expert=setup.mode)
        self._model.place(self._device)
        self._owned: set[int] = set()
        self._rows = StepRows(manifest, setup.rank)

    def step(self, order: Step) -> Raw | Encoded:
        """Take part in one step of the leader's. Returns the rows that were asked for."""
        for slot, now in order.slots.items():
            self._change(slot, now)
        owned = sorted(self._owned)
        weights = weights_of(self._model, owned)
        flat = torch.empty(sum(w.numel() for w in weights), device=self._device)
        dist.broadcast(flat, 0)
        with torch.no_grad():
            for tensor, piece in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
                tensor.copy_(piece.view_as(tensor))
        self._model.set_sketch_tap(self._rows.tap(order.rows, order.batch.numel() * self._setup.size))
        losses = self._model.loss(
            order.batch.to(self._device),
            swarm_counts=order.swarm_counts,
            balance_coef=self._train.balance_coef,
            z_coef=self._train.z_coef,
            sum_counts=sum_counts,
        )
        torch.autograd.backward(losses.total / self._setup.size)
        parameters = trained_of(self._model, owned)
        dist.reduce(packed_gradients(parameters, losses.lm / self._setup.size), 0)
        for parameter in parameters:
            parameter.grad = None
        return self._rows.take()

    def _change(self, slot: int, now: Slot) -> None:
        for shard in self._model.shards:
            if slot in self._owned:
                shard.release(slot, now.standins[shard.layer])
            if now.experts is None:
                shard.set_standin(slot, now.standins[shard.layer])
            else:
                shard.hold(slot, now.experts[shard.layer])
        self._owned.discard(slot)
        if now.experts is not None:
            self._owned.add(slot)


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
    member = Member(setup)
    join(setup.rank, setup.size, setup.port, device, setup.timeout_seconds)
    try:
        while True:
            order: Step = receive(pipe)
            rows = member.step(order)
            if order.rows != "no":
                send(pipe, rows)
    except (EOFError, OSError, RuntimeError):
        return  # the leader has ended, or has given this island up


if __name__ == "__main__":
    main()
