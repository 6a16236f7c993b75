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
from shoal.protocol.errors import PeerUnreachable, Refused
from shoal.protocol.identity import Identity
from shoal.protocol.relay import lender as lending
from shoal.protocol.relay import wire
from shoal.protocol.relay.asking import expect, reach_to_meet
from shoal.protocol.relay.borrower import Borrower, probe, reserve
from shoal.protocol.relay.lender import Lender
from shoal.protocol.relay.punching import meet
from shoal.protocol.relay.shortcuts import Shortcuts
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


def test_a_borrower_outlives_its_relay_and_has_the_same_ports_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        own, range_ = ports(2), ports(5)
        identity = Identity.generate()
        async with echo(own[0], b""), relay(range_) as (_, at):
            lent = await reserve(at, identity)
            context = borrowing(at, identity, lent, own)
            borrower = await context.__aenter__()
        await until(lambda: caplog.text.count("trying again") >= 2, "the borrower notices, and asks once more in vain")
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


def test_who_comes_to_a_relay_that_has_just_started_does_not_get_what_others_had() -> None:
    """Whoever had ports has told everybody of them, and may take half a minute to come back."""

    async def scenario() -> None:
        range_, own = ports(21), ports(2)
        settled, *newcomers = (Identity(bytes([number]) * 32) for number in range(4))
        async with relay(range_) as (_, at):
            lent = await reserve(at, settled)
        async with relay(range_):
            taken = [port for newcomer in newcomers for port in await reserve(at, newcomer)]
            assert not set(taken) & set(lent)
            async with asyncio.timeout(SECONDS), borrowing(at, settled, lent, own):
                pass

    run(scenario())


def test_who_borrow_at_once_get_ports_of_their_own() -> None:
    async def scenario() -> None:
        async with relay(ports(9)) as (_, at):
            lent = await asyncio.gather(*(reserve(at, Identity.generate()) for _ in range(4)))
            assert len({port for each in lent for port in each}) == 8

    run(scenario())


def test_ports_that_could_not_be_opened_are_nobodys() -> None:
    async def scenario() -> None:
        range_ = ports(3)
        async with relay(range_) as (lender, at):
            async with echo(range_[2], b""):
                with pytest.raises(PeerUnreachable):
                    await reserve(at, Identity.generate())
            await until(lambda: lender.borrowers == [], "the end of the loan")
            assert set(await reserve(at, Identity.generate())) == set(range_[1:])

    run(scenario())


def test_what_is_carried_and_who_asks_nothing_keep_nobody_from_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every carried connection is taken at the relay's own port; without that port none is carried any more."""
    monkeypatch.setattr(lending, "MAX_CLIENTS", 8)
    monkeypatch.setattr(lending, "MAX_CLIENTS_EACH", 4)

    async def scenario() -> None:
        own, identity, writers = ports(2), Identity.generate(), []
        async with relay(ports(5)) as (_, at), echo(own[0], b"here:"):
            lent = await reserve(at, identity)
            async with borrowing(at, identity, lent, own):
                for source, port in [(HOST, lent[0])] * 10 + [("127.0.0.2", at.port)] * 10:
                    reader, writer = await asyncio.open_connection(HOST, port, local_addr=(source, 0))
                    writers.append(writer)
                    assert await reader.read(5) == b"here:" or port == at.port
                assert len(await reserve(at, Identity.generate())) == 2
                for writer in writers:
                    writer.close()

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


@asynccontextmanager
async def shortcuts(at: Address) -> AsyncIterator[tuple[Shortcuts, list[bool]]]:
    met: list[bool] = []
    ways = Shortcuts(at, met=met.append)
    await ways.start()
    try:
        yield ways, met
    finally:
        await ways.close()


def test_who_is_met_outside_is_reached_past_the_relay() -> None:
    async def scenario() -> None:
        own, passed = ports(2), []
        identity = Identity.generate()
        async with relay(ports(5), count=passed.append) as (lender, at), echo(own[0], b"one:"), echo(own[1], b"two:"):
            lent = await reserve(at, identity)
            async with borrowing(at, identity, lent, own), shortcuts(at) as (ways, met):
                addresses = [str(Address.of_host(HOST, port, identity.peer_id)) for port in lent]
                here = [Address.parse(address) for address in ways.addresses(addresses)]
                assert {address.peer_id for address in here} == {identity.peer_id}
                assert not {address.port for address in here} & set(lent)
                data = [os.urandom(random.randrange(1, 3_000_000)) for _ in range(6)]
                heard = await asyncio.gather(*(said_back(here[i % 2].port, each) for i, each in enumerate(data[:2])))
                for i, each in enumerate(data[2:], 2):
                    heard.append(await said_back(here[i % 2].port, each))
                assert heard == [(b"one:", b"two:")[i % 2] + each for i, each in enumerate(data)]
                assert met == [True] * 6
                assert await ways.prepare(addresses[0]) == str(here[0])
                assert await said_back(here[0].port, b"prepared") == b"one:prepared"
                assert len(met) == 7, "the prepared connection was used"
            assert passed == []
            assert not any(loan.waiting for loan in lender._loans.values())

    run(scenario())


def test_who_cannot_be_met_is_reached_by_the_relay_and_not_tried_each_time() -> None:
    async def scenario() -> None:
        own, passed = ports(2), []
        identity = Identity.generate()
        async with relay(ports(5), count=passed.append) as (_, at), echo(own[0], b"one:"):
            lent = await reserve(at, identity)
            borrower = Borrower(at, identity, lent, [(HOST, port) for port in own], meets=False)
            task = asyncio.create_task(borrower.run())
            await borrower.connected.wait()
            async with shortcuts(at) as (ways, met):
                address = str(Address.of_host(HOST, lent[0], identity.peer_id))
                [here] = ways.addresses([address])
                for _ in range(3):
                    assert await said_back(Address.parse(here).port, b"hello") == b"one:hello"
                assert met == [False]
                assert await ways.prepare(address) is None
            assert sum(passed) == 3 * (4 + 2 * 5)
            task.cancel()

    run(scenario())


def test_addresses_that_are_not_on_loan_stay() -> None:
    async def scenario() -> None:
        peer = Identity.generate().peer_id
        async with relay([*sorted(ports(6))]) as (_, at):
            others = [str(Address.of_host(HOST, at.port, peer)), str(Address.of_host("192.0.2.1", at.port + 1, peer))]
            others += ["/ip4/127.0.0.1/udp/1/quic", "/x", "/ip4/127.0.0.1/tcp/99999"]  # a peer signs what it likes
            async with shortcuts(at) as (ways, _):
                assert ways.addresses(others) == others
                assert [await ways.prepare(other) for other in others] == [None] * len(others)
        async with shortcuts(at) as (ways, _):  # it is gone: nobody knows what it lends
            assert not ways.replaces(str(Address.of_host(HOST, at.port + 1, peer)))

    run(scenario())


def test_a_stranger_at_the_meeting_place_is_not_taken_for_who_was_meant() -> None:
    async def scenario() -> None:
        own_port, there = ports(2)
        visits: list[bytes] = []

        async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"0" * 32 + b"\n")
            visits.append(await reader.read(100))
            writer.close()

        async with await asyncio.start_server(stranger, HOST, there):
            with pytest.raises(TimeoutError):
                await meet(own_port, wire.Met(HOST, there, "1" * 32))
        assert visits
        with pytest.raises(ValueError, match="example"):
            await meet(own_port, wire.Met("example.org", there, "1" * 32))

    run(scenario())


def test_introductions_are_rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "PUNCHES", 5)

    async def scenario() -> None:
        async with relay(ports(3)) as (_, at):
            for _ in range(lending.PUNCHES):
                with pytest.raises(Refused, match="not lent"):
                    await _punch(at)
            with pytest.raises(Refused, match="a minute"):
                await _punch(at)

    async def _punch(at: Address) -> None:
        (reader, writer), _ = await reach_to_meet(at)
        wire.send(writer, wire.Punch(at.port))
        try:
            expect(wire.Met, await wire.read(reader, SECONDS))
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    run(scenario())
