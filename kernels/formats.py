"""One expert's weights on the wire, in the format that a run chooses: what newcomers and standbys download.

A byte that names the format, then gate_up and down, little-endian. Bytes a weight, for an expert of width F on D:

    float32   4
    bfloat16  2
    int8      1 + s          a bfloat16 scale per row (codecs.py); s = 2 (2F + D) / 3FD: 0.0015 for D 2048, F 768
    nf4       0.5625         4 bits, and a float32 maximum per 64 weights: the layout of bitsandbytes (lowbit.py)
    ternary   0.2 + s        five weights to a byte (ternary.py)

Only float32 is exact, and ternary, in what the expert computes, where it is trained ternary. No digest: whoever names
the resource knows the digest of the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .codecs import Int8Rows, quantise_rows, tensor_bytes
from .interface import check_tensor
from .lowbit import BLOCK, LowbitStandIn, nf4_blocks
from .ternary import Ternary, masters_from, ternarise, ternary_nbytes

FORMATS = ("float32", "bfloat16", "int8", "nf4", "ternary")  # the first byte is the place in this list: append only
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def encode_expert(gate_up: Tensor, down: Tensor, fmt: str) -> bytes:
    """An expert's weights; its masters, where it is trained ternary.

    Args:
        gate_up: (2F, D), the F gate rows first.
        down: (D, F).
        fmt: one of `FORMATS`.

    Raises:
        ValueError: unknown format, shapes that are none of an expert, or weights that are not finite or far too large.
    """
    tag = bytes([_index(fmt)])
    if gate_up.dim() != 2 or down.dim() != 2 or gate_up.shape != (2 * down.shape[1], down.shape[0]):
        raise ValueError(f"{tuple(gate_up.shape)} and {tuple(down.shape)} are not the weights of an expert")
    matrices = [w.detach().to("cpu", torch.float32) for w in (gate_up, down)]
    for matrix in matrices:
        check_tensor("an expert's weight", matrix, torch.float32, tuple(matrix.shape))
    if fmt == "nf4":
        state = LowbitStandIn.of(*matrices).tensors
        return tag + tensor_bytes(state["codes"]) + tensor_bytes(state["absmax"])
    if fmt == "int8":
        return tag + b"".join(quantise_rows(matrix).to_bytes() for matrix in matrices)
    if fmt == "ternary":
        return tag + b"".join(ternarise(matrix).to_bytes() for matrix in matrices)
    return tag + b"".join(tensor_bytes(matrix.to(_DTYPES[fmt])) for matrix in matrices)


def decode_expert(data: bytes, hidden: int, width: int, *, masters: bool = False) -> tuple[Tensor, Tensor]:
    """Reads what `encode_expert` wrote.

    Args:
        data: the bytes; they tell their format.
        hidden: D.
        width: F.
        masters: for a `TernaryExpert`: of the ternary format, masters with exactly the ternary form that was sent
            (`masters_from`) instead of that form itself, whose own ternary form would be smaller. Other formats are
            the same either way.

    Returns:
        float32 gate_up (2F, D) and down (D, F), on the CPU.

    Raises:
        ValueError: unknown format, wrong length, or values that no encoder writes.
    """
    fmt = format_of(data)
    if len(data) != encoded_nbytes(fmt, hidden, width):
        raise ValueError(f"{len(data)} bytes are not a {hidden} x {width} expert as {fmt}")
    if fmt == "nf4":
        raw = torch.frombuffer(bytearray(data[1:]), dtype=torch.uint8)
        blocks = nf4_blocks(hidden, width)
        codes, absmax = torch.split(raw, [blocks * BLOCK // 2, 4 * blocks])
        tensors = {"codes": codes, "absmax": absmax.clone().view(torch.float32), "size": torch.tensor([hidden, width])}
        decoded = LowbitStandIn(tensors).dense()
    else:
        cut = 1 + _matrix_nbytes(fmt, 2 * width, hidden)
        view = memoryview(data)
        decoded = (
            _matrix(fmt, view[1:cut], 2 * width, hidden, masters),
            _matrix(fmt, view[cut:], hidden, width, masters),
        )
    for matrix in decoded:
        check_tensor("a weight", matrix, torch.float32, tuple(matrix.shape))
    return decoded


def format_of(data: bytes) -> str:
    """The format that encoded bytes name.

    Raises:
        ValueError: none.
    """
    if not data or data[0] >= len(FORMATS):
        raise ValueError("the bytes name no format of an expert's weights")
    return FORMATS[data[0]]


def encoded_nbytes(fmt: str, hidden: int, width: int) -> int:
    """The exact size of an encoded expert.

    Raises:
        ValueError: unknown format or impossible sizes.
    """
    _index(fmt)
    if hidden < 1 or width < 1:
        raise ValueError(f"size {hidden} x {width} is not that of an expert")
    if fmt == "nf4":
        return 1 + nf4_blocks(hidden, width) * (BLOCK // 2 + 4)
    return 1 + _matrix_nbytes(fmt, 2 * width, hidden) + _matrix_nbytes(fmt, hidden, width)


def _matrix(fmt: str, data: memoryview, rows: int, columns: int, masters: bool) -> Tensor:
    if fmt == "int8":
        return Int8Rows.from_bytes(data, rows, columns).dense()
    if fmt == "ternary":
        ternary = Ternary.from_bytes(data, rows, columns)
        return masters_from(ternary) if masters else ternary.dense()
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[fmt]).float().view(rows, columns)


def _matrix_nbytes(fmt: str, rows: int, columns: int) -> int:
    if fmt == "int8":
        return rows * (columns + 2)
    if fmt == "ternary":
        return ternary_nbytes(rows, columns)
    return rows * columns * _DTYPES[fmt].itemsize


def _index(fmt: str) -> int:
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt!r} of weights; there are {', '.join(FORMATS)}")
    return FORMATS.index(fmt)
