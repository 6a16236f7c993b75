"""Waiting for news."""

import asyncio

import pytest
from shoal.node.peer.links import News


def test_a_waiter_hears_of_changes_and_of_time_running_out() -> None:
    async def run() -> None:
        news = News()
        change = news.next_change()
        assert not await news.wait(change, 0.01)
        news.changed()  # before the wait: not missed
        assert await news.wait(change, 60)
        change = news.next_change()
        asyncio.get_running_loop().call_soon(news.changed)
        assert await news.wait(change, 60)
        assert news.number == 2

    asyncio.run(run())


@pytest.mark.parametrize("ticks", range(6))
def test_a_cancellation_that_comes_with_news_is_not_swallowed(ticks: int) -> None:
    async def run() -> None:
        news = News()

        async def wait_for_ever() -> None:
            while True:
                await news.wait(news.next_change(), 60)

        task = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0)
        news.changed()
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done

    asyncio.run(run())
