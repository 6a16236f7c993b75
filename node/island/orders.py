"""What a leader tells its members, and what they answer: pickled, between processes of one user on one machine."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.bases import Bases
from ...kernels.experts import OwnedExpert
from ..learning.expert_mode import ExpertMode
from ..model.stages import Weighing
from ..run.manifest import Manifest
from .rows import Wanted

Form = Literal["data", "learners", "pipeline"]
COME = "come"  # a member's first message: its model is built


@dataclass(frozen=True)
class Setup:
    """The first message."""

    manifest: Manifest
    mode: ExpertMode
    form: Form
    rank: int
    size: int
    port: int  # of the leader's store, on loopback
    device: str
    threads: int
    timeout_seconds: float  # of one exchange of tensors
    bases: Bases  # of shared stand-ins


@dataclass(frozen=True)
class Slot:
    """What a slot is from this step on, by layer, on the CPU: experts if it is owned, else stand-ins."""

    standins: tuple[bytes, ...]  # of an owned slot too: what it was before
    experts: tuple[OwnedExpert, ...] | None = None

    def part(self, layers: range) -> Slot:
        """Only some layers of it."""
        experts = None if self.experts is None else tuple(self.experts[layer] for layer in layers)
        return Slot(tuple(self.standins[layer] for layer in layers), experts)


@dataclass(frozen=True)
class Step:
    """One inner step, of which every process computes a batch."""

    batch: Tensor  # (B, S) int64
    swarm_counts: Tensor | None
    rows: Wanted  # of experts that others own
    slots: dict[int, Slot] = field(default_factory=dict)  # those that have changed


@dataclass(frozen=True)
class StageStep:
    """One inner step, of which every process computes a stage."""

    batch: Tensor  # (B, S) int64
    weighing: Weighing
    rows: Wanted  # of experts that others own
    observing: bool  # whether rows of owned experts are wanted too
    slots: dict[int, Slot] = field(default_factory=dict)  # this stage's layers of those that have changed


def limit(pipe: Connection, seconds: float) -> None:
    """From now on this end waits so long at most for the other one to take or send a piece of a message."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:  # what is set is the open socket's, not the number's
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def send(pipe: Connection, message: object) -> None:
    """OSError if the other end is gone, TimeoutError if it does not take the message within the limit."""
    try:
        pipe.send_bytes(pickle.dumps(message, protocol=5))
    except BlockingIOError as error:
        raise TimeoutError("a process of the island takes no message") from error


def receive(pipe: Connection) -> Any:
    """EOFError or OSError if the other end is gone, TimeoutError if it does not end its message within the limit."""
    try:
        return pickle.loads(pipe.recv_bytes())
    except BlockingIOError as error:
        raise TimeoutError("a process of the island does not end its message") from error


def packed_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Flat: gradients, zeros where there are none; then for each whether there is one; then the loss."""
    device = loss.device
    pieces = [p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel(), device=device) for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    return torch.cat((*pieces, there, loss.detach().reshape(1)))


def unpack_gradients(parameters: Sequence[nn.Parameter], packed: Tensor) -> Tensor:
    """Add gradients from a sum of packed ones to those that are set: none where nobody had one. Returns the sum of
    losses."""
    there = packed[-1 - len(parameters) : -1].tolist()
    start = 0
    for parameter, count in zip(parameters, there, strict=True):
        piece = packed[start : start + parameter.numel()].view_as(parameter)
        if count:
            parameter.grad = piece.clone() if parameter.grad is None else parameter.grad + piece
        start += parameter.numel()
    return packed[-1]
