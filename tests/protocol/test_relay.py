"""Ports on loan over real sockets: bytes pass both ways, a lost relay is found again, nobody gets what is another's."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from prometheus_server import free_port
from shoal.protocol.addresses import Address
from shoal.protocol.errors import PeerUnreachable
from shoal.protocol.identity import Identity
from shoal.protocol.relay import lender as lending
from shoal.protocol.relay import wire
from shoal.protocol.relay.borrower import Borrower, probe, reserve
from shoal.protocol.relay.lender import Lender
from transports import until

HOST, SECONDS = "127.0.0.1", 20.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * SECONDS):
            await scenario

    asyncio.run(bounded())


def ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)


@asynccontextmanager
async def relay(lent: list[int], **more: Any) -> AsyncIterator[tuple[Lender, Address]]:
    lender = Lender(HOST, lent, **more)
    await lender.start()
    try:
        yield lender, Address.of_host(HOST, lent[0])
    finally:
        await lender.close()


@asynccontextmanager
async def borrowing(at: Address, identity: Identity, lent: list[int], own: list[int]) -> AsyncIterator[Borrower]:
    borrower = Borrower(at, identity, lent, [(HOST, port) for port in own])
    task = asyncio.create_task(borrower.run())
    try:
        await borrower.connected.wait()
        yield borrower
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def echo(port: int, mark: bytes) -> AsyncIterator[None]:
    """Says its mark, then all that it hears, until the other end has said everything."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(mark)
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, HOST, port)
    try:
        yield
    finally:
        server.close()


async def said_back(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(HOST, port)

    async def say() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    _, heard = await asyncio.gather(say(), reader.read(-1))
    writer.close()
    return heard


def test_whoever_dials_a_lent_port_reaches_the_borrowers_listener() -> None:
    async def scenario() -> None:
        own, passed = ports(2), []
        async with relay(ports(5), count=passed.append) as (lender, at), echo(own[0], b"one:"), echo(own[1], b"two:"):
            identity = Identity.generate()
            lent = await reserve(at, identity)
            async with borrowing(at, identity, lent, own):
                assert lender.borrowers == [identity.peer_id]
                data = [os.urandom(random.randrange(1, 3_000_000)) for _ in range(6)]
                heard = await asyncio.gather(*(said_back(lent[i % 2], each) for i, each in enumerate(data)))
                assert heard == [(b"one:", b"two:")[i % 2] + each for i, each in enumerate(data)]
            assert sum(passed) == sum(2 * len(each) + 4 for each in data)
            await until(lambda: lender.borrowers == [], "the end of the loan")
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(HOST, lent[0])

    run(scenario())


def test_a_borrower_outlives_its_relay_and_has_the_same_ports_again() -> None:
    async def scenario() -> None:
        own, range_ = ports(2), ports(5)
        identity = Identity.generate()
        async with echo(own[0], b""), relay(range_) as (_, at):
            lent = await reserve(at, identity)
            context = borrowing(at, identity, lent, own)
            borrower = await context.__aenter__()
        await until(lambda: not borrower.connected.is_set(), "the borrower notices")
        async with echo(own[0], b"again:"), relay(range_):
            await borrower.connected.wait()
            assert await said_back(lent[0], b"hello") == b"again:hello"
            await context.__aexit__(None, None, None)

    run(scenario())


def test_ports_stay_their_borrowers_and_are_never_lent_twice() -> None:
    async def scenario() -> None:
        async with relay(ports(5)) as (_, at):
            first, second, third = (Identity.generate() for _ in range(3))
            mine, theirs = await reserve(at, first), await reserve(at, second)
            assert not set(mine) & set(theirs)
            assert await reserve(at, first) == mine
            with pytest.raises(PeerUnreachable, match="all ports of this relay are lent"):
                await reserve(at, third)

    run(scenario())


def test_nobody_borrows_in_the_name_of_another() -> None:
    async def scenario() -> None:
        async with relay(ports(5)) as (lender, at):
            reader, writer = await asyncio.open_connection(HOST, at.port)
            hello = await wire.read(reader, SECONDS)
            assert isinstance(hello, wire.Hello)
            forged = Identity.generate().sign(wire.to_sign(hello.nonce)).hex()
            wire.send(writer, wire.Borrow(Identity.generate().peer_id, [], forged))
            answer = await wire.read(reader, SECONDS)
            assert isinstance(answer, wire.Sorry)
            assert "signature" in answer.reason
            assert lender.borrowers == []
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"{}\n", b"\x00" * 5000, b'{"say":"ping"}\n', b'{"say":"take","key":"' + b"0" * 32 + b'","id":0}\n',
        b'{"say":"probe","ports":[0]}\n', b'{"say":"probe","ports":[1,2,3]}\n', b'{"say":"borrow","peer_id":"x"}\n',
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_a_reason(line: bytes) -> None:
    async def scenario() -> None:
        async with relay(ports(3)) as (_, at):
            reader, writer = await asyncio.open_connection(HOST, at.port)
            assert isinstance(await wire.read(reader, SECONDS), wire.Hello)
            writer.write(line)
            assert isinstance(await wire.read(reader, SECONDS), wire.Sorry)
            assert await reader.read() == b""
            writer.close()
            assert len(await reserve(at, Identity.generate())) == 2, "it serves the next one"

    run(scenario())


def test_a_probe_tells_who_answers_and_is_rationed() -> None:
    async def scenario() -> None:
        async with relay(ports(3)) as (_, at):
            seen = await probe(at, HOST, ports(2))
            assert (seen.address, seen.reachable) == (HOST, True)
            mine, other = ports(2)
            elsewhere = "127.0.0.2"  # as behind a router: what is dialled at the observed address is not this listener
            async with echo(mine, b""), echo(other, b""):
                assert not (await probe(at, elsewhere, [mine, other])).reachable
            for _ in range(lending.PROBES - 2):
                await probe(at, HOST, ports(2))
            with pytest.raises(PeerUnreachable, match="probes a minute"):
                await probe(at, HOST, ports(2))

    run(scenario())


def test_a_relay_that_is_not_there_is_named() -> None:
    async def scenario() -> None:
        gone = Address.of_host(HOST, free_port())
        for attempt in (probe(gone, HOST, ports(1)), reserve(gone, Identity.generate())):
            with pytest.raises(PeerUnreachable, match=f"port {gone.port}"):
                await attempt

    run(scenario())


def test_a_dialler_whose_connection_nobody_takes_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "ANSWER_SECONDS", 0.2)

    async def scenario() -> None:
        own = ports(2)  # nobody listens there
        async with relay(ports(3)) as (lender, at):
            identity = Identity.generate()
            lent = await reserve(at, identity)
            async with borrowing(at, identity, lent, own):
                assert await said_back(lent[0], b"hello") == b""
                assert not any(loan.waiting or loan.streams for loan in lender._loans.values())

    run(scenario())
