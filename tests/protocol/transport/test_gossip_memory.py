"""What the host process keeps of gossip. In a process of its own: py-libp2p shares none with hivemind."""

import json
import subprocess
import sys
from typing import Any

import pytest

MESSAGES = 200


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-P", __file__], capture_output=True, text=True, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_of_messages_that_were_published_no_note_is_kept(found: dict[str, Any]) -> None:
    """A peer lives for weeks, and passes on what all others say."""
    assert found["delivered"] == 0
    assert found["topics"] == 1


def test_a_message_of_several_topics_is_dropped(found: dict[str, Any]) -> None:
    assert found["taken"] == [True, False]
    assert found["garbage"] == 1


async def _main() -> None:
    import trio
    from libp2p import new_host
    from libp2p.peer.id import ID
    from libp2p.pubsub.pb import rpc_pb2
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr
    from shoal.protocol.transport.gossip import Gossip, Router, _forwarder
    from shoal.protocol.transport.inbox import GossipCounts
    from shoal.protocol.transport.limits import Limits

    host = new_host(muxer_preference="YAMUX")
    router = Router(GossipCounts())
    gossip = Gossip(host, router, "run", Limits())
    taken = []
    async with (
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(router),
        background_trio_service(gossip),
    ):
        await gossip.wait_until_ready()
        await gossip.join("news")
        for number in range(MESSAGES):
            await gossip.send("news", number.to_bytes(4))
        _forwarder.set(ID(b"somebody"))
        for topics in (["/shoal/run/news"], ["/shoal/run/news", "/made/up"]):
            before = gossip._received.statistics().current_buffer_used
            gossip._is_subscribed_to_msg(rpc_pb2.Message(topicIDs=topics))
            taken.append(gossip._received.statistics().current_buffer_used > before)
        result = {
            "delivered": sum(map(len, router.recent_message_deliveries.values())),
            "topics": len(router.time_since_last_publish),
            "taken": taken,
            "garbage": router.counts.garbage,
        }
        print(json.dumps(result), flush=True)
    await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    import trio

    trio.run(_main)
