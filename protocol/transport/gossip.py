"""Gossipsub that loses nothing silently: py-libp2p's router with its limits replaced by counted, bounded queues.

What py-libp2p 0.8.1 does that a training swarm cannot live with, and what stands here instead:

- ten messages per second, topic and peer, then loss: the rate limit is off (our queues bound a neighbour's flood);
- 32 messages per subscription and per neighbour, then loss: queues bounded in messages and bytes, drops counted;
- `publish` returns at once however full the queues are: it waits for the neighbours, for a second at most;
- sequence numbers start at the clock in seconds, so a host restarted after a burst repeats numbers and its messages
  pass for duplicates: they start at nanoseconds;
- replayed messages are written into a stream that another task is writing to: one writer at a time;
- every received message gets a task, and trio runs tasks in random order: one task handles them in order of arrival
  (two paths through the mesh can still overtake each other);
- a message with a malformed key raises inside a service task and ends the whole service: caught and counted;
- whole messages are kept to detect equivocation (up to 900 MB of ours): off, as duplicates are told by id anyway;
- the time of every message is kept for ever, for adaptive gossip, which is off: nothing is kept;
- a message may name any number of topics, of which notes are kept for ever: one that names several is dropped;
- so may a GRAFT or PRUNE, and every heartbeat looks through those notes: topics that are not ours are passed over;
- who grafts and does not listen stays in the mesh when it has left: forgotten then, as is what it pruned.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, PROTOCOL_ID_V12, GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import PriorityQueue, RpcQueue

from .inbox import GossipCounts, Inbox
from .limits import Limits

logger = logging.getLogger(__name__)

_forwarder: ContextVar[ID] = ContextVar("forwarder")  # the neighbour whose stream a task reads

HEARTBEAT_SECONDS = 1
_DEGREE, _DEGREE_LOW, _DEGREE_HIGH = 6, 4, 12
_BACK_OFF_SECONDS = 5  # after a PRUNE; the default minute keeps a small mesh broken for a minute
_PUBLISH_WAIT_SECONDS = 1.0  # for slow neighbours; then the message is dropped for them
_PUBLISH_POLL_SECONDS = 0.005
_READ_BYTES = 65_536
_IDONTWANT_FROM_BYTES = 16_384  # telling the mesh costs about 500 bytes per neighbour


class ByteBoundedQueue(PriorityQueue):
    """Outgoing RPCs for one neighbour, bounded in bytes too."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits.peer_queue_messages)
        self._max_bytes = limits.peer_queue_bytes
        self.bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether a publisher should go on: half full leaves room for what we forward for others."""
        return len(self) * 2 < self.max_size and self.bytes * 2 < self._max_bytes

    def push(self, rpc: Any, priority: bool = False) -> bool:
        if self.bytes + rpc.ByteSize() > self._max_bytes or not super().push(rpc, priority):
            return False
        self.bytes += rpc.ByteSize()
        return True

    def pop(self) -> Any:
        rpc = super().pop()
        if rpc is not None:
            self.bytes -= rpc.ByteSize()
        return rpc


class _NeighbourQueues(dict[ID, RpcQueue]):
    """py-libp2p makes its own 32-message queue for every neighbour; exchange it the moment it is registered."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def __setitem__(self, peer: ID, queue: RpcQueue) -> None:
        queue._queue = ByteBoundedQueue(self._limits)
        super().__setitem__(peer, queue)

    @property
    def have_room(self) -> bool:
        return all(queue._queue.has_room for queue in self.values() if isinstance(queue._queue, ByteBoundedQueue))


class _CountedStream:
    """A pubsub stream, buffered and counted.

    py-libp2p reads a length prefix byte by byte, and Yamux answers every read with a window update: unbuffered, a small
    message costs three packets in the other direction.
    """

    def __init__(self, stream: Any, counts: GossipCounts) -> None:
        self._stream = stream
        self._counts = counts
        self._buffer = b""
        self._start = 0

    async def read(self, n: int) -> bytes:
        if self._start == len(self._buffer):
            self._buffer, self._start = await self._stream.read(_READ_BYTES), 0
            self._counts.bytes_received += len(self._buffer)
        data = self._buffer[self._start : self._start + n]
        self._start += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Router(GossipSub):
    """GossipSub without rate limits; drops are counted."""

    def __init__(self, counts: GossipCounts) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V12, PROTOCOL_ID_V11],
            degree=_DEGREE,
            degree_low=_DEGREE_LOW,
            degree_high=_DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_SECONDS,
            prune_back_off=_BACK_OFF_SECONDS,
            unsubscribe_back_off=_BACK_OFF_SECONDS,
            max_idontwant_messages=1024,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,  # wants three IP addresses in every mesh; a home swarm may have one
            max_pending_messages_per_peer=8,  # for neighbours that have not said what they subscribe to
        )
        self.counts = counts
        nothing = partial(deque[float], maxlen=0)
        self.recent_message_deliveries: Any = defaultdict(nothing)

    def _check_equivocation(self, msg: Any) -> bool:
        return True

    def _handle_dropped_rpc(self, peer_id: ID, rpc: Any, reason: str) -> None:
        self.counts.dropped_out += len(rpc.publish)
        super()._handle_dropped_rpc(peer_id, rpc, reason)

    def _prune_pending_messages(self, peer_id: ID) -> None:
        queue = self._pending_messages.get(peer_id)
        if queue is not None:  # without a warning each time: not every peer wants every topic
            del queue[: -self._max_pending_messages_per_peer]
        super()._prune_pending_messages(peer_id)

    async def handle_graft(self, graft_msg: Any, sender_peer_id: ID) -> None:
        if graft_msg.topicID in self.mesh:
            await super().handle_graft(graft_msg, sender_peer_id)

    async def handle_prune(self, prune_msg: Any, sender_peer_id: ID) -> None:
        if prune_msg.topicID in self.mesh:
            await super().handle_prune(prune_msg, sender_peer_id)

    def remove_peer(self, peer_id: ID) -> None:
        super().remove_peer(peer_id)
        for peers in self.back_off.values():
            peers.pop(peer_id, None)

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Any) -> None:
        message = self.mcache.get(msg_id)
        if message is not None and len(message.data) >= _IDONTWANT_FROM_BYTES:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)


class Gossip(Pubsub):
    """Publish and subscribe for one run; topics are prefixed with its id, signatures are strict."""

    def __init__(self, host: Any, router: Router, run_id: str, limits: Limits) -> None:
        super().__init__(host, router, strict_signing=True)
        self.counts = router.counts
        self.counter = time.time_ns()
        self._queues = _NeighbourQueues(limits)
        self.peer_queues = self._queues
        self._limits = limits
        self._received, self._to_handle = trio.open_memory_channel[tuple[ID, Any]](limits.gossip_queue_messages)
        self._prefix = f"/shoal/{run_id}/"
        self._inboxes: dict[str, Inbox] = {}
        self._write_locks: WeakKeyDictionary[Any, trio.Lock] = WeakKeyDictionary()

    async def join(self, topic: str) -> Inbox | None:
        """Subscribe. Returns the inbox to `deliver` from, or None if that runs already."""
        full = self._prefix + topic
        if full in self._inboxes:
            return None
        inbox = self._inboxes[full] = Inbox(topic, self._limits, self.counts)
        await self.subscribe(full)
        return inbox

    def taken(self, topic: str) -> None:
        """One message of the topic has been handled."""
        inbox = self._inboxes.get(self._prefix + topic)
        if inbox is not None:
            inbox.taken()

    async def send(self, topic: str, data: bytes) -> None:
        """Publish, once the neighbours' queues have room or a second has passed."""
        with trio.move_on_after(_PUBLISH_WAIT_SECONDS):
            while not self._queues.have_room:  # noqa: ASYNC110 - the queues are py-libp2p's: no event to wait on
                await trio.sleep(_PUBLISH_POLL_SECONDS)
        await self.publish(self._prefix + topic, data)

    async def drained(self) -> None:
        """Wait until nothing is queued for a neighbour."""
        while any(len(queue) for queue in self._queues.values()):  # noqa: ASYNC110 - as above
            await trio.sleep(_PUBLISH_POLL_SECONDS)

    # What py-libp2p calls.

    def notify_subscriptions(self, publish_message: Any) -> None:
        sender = ID(publish_message.from_id)
        if sender == self.my_id:
            return
        for topic in publish_message.topicIDs:
            if topic in self._inboxes:
                self._inboxes[topic].put(str(sender), publish_message.data)

    def _is_subscribed_to_msg(self, msg: Any) -> bool:
        """Asked once per received message, in order. Takes it over; the False keeps py-libp2p from giving it a task."""
        if len(msg.topicIDs) > 1:
            self.counts.garbage += 1
        elif super()._is_subscribed_to_msg(msg):
            try:
                self._received.send_nowait((_forwarder.get(), msg))
            except trio.WouldBlock:
                self.counts.dropped_in += 1
        return False

    async def handle_received(self) -> None:
        """Check, deliver and forward what was received. Runs forever."""
        async for forwarder, message in self._to_handle:
            await self.push_msg(forwarder, message)

    def _handle_dead_peer(self, peer_id: ID) -> None:
        super()._handle_dead_peer(peer_id)
        if not self._peer_is_connected(peer_id):  # py-libp2p leaves out those that speak and do not listen
            self.router.remove_peer(peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:  # noqa: BLE001 - whatever hostile bytes provoke must end with the message
            self.counts.garbage += 1
            logger.warning("bad gossip message from %s: %r", msg_forwarder, error)

    async def stream_handler(self, stream: Any) -> None:
        _forwarder.set(stream.muxed_conn.peer_id)
        try:
            await super().stream_handler(_CountedStream(stream, self.counts))  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - as above, with the stream
            self.counts.garbage += 1
            logger.warning("bad gossip stream from %s: %r", stream.muxed_conn.peer_id, error)
            await stream.reset()

    async def write_msg(self, stream: Any, rpc_msg: Any) -> bool:
        lock = self._write_locks.setdefault(stream, trio.Lock())
        async with lock:
            sent = await super().write_msg(stream, rpc_msg)
        if sent:
            self.counts.bytes_sent += rpc_msg.ByteSize()
        return sent
