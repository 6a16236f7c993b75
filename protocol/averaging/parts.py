"""Encoding one part of a fragment for the all-reduce: hivemind's codecs behind checks that a peer cannot pass wrongly.

    float32   4 bytes an element
    float16   2 bytes; values beyond +-65504 are clamped
    int8      1 byte, one float32 scale per 4096 elements and a code book of 256 float32 per part
    int4      4.25 bits: `int4.py`

A message's length, shape and codec are compared with what this member would have sent *before* anything is decoded:
the int8 decoder is native code that believes the lengths inside the message.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hivemind.compression import (
    BlockwiseQuantization,
    CompressionInfo,
    Float16Compression,
    NoCompression,
    deserialize_torch_tensor,
)
from hivemind.proto import runtime_pb2
from torch import Tensor

from ..errors import Refused
from . import int4
from .int4 import Int4Compression

COARSE = frozenset({"int8", "int4"})  # codecs whose error is worth sending later
CodecName = Literal["float32", "float16", "int8", "int4"]

PART_BYTES = 1 << 18  # on the wire; a slow uplink must send one to every member within sender_timeout

LARGEST = 1e4  # element that is sent: no weight of a model that learns comes near it, still less a difference

_BLOCK = 4096  # elements per int8 scale
_CODE_BOOK = 256


def sendable(vector: Tensor) -> bool:
    """Whether others may have it: all finite, and not so large that it would undo what everybody has learned."""
    return float(vector.abs().max()) <= LARGEST if vector.numel() else True  # false for NaN


@dataclass(frozen=True)
class PartCodec:
    """The run's codec. Encoding and decoding are deterministic: equal bytes decode to equal floats on every CPU."""

    name: CodecName

    @property
    def compression(self) -> Any:
        """hivemind's object for it."""
        kinds = {
            "float32": NoCompression,
            "float16": Float16Compression,
            "int8": BlockwiseQuantization,
            "int4": Int4Compression,
        }
        return kinds[self.name]()

    def encode(self, part: Tensor) -> runtime_pb2.Tensor:
        """`part`: float32, shape (n,)."""
        return self.compression.compress(part, CompressionInfo.from_tensor(part))

    def decode(self, message: runtime_pb2.Tensor, numel: int) -> Tensor:
        """float32 tensor of shape (numel,). Raises Refused unless the message is exactly such a part, and sane."""
        if message.compression != self.compression.compression_type or message.dtype != "float32":
            raise Refused("part_codec", f"the part is not {self.name}")
        if list(message.size) != [numel] or len(message.buffer) != self.encoded_bytes(numel):
            raise Refused("part_shape", f"the part has {len(message.buffer)} bytes, {numel} elements need others")
        if self.name == "int8" and struct.unpack_from("<qq", message.buffer) != (_scales(numel), _CODE_BOOK):
            raise Refused("part_shape", "the part's scales or code book have another length")
        part: Tensor
        if self.name == "int4":
            try:
                part = int4.decode(message.buffer, numel)
            except ValueError as error:
                raise Refused("part_shape", str(error)) from error
        else:
            part = deserialize_torch_tensor(message)
        if not bool(torch.isfinite(part).all()):
            raise Refused("non_finite", "sent NaN or infinity")
        if not sendable(part / 2):
            raise Refused("part_too_large", f"sent numbers above {LARGEST:g}, as nobody does whose model learns")
        return part

    def as_received(self, vector: Tensor, part_bytes: int = PART_BYTES) -> Tensor:
        """What others decode of `vector`, float32 (numel,), when it is sent in an all-reduce; a new tensor.

        hivemind cuts a vector into parts of a fixed size, whoever reduces them; scales are per part or smaller.
        """
        ratio = self.compression.estimate_compression_ratio(CompressionInfo.from_tensor(vector))
        parts = torch.split(vector, int(part_bytes / (vector.element_size() * ratio)))
        return torch.cat([self.decode(self.encode(part), part.numel()) for part in parts])

    def round_trip(self, average: Tensor) -> tuple[runtime_pb2.Tensor, Tensor]:
        """The bytes for everybody and what they decode to. Raises Refused if the average itself is not finite."""
        if not bool(torch.isfinite(average).all()):
            raise Refused("non_finite", "the average overflowed")
        message = self.encode(average)
        return message, self.decode(message, average.numel())

    def encoded_bytes(self, numel: int) -> int:
        """Length of the buffer of a part of `numel` elements."""
        if self.name == "int4":
            return int4.encoded_bytes(numel)
        if self.name == "int8":
            return 16 + 4 * _scales(numel) + 4 * _CODE_BOOK + numel
        return numel * (4 if self.name == "float32" else 2)


def _scales(numel: int) -> int:
    return -(-numel // _BLOCK)
