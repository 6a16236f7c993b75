"""Resources that several peers want at once: made once, and never kept beyond their readers."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from shoal.node.peer.sharing import Shared
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
