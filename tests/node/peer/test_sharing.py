"""Resources that several peers want at once: made once, and never kept beyond their readers."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from shoal.node.peer.sharing import Room, Shared
from shoal.protocol.errors import Refused
from shoal.protocol.transport.downloads import Resource


class Maker:
    """Makes resources when it is let, and counts."""

    def __init__(self) -> None:
        self.made = 0
        self.may = asyncio.Event()

    async def __call__(self) -> Resource | None:
        await self.may.wait()
        self.made += 1
        return Resource(b"%d" % self.made)


def test_who_asks_meanwhile_gets_the_same() -> None:
    async def scenario() -> None:
        shared, maker = Shared(seconds=10.0), Maker()
        asked = [asyncio.ensure_future(shared.get("a", maker)) for _ in range(5)]
        other = asyncio.ensure_future(shared.get("b", maker))
        await asyncio.sleep(0)
        asked.pop().cancel()  # one goes away, the others have it all the same
        maker.may.set()
        first, *same = await asyncio.gather(*asked)
        assert first is not None
        assert all(each is first for each in same)
        assert await other is not first
        assert await shared.get("a", maker) is first  # while it is read
        assert maker.made == 2

    asyncio.run(scenario())


def test_nothing_is_kept_that_nobody_reads() -> None:
    async def scenario() -> None:
        shared, maker = Shared(seconds=10.0), Maker()
        maker.may.set()
        kept = weakref.ref(await shared.get("a", maker) or Resource(b""))
        await asyncio.sleep(0)
        gc.collect()
        assert kept() is None
        assert await shared.get("a", maker) == Resource(b"2")

    asyncio.run(scenario())


def test_an_old_one_is_given_to_nobody_else() -> None:
    async def scenario() -> None:
        now = 0.0
        shared, maker = Shared(seconds=10.0, clock=lambda: now), Maker()
        maker.may.set()
        first = await shared.get("a", maker)
        now = 10.0
        assert await shared.get("a", maker) is first
        now = 10.1
        assert await shared.get("a", maker) is not first

    asyncio.run(scenario())


def test_an_error_is_everybodys_and_is_not_kept() -> None:
    async def scenario() -> None:
        shared, maker = Shared(seconds=10.0), Maker()

        async def fail() -> Resource | None:
            await asyncio.sleep(0)
            raise ValueError("no")

        results = await asyncio.gather(shared.get("a", fail), shared.get("a", fail), return_exceptions=True)
        assert [str(result) for result in results] == ["no", "no"]
        with pytest.raises(ValueError, match="no"):
            await shared.get("a", fail)
        maker.may.set()
        assert await shared.get("a", maker) == Resource(b"1")

    asyncio.run(scenario())


def test_what_is_made_and_read_at_a_time_is_bounded() -> None:
    async def scenario() -> None:
        room, maker = Room(100), Maker()
        making = [asyncio.ensure_future(room.fill(50, maker)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refused:  # before anything is made
            await room.fill(1, maker)
        assert refused.value.reason == "busy"
        maker.may.set()
        read = await asyncio.gather(*making)
        assert (room.taken, maker.made) == (2, 2), "what has been made takes no more than its bytes"
        assert await room.fill(98, maker) == Resource(b"3")
        with pytest.raises(Refused):
            await room.fill(99, maker)
        making.clear()
        read.clear()
        await asyncio.sleep(0)
        gc.collect()
        assert room.taken == 0

    asyncio.run(scenario())


def test_there_is_room_for_one_however_large() -> None:
    async def scenario() -> None:
        room, maker = Room(100), Maker()
        maker.may.set()
        read = await room.fill(1000, maker)
        with pytest.raises(Refused):
            await room.fill(1000, maker)
        del read
        gc.collect()
        assert await room.fill(1000, maker) is not None

    asyncio.run(scenario())


def test_what_could_not_be_made_takes_no_room() -> None:
    async def scenario() -> None:
        async def fail() -> Resource | None:
            raise ValueError("no")

        async def nothing() -> Resource | None:
            return None

        room = Room(100)
        with pytest.raises(ValueError, match="no"):
            await room.fill(60, fail)
        assert await room.fill(60, nothing) is None
        assert room.taken == 0

    asyncio.run(scenario())
