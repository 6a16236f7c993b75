"""4-bit parts for hivemind's all-reduce: per block of 64 elements a bfloat16 scale, and codes from -7 to 7, two a byte.

    s = max|x| / 7, rounded up to a bfloat16;  code = round(x / s) + 8, of which 0 never occurs;  4.25 bits an element

hivemind has no such codec. Its messages carry the number of a codec in an open protobuf enumeration, so this one has a
number that hivemind does not use. Encoding what was decoded gives the same bytes, as long as blocks are cut alike.
"""

from __future__ import annotations

from typing import Any

import torch
from hivemind.compression import CompressionBase, CompressionInfo
from hivemind.proto import runtime_pb2
from torch import Tensor

BLOCK = 64
LARGEST_CODE = 7
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
        return (BLOCK / 2 + 2) / (4 * BLOCK)


def encoded_bytes(numel: int) -> int:
    """Length of `numel` elements' encoding."""
    blocks = -(-numel // BLOCK)
    return blocks * (BLOCK // 2 + 2)


def encode(tensor: Tensor) -> bytes:
    """Nearest codes of every block; the error is at most half a scale, a fourteenth of the block's largest value."""
    flat = tensor.detach().float().reshape(-1)
    x_BK = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    exact = x_BK.abs().amax(1) / LARGEST_CODE
    rounded = exact.to(torch.bfloat16)
    # The next bfloat16 above a positive one is the next integer above its bits.
    scales = torch.where(rounded.float() < exact, (rounded.view(torch.int16) + 1).view(torch.bfloat16), rounded)
    divisor = scales.float().masked_fill(scales == 0, torch.inf).unsqueeze(1)
    codes = (x_BK / divisor).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8).add_(8).view(torch.uint8)
    packed = (codes[:, ::2] << 4) | codes[:, 1::2]
    data: bytes = packed.numpy().tobytes() + scales.view(torch.int16).numpy().tobytes()
    return data


def decode(data: bytes, numel: int) -> Tensor:
    """float32 (numel,), the same bits everywhere.

    Raises:
        ValueError: another length, a code that does not occur, or a scale that is negative or not finite.
    """
    if len(data) != encoded_bytes(numel):
        raise ValueError(f"{len(data)} bytes are not {numel} elements of 4 bits")
    if not numel:
        return torch.empty(0)
    blocks = len(data) // (BLOCK // 2 + 2)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    packed = raw[: blocks * BLOCK // 2].view(blocks, BLOCK // 2)
    scales = raw[blocks * BLOCK // 2 :].clone().view(torch.bfloat16).float()
    codes = torch.stack((packed >> 4, packed & 0x0F), dim=2).view(blocks, BLOCK)
    if bool((codes == 0).any()):
        raise ValueError("a code is 0")
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError("a scale is negative or not finite")
    return ((codes.to(torch.int8) - 8).float() * scales.unsqueeze(1)).view(-1)[:numel]
