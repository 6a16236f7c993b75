"""4-bit parts: near what was sent, exact when sent again, and never decoded from anything else."""

from __future__ import annotations

import secrets

import pytest
import torch
from hivemind.compression import CompressionInfo
from shoal.protocol.averaging.int4 import BLOCK, decode, encode, encoded_bytes
from shoal.protocol.averaging.parts import PartCodec
from shoal.protocol.errors import Refused

SIZES = (1, 63, 64, 65, 1000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_error_is_at_most_half_a_scale(size: int, scale: float) -> None:
    x = torch.randn(size) * scale
    got = decode(encode(x), size)
    for block, back in zip(x.split(BLOCK), got.split(BLOCK), strict=True):
        largest = float(block.abs().max())
        # A bfloat16 scale is up to 1/128 above the exact one.
        assert float((block.double() - back).abs().max()) <= largest / 7 / 2 * (1 + 2**-7) * (1 + 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_what_was_decoded_encodes_to_values_that_decode_the_same(size: int) -> None:
    once = decode(encode(torch.randn(size)), size)
    assert torch.equal(decode(encode(once), size), once)


def test_zeros_and_values_too_small_to_scale_are_zeros() -> None:
    x = torch.zeros(200)
    x[150] = 1e-45
    assert float(decode(encode(x), 200).abs().max()) <= 1e-38


@pytest.mark.parametrize("size", SIZES)
def test_a_part_is_as_long_as_said_and_about_an_eighth(size: int) -> None:
    codec = PartCodec("int4")
    message = codec.encode(torch.randn(size))
    assert len(message.buffer) == codec.encoded_bytes(size) == encoded_bytes(size)
    assert codec.compression.estimate_compression_ratio(CompressionInfo.from_tensor(torch.zeros(1))) == 34 / 256


def test_what_is_no_such_part_is_refused() -> None:
    codec, size = PartCodec("int4"), 130
    message = codec.encode(torch.randn(size))
    for spoil in ("short", "long", "code", "negative", "endless", "codec", "size"):
        bad = type(message)()
        bad.CopyFrom(message)
        buffer = bytearray(message.buffer)
        codes = 3 * BLOCK // 2
        if spoil == "short":
            buffer = buffer[:-1]
        elif spoil == "long":
            buffer += b"\0"
        elif spoil == "code":
            buffer[secrets.randbelow(codes)] = 0x80 if secrets.randbelow(2) else 0x08
        elif spoil == "negative":
            buffer[codes + 1] |= 0x80
            buffer[codes] |= 1
        elif spoil == "endless":
            buffer[codes : codes + 2] = b"\x80\x7f"
        elif spoil == "codec":
            bad.compression = 0
        else:
            bad.size[0] = size + 1
        bad.buffer = bytes(buffer)
        with pytest.raises(Refused):
            codec.decode(bad, size)
    assert codec.decode(message, size).shape == (size,)
