"""4-bit parts for hivemind's all-reduce: `kernels/int4.py` of all elements in a row, 4.25 bits each.

hivemind has no such codec. Its messages carry the number of a codec in an open protobuf enumeration, so this one has a
number that hivemind does not use.
"""

from __future__ import annotations

from typing import Any

import torch
from hivemind.compression import CompressionBase, CompressionInfo
from hivemind.proto import runtime_pb2
from torch import Tensor
from torch.nn.functional import pad

from ...kernels.int4 import BLOCK, BLOCK_BYTES, Int4Blocks, quantise_blocks

TYPE_NUMBER = 104  # beyond those of hivemind's own codecs


class Int4Compression(CompressionBase):  # type: ignore[misc]  # hivemind is untyped
    """Codes first, then scales."""

    compression_type = TYPE_NUMBER

    def compress(self, tensor: Tensor, info: CompressionInfo, allow_inplace: bool = False) -> runtime_pb2.Tensor:
        """`tensor`: float32, finite, any shape."""
        return runtime_pb2.Tensor(
            compression=self.compression_type,
            buffer=encode(tensor),
            size=tensor.shape,
            dtype="float32",
            requires_grad=False,
        )

    def extract(self, serialized_tensor: Any) -> Tensor:
        """As `decode`."""
        shape = torch.Size(serialized_tensor.size)
        return decode(serialized_tensor.buffer, shape.numel()).view(shape)

    def estimate_compression_ratio(self, info: CompressionInfo) -> float:
        """Bytes over those of float32."""
        return BLOCK_BYTES / (4 * BLOCK)


def encoded_bytes(numel: int) -> int:
    """Length of `numel` elements' encoding."""
    return -(-numel // BLOCK) * BLOCK_BYTES


def encode(tensor: Tensor) -> bytes:
    """Nearest codes of every block; the error is at most half a scale, a fourteenth of the block's largest value."""
    flat = tensor.detach().float().reshape(-1)
    return quantise_blocks(pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)).to_bytes()


def decode(data: bytes, numel: int) -> Tensor:
    """float32 (numel,), the same bits everywhere.

    Raises:
        ValueError: another length, a code that does not occur, or a scale that is negative or not finite.
    """
    if len(data) != encoded_bytes(numel):
        raise ValueError(f"{len(data)} bytes are not {numel} elements of 4 bits")
    return Int4Blocks.from_bytes(data, -(-numel // BLOCK)).dense().view(-1)[:numel]
