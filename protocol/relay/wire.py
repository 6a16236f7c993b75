"""What relays and borrowers say to each other: one JSON object a line, and after `Take` the carried bytes.

relay     -> Hello                        on every connection, first
borrower  -> Probe -> Probed              where am I seen from, and who answers there?
borrower  -> Borrow -> Lent               then Ping and Incoming until either end closes
borrower  -> Take                         on a connection of its own, for each Incoming
dialler   -> Punch -> Met -> Through      the borrower takes as above and hears Met too: then both dial each other
relay     -> Sorry                        instead of an answer; then it closes
"""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated

import msgspec
from msgspec import Meta

from ..errors import Refused

MAX_LINE = 2048
PORTS_EACH = 2  # a peer has two listeners
PING_SECONDS, SILENCE_SECONDS = 15.0, 45.0
ANSWER_SECONDS = 10.0
MEET_SECONDS = 4.0  # for two peers to reach each other outside of the relay
CHUNK = 64 << 10

Port = Annotated[int, Meta(ge=1, le=65535)]
Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


class _Message(msgspec.Struct, frozen=True, tag_field="say", tag=str.lower, forbid_unknown_fields=True):
    pass


class Hello(_Message, frozen=True):
    nonce: Hex  # signed by who borrows; said by the relay to listeners that it dials
    lends: tuple[Port, Port]  # the first and the last of its ports, its own not among them


class Probe(_Message, frozen=True):
    ports: Annotated[list[Port], Meta(min_length=1, max_length=PORTS_EACH)]


class Probed(_Message, frozen=True):
    observed: Annotated[str, Meta(max_length=64)]  # the address that the connection came from
    answered: Annotated[list[bool], Meta(max_length=PORTS_EACH)]


class Borrow(_Message, frozen=True):
    peer_id: Annotated[str, Meta(max_length=64)]
    ports: Annotated[list[Port], Meta(max_length=PORTS_EACH)]  # as lent before; empty: any
    signature: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}\Z")]  # of `to_sign`
    meets: bool = True  # diallers outside of the relay, too


class Lent(_Message, frozen=True):
    ports: Annotated[list[Port], Meta(min_length=PORTS_EACH, max_length=PORTS_EACH)]
    key: Hex  # for `Take`


class Incoming(_Message, frozen=True):
    id: Annotated[int, Meta(ge=0)]
    listener: Annotated[int, Meta(ge=0, lt=PORTS_EACH)]
    meet: bool = False  # nothing is to be carried: the dialler wants to be met outside of the relay


class Take(_Message, frozen=True):
    key: Hex
    id: Annotated[int, Meta(ge=0)]


class Punch(_Message, frozen=True):
    port: Port  # lent by this relay, to whoever is wanted


class Met(_Message, frozen=True):
    host: Annotated[str, Meta(max_length=64)]  # of the other, as this relay sees its connection
    port: Port
    token: Hex  # that both say first, to each other: whoever else comes to that port does not know it


class Through(_Message, frozen=True):
    """The two have met."""


class Ping(_Message, frozen=True):
    pass


class Sorry(_Message, frozen=True):
    reason: Annotated[str, Meta(max_length=200)]


Message = Hello | Probe | Probed | Borrow | Lent | Incoming | Take | Punch | Met | Through | Ping | Sorry
_decoder = msgspec.json.Decoder(Message)


def to_sign(nonce: str) -> bytes:
    """What a borrower signs: it holds the key of the peer id, now."""
    return b"shoal relay 1\0" + bytes.fromhex(nonce)


async def read(reader: asyncio.StreamReader, seconds: float) -> Message:
    """The next message.

    Raises:
        Refused: it is none.
        ConnectionError: the other end has closed.
        TimeoutError: nothing came in time.
    """
    async with asyncio.timeout(seconds):
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError:
            raise Refused("oversized", f"a line of more than {MAX_LINE} bytes") from None
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("the other end has closed") from None
    try:
        message: Message = _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise Refused("malformed", f"not a message: {error}") from error
    return message


def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Queue a message; they are small and few."""
    writer.write(msgspec.json.encode(message) + b"\n")


def watch(writer: asyncio.StreamWriter) -> None:
    """Have the kernel notice an end that vanished: home routers forget connections without a word."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
