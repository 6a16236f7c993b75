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


def test_of_topics_that_a_peer_makes_up_no_note_is_kept(found: dict[str, Any]) -> None:
    assert found["made_up"] == []


def test_who_has_left_is_in_no_mesh_and_no_note(found: dict[str, Any]) -> None:
    assert found["left"] == []


async def _main() -> None:
    import trio
    import trio.testing
    from libp2p import new_host
    from libp2p.custom_types import TProtocol
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import PeerInfo
    from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
    from libp2p.pubsub.pb import rpc_pb2
    from libp2p.tools.anyio_service import background_trio_service
    from libp2p.utils import encode_varint_prefixed
    from multiaddr import Multiaddr
    from shoal.protocol.transport.gossip import Gossip, Router, _forwarder
    from shoal.protocol.transport.inbox import GossipCounts
    from shoal.protocol.transport.limits import Limits

    host = new_host(muxer_preference="YAMUX")
    router = Router(GossipCounts())
    gossip = Gossip(host, router, "run", Limits())
    anywhere, news = [Multiaddr("/ip4/127.0.0.1/tcp/0")], "/shoal/run/news"
    taken, made_up, left = [], set(), []

    async def until(condition: Any) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 - what it waits for is py-libp2p's: there is no event
                await trio.sleep(0.01)

    async def visit(kind: str, arrived: Any) -> None:
        """Graft or prune topics, the run's last, without listening to any; then leave."""
        visitor, rpc = new_host(muxer_preference="YAMUX"), rpc_pb2.RPC()
        for topic in ("/made/up", "/another", news):
            getattr(rpc.control, kind).add().topicID = topic
        async with visitor.run(listen_addrs=anywhere):
            await visitor.connect(PeerInfo(host.get_id(), host.get_transport_addrs()))
            stream = await visitor.new_stream(host.get_id(), [TProtocol(PROTOCOL_ID_V12)])
            await stream.write(encode_varint_prefixed(rpc.SerializeToString()))
            await until(lambda: arrived(visitor.get_id()))
            notes = [*router.scorer.first_message_deliveries.values(), *router.graft_flood_tracking.values()]
            made_up.update({topic for note in (router.back_off, *notes) for topic in note} - {news})
            await visitor.get_network().close_peer(host.get_id())
            await until(lambda: not host.get_network().get_connections(visitor.get_id()))
        await trio.testing.wait_all_tasks_blocked(0.1)
        places = (router.mesh[news], router.back_off.get(news, ()), router.scorer.first_message_deliveries)
        left.extend(kind for place in places if visitor.get_id() in place)

    async with (
        host.run(listen_addrs=anywhere),
        background_trio_service(router),
        background_trio_service(gossip),
    ):
        await gossip.wait_until_ready()
        await gossip.join("news")
        for number in range(MESSAGES):
            await gossip.send("news", number.to_bytes(4))
        published = {
            "delivered": sum(map(len, router.recent_message_deliveries.values())),
            "topics": len(router.time_since_last_publish),
        }
        await visit("graft", lambda visitor: visitor in router.mesh[news])
        await visit("prune", lambda visitor: visitor in router.back_off.get(news, ()))
        _forwarder.set(ID(b"somebody"))
        for topics in ([news], [news, "/made/up"]):
            before = gossip._received.statistics().current_buffer_used
            gossip._is_subscribed_to_msg(rpc_pb2.Message(topicIDs=topics))
            taken.append(gossip._received.statistics().current_buffer_used > before)
        result = {"taken": taken, "garbage": router.counts.garbage, "made_up": sorted(made_up), "left": left}
        print(json.dumps(published | result), flush=True)
    await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    import trio

    trio.run(_main)
