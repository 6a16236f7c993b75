"""The leader's side of an island: it starts members, tells them what changes, and takes in what they compute."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.experts import OwnedExpert
from ..capacity import device_of
from ..config import PeerConfig
from ..logs import get_logger
from ..way_in import free_port
from .member import join, sum_counts
from .orders import (
    Setup,
    Slot,
    Step,
    packed_gradients,
    receive,
    send,
    trained_of,
    unpack_gradients,
    weights_of,
)
from .rows import StepRows, give, wanted_by

if TYPE_CHECKING:
    from ..composer import Composer, Computed

log = get_logger(__name__)

TIMEOUT_SECONDS = 300.0  # of one exchange of tensors: the slowest member's forward and backward are in it
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0  # before lost members are started anew
END_SECONDS = 5.0


@dataclass
class _Member:
    process: subprocess.Popen[bytes]
    pipe: Connection


def island_of(config: PeerConfig, device: torch.device) -> Island:
    """The island that a peer's settings ask for; each process has a GPU of its own, or its part of the cores.

    Raises ConfigError if there are fewer GPUs.
    """
    size, first = config.island, device.index or 0
    devices = [str(device)] * size
    if device.type == "cuda":
        devices = [f"cuda:{index}" for index in range(first, first + size)]
        device_of(devices[-1])
    cores = config.threads or len(os.sched_getaffinity(0))
    return Island(size, devices, max(1, cores // size))


class Island:
    """Members of one composer. All of it belongs to the training thread, which must be the process's main one.

    Args:
        size: processes, the leader's counted.
        devices: by rank; the leader's is the composer's.
        threads: cores for each.
    """

    def __init__(
        self, size: int, devices: Sequence[str], threads: int, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        if size < 2 or len(devices) != size:
            raise ValueError(f"an island of {size} on {len(devices)} devices")
        self.size = size
        self.threads = threads
        self._devices, self._timeout_seconds = list(devices), timeout_seconds
        self._members: list[_Member] = []
        self._owned: dict[int, list[OwnedExpert]] = {}  # as the members know them
        self._standins: dict[int, list[bytes]] = {}  # digests
        self._rows: StepRows | None = None
        self._pause, self._not_before = FIRST_PAUSE_SECONDS, 0.0

    @property
    def together(self) -> bool:
        """Whether there are members now."""
        return bool(self._members)

    def compute(self, composer: Composer) -> Computed | None:
        """One step's forward and backward by all: gradients are set, rows are collected.

        None if there is no island now, or it broke: the composer is then as if nothing had been computed.
        """
        try:
            if not self._members and not self._form(composer):
                return None
            return self._compute(composer)
        except (EOFError, OSError, RuntimeError) as error:
            log.warning("island.lost", error=str(error).splitlines()[0] if str(error) else type(error).__name__)
            self.close()
            self._not_before = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            for parameter in trained_of(composer.model, sorted(composer.owned)):
                parameter.grad = None
            return None

    def close(self) -> None:
        """End all members."""
        for member in self._members:
            member.pipe.close()
        for member in self._members:
            member.process.terminate()
        for member in self._members:
            try:
                member.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        self._members, self._owned, self._standins = [], {}, {}
        with suppress(RuntimeError, AssertionError, ValueError):  # what is broken cannot always be taken apart
            dist.destroy_process_group()

    def _form(self, composer: Composer) -> bool:
        if time.monotonic() < self._not_before:
            return False
        port = free_port("127.0.0.1")
        for rank in range(1, self.size):
            ours, theirs = Pipe()
            with theirs:
                command = [sys.executable, "-m", "shoal.node.island.member", str(theirs.fileno()), str(os.getpid())]
                process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], env=os.environ | {"OMP_NUM_THREADS": str(self.threads)}
                )
            self._members.append(_Member(process, ours))
            send(ours, Setup(composer.manifest, composer.mode, rank, self.size, port, self._devices[rank],
                             self.threads, self._timeout_seconds))  # fmt: skip
        join(0, self.size, port, composer.device, self._timeout_seconds)
        log.info("island.formed", size=self.size, devices=self._devices)
        return True

    def _compute(self, composer: Composer) -> Computed:
        from ..composer import Computed

        model, owned = composer.model, sorted(composer.owned)
        changed, collector = self._changed(composer), composer.collector
        wanted = wanted_by(collector)
        batches = [composer.next_batch() for _ in range(self.size)]
        for member, batch in zip(self._members, batches[1:], strict=True):
            if member.process.poll() is not None:
                raise ChildProcessError(f"a member has ended with exit code {member.process.returncode}")
            send(member.pipe, Step(batch, composer.swarm_counts, wanted, changed))
        with torch.no_grad():
            dist.broadcast(torch.cat([weights.reshape(-1) for weights in weights_of(model, owned)]), 0)
        tokens = sum(batch.numel() for batch in batches)
        rows = self._rows = self._rows or StepRows(composer.manifest, 0)
        model.set_sketch_tap(rows.tap(wanted, tokens))
        losses = composer.losses(batches[0].to(composer.device), sum_counts=sum_counts)
        torch.autograd.backward(losses.total / self.size)
        parameters = trained_of(model, owned)
        summed = packed_gradients(parameters, losses.lm / self.size)
        dist.reduce(summed, 0)
        loss = unpack_gradients(parameters, summed)
        if collector is not None:
            parts = [rows.take(), *(receive(member.pipe) for member in self._members)]
            give(collector, parts, tokens, composer.device)  # nothing can fail from here on
        self._pause = FIRST_PAUSE_SECONDS
        return Computed(loss.item(), tokens, losses.counts.cpu(), self.size)

    def _changed(self, composer: Composer) -> dict[int, Slot]:
        """What members do not know yet, and know from now on."""
        changed = {}
        for slot in range(composer.num_slots):
            standins = composer.standins(slot)
            if slot in composer.owned:
                experts = composer.experts_of(slot)
                known = self._owned.get(slot)
                if known is None or any(a is not b for a, b in zip(known, experts, strict=True)):
                    self._owned[slot] = experts
                    self._standins.pop(slot, None)
                    on_cpu = tuple(_on_cpu(expert) for expert in experts)
                    changed[slot] = Slot(tuple(standins), on_cpu)
                continue
            digests = [standin.digest() for standin in standins]
            if slot in self._owned or self._standins.get(slot) != digests:
                self._owned.pop(slot, None)
                self._standins[slot] = digests
                changed[slot] = Slot(tuple(standins))
        return changed


def _on_cpu(expert: OwnedExpert) -> OwnedExpert:
    cpu = torch.device("cpu")
    trained: list[Tensor] = [tensor.detach().to(cpu) for tensor in expert.trained]
    return expert.to(cpu).with_trained(trained)
