"""Tensors as bytes: safetensors in, safetensors out, everything from a peer checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...protocol.errors import Refused


def to_bytes(tensors: Mapping[str, Tensor], facts: dict[str, str] | None = None) -> bytes:
    """Serialise named tensors, with `facts` about them in the header."""
    return save({name: value.contiguous() for name, value in tensors.items()}, facts)


def from_bytes(data: bytes, *, what: str) -> dict[str, Tensor]:
    """Parse what a peer sent.

    Raises:
        Refused: not safetensors, or a floating-point tensor with a value that is not finite.
    """
    try:
        tensors = load(data)
        spoilt = [name for name, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]
    # torch lacks some dtypes that the format has (KeyError), and operations on some that it has (RuntimeError).
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Refused("malformed", f"{what} is not a safetensors blob: {error}") from error
    if spoilt:
        raise Refused("not-finite", f"{what} holds NaN or infinity in {spoilt[0]!r}")
    return tensors


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def fragment_to_bytes(fragment: Tensor, momentum: Tensor) -> bytes:
    """The common state of one backbone fragment."""
    return to_bytes({"fragment": fragment, "momentum": momentum})


def fragment_from_bytes(data: bytes, numel: int) -> tuple[Tensor, Tensor]:
    """(fragment, momentum), both flat float32 of `numel` values, or `Refused`."""
    tensors = from_bytes(data, what="backbone fragment")
    for name in ("fragment", "momentum"):
        value = tensors.get(name)
        if value is None or value.dtype != torch.float32 or value.shape != (numel,):
            raise Refused("misshapen", f"backbone fragment: {name} is not {numel} float32 values")
    return tensors["fragment"], tensors["momentum"]
