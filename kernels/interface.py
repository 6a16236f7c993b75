"""What every kind of stand-in can do, for whoever holds a copy and for the owner who publishes it.

A delta is `mark (16 bytes) || payload`. The mark is a hash of the payload and of the digest that the state must have
*after* it: a delta that was damaged, or meant for another base, or that a machine computed to other bits, is an error
that leaves the state as it was, never a silent difference. So copies that accepted the same deltas are equal to the
bit.

State is a dict of tensors, replaced as a whole: a reader sees the old state or the new one. Deltas must not be
applied between the forward and the backward pass of a step, which both read the weights.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .codecs import tensor_bytes
from .experts import OwnedExpert, run_expert
from .replay import ReplayBuffer

MARK_BYTES = 16
MAX_STANDIN_BYTES = 1 << 30  # no expert that one peer could train comes near it
LARGEST_WEIGHT = 1e4  # trained weights stay below 100; what is larger would overflow half-precision activations
_PROBE_ROWS = 64


class StandIn(ABC):
    """A small approximation of one expert, equal to the bit wherever the same bytes were applied.

    Args:
        tensors: the state, by name; taken over, not copied.

    Raises:
        ValueError: names, shapes, dtypes or values are not those of this kind.
    """

    kind: ClassVar[str]

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._check(tensors)
        self._tensors = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
        self._digest: bytes | None = None

    @property
    @abstractmethod
    def hidden(self) -> int:
        """D."""

    @property
    @abstractmethod
    def width(self) -> int:
        """F of the dense weights."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """float32 gate_up (2F, D), the F gate rows first, and down (D, F), on the device of the state."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The state. Not to be written to."""
        return self._tensors

    @property
    def nbytes(self) -> int:
        """Memory of the state."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def to_bytes(self) -> bytes:
        """The exact state as safetensors."""
        return save({name: tensor.cpu() for name, tensor in self._tensors.items()})

    def digest(self) -> bytes:
        """First 16 bytes of sha256 over every tensor's name, dtype, shape and memory, in the order of names."""
        if self._digest is None:
            sha = hashlib.sha256()
            for name, tensor in self._tensors.items():
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(tensor_bytes(tensor))
            self._digest = sha.digest()[:16]
        return self._digest

    def apply(self, delta: bytes) -> None:
        """Moves to the next published state.

        Raises:
            ValueError: malformed, oversized, not finite, or not made for the present state, which is then unchanged.
        """
        if len(delta) < MARK_BYTES:
            raise ValueError(f"a delta of {len(delta)} bytes has no mark")
        payload = delta[MARK_BYTES:]
        advanced = self.with_state(self._advanced(payload))
        if _mark(advanced, payload) != delta[:MARK_BYTES]:
            raise ValueError("the delta is damaged, or made for another state than this one")
        self._become(advanced)

    def to(self, device: torch.device | str) -> Self:
        """The same stand-in with its state on another device."""
        return self.with_state({name: tensor.to(device) for name, tensor in self._tensors.items()})

    def delta(self, payload: bytes) -> bytes:
        """For the owner: makes `payload` a delta for the present state, and applies it here."""
        advanced = self.with_state(self._advanced(payload))
        self._become(advanced)
        return _mark(self, payload) + payload

    def with_state(self, tensors: Mapping[str, Tensor]) -> Self:
        """One of the same kind with another state, which is taken over. ValueError if it is not of this kind."""
        return type(self)(tensors)

    def _become(self, advanced: Self) -> None:
        device = next(iter(self._tensors.values())).device
        digest = advanced.digest()
        self._tensors = {name: tensor.to(device) for name, tensor in advanced._tensors.items()}
        self._digest = digest

    @classmethod
    @abstractmethod
    def _check(cls, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the tensors are a valid state."""

    @abstractmethod
    def _advanced(self, payload: bytes) -> dict[str, Tensor]:
        """The state after `payload`, on the CPU; ValueError if it cannot be one. Must not change the present state."""


class Publisher(ABC):
    """The owner's side of one expert's stand-in.

    Per step `observe`; every few steps `refit`, `delta` and `fidelity`, of a `successor` where that is to be beside
    training. All of it runs on the owner alone, so only what `delta` returns has to be the same everywhere.

    Attributes:
        published: the sum of what was sent; what every composer holds.
        replay: the latest rows that were routed to the expert.
    """

    published: StandIn
    replay: ReplayBuffer

    def observe(self, x_ND: Tensor, gate_N: Tensor) -> None:
        """Remembers rows that were routed to the expert."""
        self.replay.add(x_ND, gate_N)

    @abstractmethod
    def refit(self, expert: OwnedExpert) -> None:
        """Fits the next stand-in to the expert as it is now, where the kind has anything to fit."""

    @abstractmethod
    def delta(self, expert: OwnedExpert) -> bytes:
        """The change of `published` towards the expert, already applied to `published`.

        Raises:
            ValueError: the expert's weights are not finite; nothing is published.
        """

    @abstractmethod
    def fidelity(self, expert: OwnedExpert) -> float:
        """How well `published` does the expert's work, in [0, 1]; see `output_fidelity`."""

    @abstractmethod
    def successor(self, replay: ReplayBuffer) -> Self:
        """A publisher that goes on from here, to the bit, with these rows. What it does changes nothing here."""

    @abstractmethod
    def state_dict(self, *, replay: bool = True) -> dict[str, Tensor]:
        """Everything that decides the future of this publisher; without the replayed rows if `replay` is false."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where another publisher of the same kind and sizes was, to the bit.

        Raises:
            ValueError: the state does not fit or is not finite; this publisher is unchanged.
        """


def output_fidelity(expert: OwnedExpert, standin: StandIn, x_ND: Tensor, gate_N: Tensor, act: str) -> float:
    """1 - ||E(x) - S(x)|| / ||E(x)||, rows weighted by their gates; 0 if S is no better than nothing.

    Without rows, standard normal inputs stand for them: the number is then about weights, not about the data.
    """
    if not len(x_ND):
        x_ND = torch.randn(_PROBE_ROWS, standin.hidden, generator=torch.Generator().manual_seed(0))
        gate_N = torch.ones(_PROBE_ROWS)
    with torch.no_grad():
        wanted = gate_N.unsqueeze(1) * run_expert(x_ND, *float_weights(expert), act)
        gate_up, down = standin.dense()
        got = gate_N.unsqueeze(1) * run_expert(x_ND, gate_up.cpu(), down.cpu(), act)
        norm, error = float(wanted.norm()), float((wanted - got).norm())
    if not math.isfinite(norm) or not math.isfinite(error):
        return 0.0
    if norm == 0.0:
        return 1.0 if error == 0.0 else 0.0
    return max(0.0, 1.0 - error / norm)


def float_weights(expert: OwnedExpert) -> tuple[Tensor, Tensor]:
    """The expert's weights as detached float32 on the CPU, where stand-ins are made."""
    gate_up, down = expert.dense()
    return gate_up.detach().to("cpu", torch.float32), down.detach().to("cpu", torch.float32)


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Tensors out of safetensors bytes.

    Raises:
        ValueError: too large or malformed.
    """
    if len(data) > MAX_STANDIN_BYTES:
        raise ValueError(f"a stand-in of {len(data)} bytes is larger than {MAX_STANDIN_BYTES}")
    try:
        return load(data)
    # The reader meets dtypes that torch lacks with KeyError, and sizes that do not add up with RuntimeError.
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"not safetensors: {error}") from error


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor has this dtype and shape and, if floating, finite values of sane size."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
    # Written so that NaN fails it.
    if dtype.is_floating_point and not bool((tensor.abs() <= LARGEST_WEIGHT).all()):
        raise ValueError(f"{name} has values that are not finite or above {LARGEST_WEIGHT}")


def take(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a flat state whose names start with `prefix` and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `take`."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def _mark(after: StandIn, payload: bytes) -> bytes:
    return hashlib.sha256(after.digest() + payload).digest()[:MARK_BYTES]
