"""Real py-libp2p hosts in real processes, on loopback: what tests of the data plane share."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from shoal.protocol.transport.client import Transport
from shoal.protocol.transport.downloads import FetchQuery, Resource
from shoal.protocol.transport.limits import Limits

PATIENCE_SECONDS = 20.0


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


async def until(condition: Callable[[], object], what: str = "", seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what or condition}"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def swarm(directory: Path, count: int, **limits: Any) -> AsyncIterator[list[Transport]]:
    """`count` transports, not connected."""
    peers = await asyncio.gather(
        *(
            Transport.start(identity_path=directory / f"{i}.key", run_id="run", limits=Limits(**limits))
            for i in range(count)
        )
    )
    try:
        yield peers
    finally:
        await asyncio.gather(*(peer.close() for peer in peers))


class Listener:
    """Collects what a topic brings."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, sender: str, data: bytes) -> None:
        self.messages.append((sender, data))


async def gossiping(peers: list[Transport], topic: str) -> list[Listener]:
    """Connect everybody to the first, subscribe all, and wait until a message of each reaches all others."""
    listeners = [Listener() for _ in peers]
    for peer, listener in zip(peers, listeners, strict=True):
        await peer.subscribe(topic, listener)
    for peer in peers[1:]:
        await peer.connect(peers[0].addrs)
    await reached(peers, listeners, topic)
    return listeners


async def reached(peers: list[Transport], listeners: list[Listener], topic: str) -> None:
    everybody = {peer.peer_id for peer in peers}
    for listener in listeners:
        listener.messages.clear()

    def missing() -> bool:
        return any(
            {sender for sender, _ in listener.messages} != everybody - {peer.peer_id}
            for peer, listener in zip(peers, listeners, strict=True)
        )

    deadline = time.monotonic() + PATIENCE_SECONDS
    while missing():
        assert time.monotonic() < deadline, "the mesh does not form"
        for peer in peers:
            await peer.publish(topic, b"hello")
        with contextlib.suppress(AssertionError):
            await until(lambda: not missing(), seconds=0.3)
    for listener in listeners:
        listener.messages.clear()


def serve(peer: Transport, **resources: Resource) -> Counter[str]:
    asked: Counter[str] = Counter()

    async def answer(query: FetchQuery) -> Resource | None:
        asked[query.peer_id] += 1
        return resources.get(query.resource)

    peer.serve(answer)
    return asked
