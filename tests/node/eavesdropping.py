"""All that reaches a peer's process from the network, as it comes out of decryption, and searches in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from shoal.node.storage.blobs import from_bytes
from shoal.protocol import messages
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import RECORD_TYPES
from shoal.protocol.envelope import open_sealed
from shoal.protocol.errors import Refused
from shoal.protocol.messages import HandleTable, SlotState
from shoal.protocol.transport import ipc
from shoal.protocol.transport.client import Transport

WINDOW = 6  # bytes of text, or tokens, that must not be found in a row
WIDTHS = (1, 2, 4, 8)  # bytes of a token: as raw text, int16, int32 and int64, little endian
FETCHED = (SlotState, HandleTable)  # what a worker fetches


class Ear:
    """What one peer got, by peer id in `Ears`.

    Attributes:
        bytes: every frame from the transport's host, whole bodies and answers besides, every record from the DHT.
        gossip, calls: sealed messages. fetched: whole answers. names: of what others asked it for.
    """

    def __init__(self) -> None:
        self.bytes: list[bytes] = []
        self.gossip: list[bytes] = []
        self.calls: list[bytes] = []
        self.fetched: list[bytes] = []
        self.records: list[bytes] = []
        self.names: set[str] = set()
        self._open: dict[tuple[str, int], bytearray] = defaultdict(bytearray)

    def frame(self, frame: Any) -> None:
        self.bytes.append(msgspec.msgpack.encode(frame))
        match frame:
            case ipc.Gossip(data=data):
                self.gossip.append(data)
            case ipc.FetchHeader(id=id, offset=offset):
                del self._open["fetch", id][offset:]
            case ipc.FetchData(id=id, data=data):
                self._open["fetch", id] += data
            case ipc.FetchEnd(id=id, reason=""):
                self.fetched.append(self._whole("fetch", id))
            case ipc.CallData(id=id, data=data):
                self._open["call", id] += data
            case ipc.CallWhole(id=id, data=data):
                self._open["call", id] += data
                self.calls.append(self._whole("call", id))
            case ipc.ServeRequest(resource=name) | ipc.CallOpen(name=name):
                self.names.add(name)

    def _whole(self, what: str, id: int) -> bytes:
        data = bytes(self._open.pop((what, id), b""))
        self.bytes.append(data)
        return data

    def decoded(self, run_id: str) -> list[Any]:
        """Every message, as what it says that it is. Refused or BadSignature for one that is no message of the run."""
        return [*map(fetched, self.fetched), *gossiped((*self.gossip, *self.calls, *self.records), run_id)]


def gossiped(sealed: Iterable[bytes], run_id: str) -> list[Any]:
    """Messages and records out of their envelopes."""
    found: list[Any] = []
    for data in sealed:
        envelope = open_sealed(data, run_id, max_bytes=len(data))
        if envelope.kind in RECORD_TYPES:
            found.append(msgspec.msgpack.decode(envelope.payload, type=RECORD_TYPES[envelope.kind]))
        else:
            found.append(messages.decode_kind(envelope.kind, envelope.payload))
    return found


def fetched(data: bytes) -> Any:
    """A fetch answer of a worker's. AssertionError if it is not exactly one of those that it may get."""
    found = []
    for kind in FETCHED:
        try:
            found.append(messages.decode(data, kind))
        except Refused:
            continue
    assert len(found) == 1, f"{len(data)} bytes that are no answer to a worker: {data[:40]!r}"
    return found[0]


@contextmanager
def ears() -> Iterator[dict[str, Ear]]:
    """Listens at every peer that is made inside, by peer id."""
    heard: dict[str, Ear] = defaultdict(Ear)
    handle, fetch = Transport._handle, Directory._fetch

    def listening(self: Transport, host: Any, frame: Any) -> None:
        heard[self.peer_id].frame(frame)
        handle(self, host, frame)

    async def reading(self: Directory, kind: str) -> list[tuple[str, bytes]]:
        entries = await fetch(self, kind)
        ear = heard[self._identity.peer_id]
        for subkey, value in entries:
            ear.bytes += [subkey.encode(), value]
            ear.records.append(value)
        return entries

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transport, "_handle", listening)
        patch.setattr(Directory, "_fetch", reading)
        yield heard


class Text:
    """Random printable text as a composer's batches, and every window of it."""

    def __init__(self, batch: int, context: int) -> None:
        self._shape = (batch, context)
        self.drawn: list[np.ndarray[Any, Any]] = []

    def next_batch(self) -> Any:
        tokens = torch.randint(32, 127, self._shape)
        self.drawn.append(tokens.numpy())
        return tokens

    def windows(self) -> np.ndarray[Any, Any]:
        """Windows of `WINDOW` tokens, each as one number."""
        return np.unique(np.concatenate([_packed(row) for batch in self.drawn for row in batch]))


def found_text(data: bytes, windows: np.ndarray[Any, Any]) -> set[int]:
    """Token widths, of `WIDTHS`, in which one of the windows occurs in `data`, at any offset."""
    found = set()
    for width in WIDTHS:
        for offset in range(min(width, len(data))):
            tokens = np.frombuffer(data, f"<u{width}", count=(len(data) - offset) // width, offset=offset)
            if len(tokens) < WINDOW:
                continue
            numbers = _packed(tokens)
            at = np.minimum(np.searchsorted(windows, numbers), len(windows) - 1)
            if (windows[at] == numbers).any():
                found.add(width)
    return found


def _packed(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Windows of `WINDOW` tokens as numbers; if one is no byte, a number that no window of bytes is."""
    count = len(tokens) - WINDOW + 1
    numbers, bytes_only = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(WINDOW):
        part = tokens[i : i + count]
        bytes_only &= part < 256
        numbers |= part.astype(np.uint64) << np.uint64(8 * i)
    numbers[~bytes_only] = 2**64 - 1
    return numbers


def lists_of(message: Any, length: int, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of all lists of that length in a message, lists in lists too."""
    if isinstance(message, msgspec.Struct):
        for name in message.__struct_fields__:
            yield from lists_of(getattr(message, name), length, f"{path or type(message).__name__}.{name}")
    elif isinstance(message, list | tuple):
        if len(message) == length:
            yield path, message
        for item in message:
            yield from lists_of(item, length, path)


def structs_in(message: Any) -> Iterator[msgspec.Struct]:
    """The message and all structs in it."""
    if isinstance(message, msgspec.Struct):
        yield message
        for name in message.__struct_fields__:
            yield from structs_in(getattr(message, name))
    elif isinstance(message, list | tuple):
        for item in message:
            yield from structs_in(item)


def tensors_of(states: Iterable[SlotState]) -> list[tuple[SlotState, dict[str, Any]]]:
    return [(state, from_bytes(state.tensors, what="slot")) for state in states]
