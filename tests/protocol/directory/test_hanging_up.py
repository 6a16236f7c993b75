"""One stream after the other between two real p2pd. What is lost without the wait: see test_averaging.py."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import AsyncIterator  # noqa: UP035  # hivemind does not see collections.abc's as a stream

from hivemind.p2p import P2PContext
from hivemind.proto import averaging_pb2
from shoal.protocol.directory.hanging_up import until_hung_up

Message = averaging_pb2.AveragingData


class Called:
    """Answers thrice, waits `seconds` for the caller to hang up, and notes which came first."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def answer(self, request: Message, context: P2PContext) -> AsyncIterator[Message]:
        try:
            async for message in until_hung_up(self._answers(), self.seconds):
                yield message
            await self.ended.put("waited in vain")
        except asyncio.CancelledError:
            await self.ended.put("the caller hung up")
            raise

    @staticmethod
    async def _answers() -> AsyncIterator[Message]:
        for i in range(3):
            yield Message(weight=float(i))


def test_the_caller_hangs_up_first_or_is_left(nodes):
    patient, impatient = Called(60.0), Called(0.2)

    async def calls():
        server, client = [await node.dht.replicate_p2p() for node in nodes]
        for name, called in (("patient", patient), ("impatient", impatient)):
            await server.add_protobuf_handler(name, called.answer, Message, stream_output=True)
        async with aclosing(
            await client.iterate_protobuf_handler(server.peer_id, "patient", Message(), Message)
        ) as got:
            assert [(await anext(got)).weight for _ in range(3)] == [0.0, 1.0, 2.0]
            assert patient.ended.empty()
        assert await asyncio.wait_for(patient.ended.get(), 30) == "the caller hung up"
        async with aclosing(
            await client.iterate_protobuf_handler(server.peer_id, "impatient", Message(), Message)
        ) as got:
            assert (await anext(got)).weight == 0.0
            assert await asyncio.wait_for(impatient.ended.get(), 30) == "waited in vain"
        await asyncio.gather(client.shutdown(), server.shutdown())

    asyncio.run(calls())
