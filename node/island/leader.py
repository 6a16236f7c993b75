"""The leader's side of an island: it starts members, tells them what changes, and outlives them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.experts import OwnedExpert
from ...kernels.standin import StandIn
from ..logs import get_logger
from .meeting import listen, meet
from .nursery import Nursery, nursery
from .orders import Form, Setup, Slot, limit, receive, send

if TYPE_CHECKING:
    from ..learning.composer import Composer, Computed, StepReport

log = get_logger(__name__)

TIMEOUT_SECONDS = 300.0  # of one exchange of tensors: the slowest member's forward and backward are in it
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 10.0, 600.0  # before lost members are started anew
END_SECONDS = 5.0
BROKEN = (EOFError, OSError, RuntimeError)  # what a member's death looks like from here


@dataclass
class Member:
    """One of the other processes."""

    process: psutil.Process
    pipe: Connection


class Island(ABC):
    """Members of one composer. All of it belongs to the training thread, which must be the process's main one.

    Args:
        size: processes, the leader's counted.
        devices: by rank; the leader's is the composer's.
        threads: cores for each.
    """

    form: ClassVar[Form]
    patience = 1  # steps that a member may take until it answers

    def __init__(
        self, size: int, devices: Sequence[str], threads: int, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        if size < 2 or len(devices) != size:
            raise ValueError(f"an island of {size} on {len(devices)} devices")
        self.size = size
        self.threads = threads
        self.members: list[Member] = []
        self._devices, self._timeout_seconds = list(devices), timeout_seconds
        self._owned: dict[int, list[OwnedExpert]] = {}  # as the members know them
        self._standins: dict[int, list[bytes]] = {}  # digests
        self._pause, self._not_before = FIRST_PAUSE_SECONDS, 0.0

    def serve(self, composer: Composer) -> None:
        """Compute for this composer from now on. Raises ConfigError where its model cannot be computed in this form."""
        composer.island, composer.processes = self, self.size

    @property
    def together(self) -> bool:
        """Whether there are members now."""
        return bool(self.members)

    def train_step(self, composer: Composer) -> StepReport:
        """What one step of the composer's is: one inner step."""
        return composer.inner_step()

    def compute(self, composer: Composer) -> Computed | None:
        """One inner step's forward and backward by all: gradients are set, rows are collected.

        None if there is no island now, or it broke: the composer is then as if nothing had been computed.
        """
        try:
            if not self.form_with(composer):
                return None
            computed = self._compute(composer)
        except BROKEN as error:
            self.lose(error)
            for group in composer.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            return None
        self.worked()
        return computed

    @abstractmethod
    def _compute(self, composer: Composer) -> Computed:
        """The same, of an island that is whole. Any of `BROKEN`: it is no more."""

    def worked(self) -> None:
        """After a step that all have taken."""
        self._pause = FIRST_PAUSE_SECONDS

    def lose(self, error: BaseException) -> None:
        """End what is left of an island that broke; it is formed anew after a pause."""
        log.warning("island.lost", error=str(error).splitlines()[0] if str(error) else type(error).__name__)
        self.close()
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)

    def close(self) -> None:
        """End all members."""
        for member in self.members:
            member.pipe.close()
        processes = [member.process for member in self.members]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, END_SECONDS)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()
        self.members, self._owned, self._standins = [], {}, {}
        with suppress(RuntimeError, AssertionError, ValueError):  # what is broken cannot always be taken apart
            dist.destroy_process_group()

    def nursery(self) -> Nursery:
        """Where members come from. It takes seconds to be ready: ask early."""
        return nursery(gpus=any(torch.device(device).type == "cuda" for device in self._devices))

    def form_with(self, composer: Composer) -> bool:
        """Whether there are members; start them if it is time to."""
        if self.members:
            return True
        if time.monotonic() < self._not_before:
            return False
        with listen() as listener:
            port = listener.getsockname()[1]
            for rank in range(1, self.size):
                member = Member(*self.nursery().fork())
                self.members.append(member)
                limit(member.pipe, self._timeout_seconds)  # one that is stopped, and not ended, would be waited for
                setup = Setup(
                    composer.manifest, composer.mode, self.form, rank, self.size, port, self._devices[rank],
                    self.threads, self._timeout_seconds, composer.menu.bases,
                )  # fmt: skip
                self.tell(member, setup)
            for member in self.members:  # the meeting would not notice that one has ended, and wait for it
                self.hear(member)
            meet(0, self.size, port, composer.device, self._timeout_seconds, listener)
        log.info("island.formed", size=self.size, devices=self._devices)
        return True

    def tell(self, member: Member, order: object) -> None:
        """OSError if it is gone, or takes no orders."""
        if not member.process.is_running():
            raise ChildProcessError("a member has ended")
        send(member.pipe, order)

    def hear(self, member: Member) -> Any:
        """Its answer. EOFError or OSError if it is gone, or does not come."""
        if not member.pipe.poll(self._timeout_seconds * self.patience):
            raise TimeoutError("a member does not answer")
        return receive(member.pipe)

    def changed(self, composer: Composer) -> dict[int, Slot]:
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
                    changed[slot] = Slot(_as_bytes(standins), on_cpu)
                continue
            digests = [standin.digest() for standin in standins]
            if slot in self._owned or self._standins.get(slot) != digests:
                self._owned.pop(slot, None)
                self._standins[slot] = digests
                changed[slot] = Slot(_as_bytes(standins))
        return changed


def _as_bytes(standins: Sequence[StandIn]) -> tuple[bytes, ...]:
    return tuple(standin.to_bytes() for standin in standins)


def _on_cpu(expert: OwnedExpert) -> OwnedExpert:
    cpu = torch.device("cpu")
    trained: list[Tensor] = [tensor.detach().to(cpu) for tensor in expert.trained]
    return expert.to(cpu).with_trained(trained)
