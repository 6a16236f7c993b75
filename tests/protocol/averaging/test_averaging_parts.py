"""What peers send in a round, before any network: signed facts, encoded parts, fragments, times."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.averaging.facts import RoundFacts, open_facts, sign_facts
from shoal.protocol.averaging.fragments import flatten, partition, tier_of, unflatten
from shoal.protocol.errors import BadSignature, Refused
from shoal.protocol.identity import Identity

RUN = "test-0123456789ab"
NOW = 1_700_000_000.0
ME = Identity.generate()


def facts(identity=ME, **changes):
    fields = {"peer_id": identity.peer_id, "round": 3, "attempt": 0, "fragment": 1}
    fields |= {"tokens": 10, "steps": 2, "base": bytes(32), "reduces": True, "issued_at": NOW}
    return RoundFacts(**{**fields, **changes})


def test_signed_facts_come_back():
    data = sign_facts(ME, RUN, facts(tokens=77))
    assert open_facts(data, RUN, ME.peer_id, like=facts(), now=NOW).tokens == 77
    assert data[64:].hex() == sign_facts(ME, RUN, facts(tokens=77))[64:].hex()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 4}, "facts_of_another_round"),
        ({"attempt": 1}, "facts_of_another_round"),
        ({"fragment": 0}, "facts_of_another_round"),
        ({"base": bytes([1]) * 32}, "another_base"),
        ({"issued_at": NOW - 3600}, "facts_stale"),
        ({"issued_at": float("nan")}, "facts_stale"),
        ({"peer_id": Identity.generate().peer_id}, "facts_of_another"),
        ({"tokens": 0}, "facts_malformed"),
        ({"steps": -1}, "facts_malformed"),
        ({"base": b"short"}, "facts_malformed"),
    ],
)
def test_signed_but_wrong_facts_are_refused(changes, reason):
    data = sign_facts(ME, RUN, facts(**changes))
    with pytest.raises(Refused) as refused:
        open_facts(data, RUN, ME.peer_id, like=facts(), now=NOW)
    assert refused.value.reason == reason


def test_facts_without_tokens_are_for_receivers():
    data = sign_facts(ME, RUN, facts(tokens=0))
    assert open_facts(data, RUN, ME.peer_id, like=facts(), now=NOW, receivers=True).tokens == 0
    with pytest.raises(Refused, match="no tokens"):
        open_facts(data, RUN, ME.peer_id, like=facts(), now=NOW)
    with pytest.raises(Refused):
        open_facts(sign_facts(ME, RUN, facts(tokens=-1)), RUN, ME.peer_id, like=facts(), now=NOW, receivers=True)


def test_forged_facts_are_refused():
    data = sign_facts(ME, RUN, facts())
    for run, peer_id in ((RUN + "x", ME.peer_id), (RUN, Identity.generate().peer_id), (RUN, "nonsense")):
        with pytest.raises(BadSignature):
            open_facts(data, run, peer_id, like=facts(), now=NOW)
    flipped = bytearray(data)
    flipped[secrets.randbelow(len(data))] ^= 1 << secrets.randbelow(8)
    with pytest.raises(BadSignature):
        open_facts(bytes(flipped), RUN, ME.peer_id, like=facts(), now=NOW)
    for junk in (b"", data[:64], data + bytes(600)):
        with pytest.raises(Refused):
            open_facts(junk, RUN, ME.peer_id, like=facts(), now=NOW)


shapes = st.dictionaries(
    st.from_regex(r"layers\.[0-9]{1,2}\.[a-z]{1,5}\.weight", fullmatch=True),
    st.lists(st.integers(1, 50), min_size=1, max_size=2),
    min_size=4,
    max_size=40,
)


@given(shapes=shapes, count=st.integers(1, 4), random=st.randoms())
def test_fragments_cover_everything_once_and_do_not_depend_on_order(shapes, count, random):
    found = partition(shapes, count)
    names = [name for fragment in found for name in fragment.names]
    assert sorted(names) == sorted(shapes)
    assert all(fragment.numel == sum(fragment.sizes) > 0 for fragment in found)
    shuffled = list(shapes.items())
    random.shuffle(shuffled)
    assert partition(dict(shuffled), count) == found
    loads = sorted(fragment.numel for fragment in found)
    biggest = max(size for fragment in found for size in fragment.sizes)
    assert loads[-1] - loads[0] <= biggest


def test_embeddings_and_head_are_apart():
    shapes = {"model.embed_tokens.weight": [1000, 8], "lm_head.weight": [1000, 8]}
    shapes |= {f"layers.{i}.w": [20, 8] for i in range(9)}
    for count in (2, 3, 5):
        homes = {name: fragment.index for fragment in partition(shapes, count) for name in fragment.names}
        assert homes["model.embed_tokens.weight"] != homes["lm_head.weight"]
    with pytest.raises(ValueError, match="fragments"):
        partition(shapes, 12)


def test_no_fragment_mixes_tensors_that_are_due_at_different_times():
    shapes = {"model.embed_tokens.weight": [100, 8], "lm_head.weight": [100, 8], "model.norm.weight": [8]}
    for layer in range(4):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": [8, 8] for name in "qkvo"}
        shapes |= {
            f"model.layers.{layer}.mlp.gate.weight": [16, 8],
            f"model.layers.{layer}.input_layernorm.weight": [8],
        }
    every = {"embeddings": 48, "router": 8, "body": 24}
    for count in range(3, 9):
        found = partition(shapes, count, every)
        assert len(found) == count
        assert sorted(name for fragment in found for name in fragment.names) == sorted(shapes)
        tiers = [{tier_of(name) for name in fragment.names} for fragment in found]
        assert all(len(tier) == 1 for tier in tiers)
        assert set().union(*tiers) == set(every)
        assert [fragment.index for fragment in found] == list(range(count))
    assert sum(tier == {"embeddings"} for tier in tiers) > 1, "the largest tier gets the most fragments"
    assert partition(shapes, 4, dict.fromkeys(every, 8)) == partition(shapes, 4)
    with pytest.raises(ValueError, match="3 cadences"):
        partition(shapes, 2, every)


def test_flatten_and_back():
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(5).to(torch.bfloat16), "c": torch.randn(4, 1).T}
    (fragment,) = partition({name: tuple(tensor.shape) for name, tensor in tensors.items()}, 1)
    flat = flatten(fragment, tensors)
    assert flat.dtype == torch.float32
    for name, part in unflatten(fragment, flat).items():
        assert torch.equal(part, tensors[name].float().reshape(-1))
    with pytest.raises(ValueError, match="elements"):
        unflatten(fragment, flat[:-1])


PARTS = """
import secrets, struct, sys
import torch
from shoal.protocol.averaging.averager_process import RoundTimes
from shoal.protocol.errors import Refused
from shoal.protocol.averaging.parts import LARGEST, PartCodec, sendable

def refused(codec, message, numel, reason):
    try:
        codec.decode(message, numel)
    except Refused as error:
        assert error.reason == reason, (error.reason, reason)
    else:
        raise AssertionError(f"accepted, wanted {reason}")

for name in ("float32", "float16", "int8"):
    codec = PartCodec(name)
    for n in (1, 4095, 4096, 4097, 10_000):
        x = torch.randn(n)
        message, decoded = codec.round_trip(x)
        assert len(message.buffer) == codec.encoded_bytes(n)
        assert torch.equal(codec.decode(message, n), decoded)
        assert (decoded - x).abs().max() <= {"float32": 0, "float16": 4e-3, "int8": 0.1}[name], (name, n)
        refused(codec, message, n + 1, "part_shape")
        message.buffer += b"!"
        refused(codec, message, n, "part_shape")
    if name != "int8":  # its encoder hides a NaN in a finite code; see the scales below
        bad = torch.randn(100)
        bad[secrets.randbelow(100)] = float("nan")
        refused(codec, codec.encode(bad), 100, "non_finite")
    other = PartCodec("float32" if name != "float32" else "float16")
    refused(codec, other.encode(torch.randn(10)), 10, "part_codec")

for name in ("float32", "float16", "int8", "int4"):
    codec, few = PartCodec(name), torch.zeros(100)
    few[7] = -LARGEST
    assert sendable(few)
    assert codec.decode(codec.encode(few), 100).abs().max() > 0.9 * LARGEST  # as it is sent, or rounded up a little
    few[7] = -3 * LARGEST
    assert not sendable(few)
    refused(codec, codec.encode(few), 100, "part_too_large")
assert not sendable(torch.tensor([1.0, float("nan")])) and not sendable(torch.tensor([float("inf")]))
assert sendable(torch.zeros(0))

codec = PartCodec("int8")
message = codec.encode(torch.randn(10_000))
body = bytes(message.buffer)
for scales, book in ((4, 256), (3, 255), (-1, 256), (1 << 60, 256)):
    message.buffer = struct.pack("<qq", scales, book) + body[16:]
    refused(codec, message, 10_000, "part_shape")
message.buffer = body[:16] + struct.pack("<f", float("inf")) * 3 + body[28:]
refused(codec, message, 10_000, "non_finite")

import asyncio
from shoal.protocol.averaging.allreduce import ShareReducer

async def only_a_receiver_is_left():
    reducer = ShareReducer([torch.Size([7])], [0, 5])
    waiting = asyncio.ensure_future(reducer.accumulate_part(0, 0, torch.zeros(7)))
    await asyncio.sleep(0)
    reducer.on_sender_failed(1)
    assert torch.equal(await waiting, torch.zeros(7)) and reducer.included == [1]

asyncio.run(only_a_receiver_is_left())

from shoal.protocol.averaging.matchmaking import round_of_bucket
bits = f"{(1 << 48) - 3:048b}{secrets.randbelow(1 << 16):016b}"
assert round_of_bucket("run-sketch", f"run-sketch.0b{bits}") == (1 << 48) - 3
for wrong in ("", "run-sketch.0b", f"run-outer.0b{bits}", f"run-sketch.0b{bits}1", f"run-sketch.0b{bits[1:]}", bits,
              f"run-sketch.0b{bits[:-1]}2", f"run-sketch.0b{bits[:-1]}_"):
    assert round_of_bucket("run-sketch", wrong) is None, wrong

times = RoundTimes(matchmaking=5.0, round=30.0)
assert times.request < times.matchmaking < times.search < times.round
assert times.sender < times.reducer < times.allreduce < times.round - times.search
try:
    RoundTimes(matchmaking=5.0, round=6.0)
except ValueError:
    pass
else:
    raise AssertionError("6 s cannot hold a round")
"""


def test_parts_are_checked_before_they_are_decoded():
    """In its own interpreter: hivemind and py-libp2p cannot be imported together."""
    done = subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
