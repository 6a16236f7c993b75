"""TCP for py-libp2p with dead peers noticed by the kernel, and no more bandwidth than the peer may use.

A peer that vanishes (laptop closed, NAT entry gone) sends no FIN, and neither Yamux nor py-libp2p asks whether it is
still there. Keep-alive probes find that out on an idle connection and TCP_USER_TIMEOUT on a busy one; both end in an
error on the socket, from which everything above recovers.
"""

from __future__ import annotations

import socket
from typing import Any

import trio
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from ..pacing import Pace
from .locks import QuickLock

_READ_BYTES = 4096  # at least. Not more: bytes that the pace holds back should not come in larger steps than asked for
_OPTIONS = (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPIDLE", 10),  # seconds of silence before the first probe
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 25_000),  # ms that sent bytes may stay unacknowledged
)


class WatchedTCP(TCP):
    """TCP transport whose sockets carry the options above (those the platform has), at no more than `pace`."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    async def dial(self, maddr: Multiaddr) -> Any:
        connection: Any = await super().dial(maddr)
        self._watch(connection.stream)
        return connection

    def create_listener(self, handler_function: Any) -> Any:
        async def watched(stream: Any) -> None:
            self._watch(stream)
            await handler_function(stream)

        return super().create_listener(watched)

    def _watch(self, stream: Any) -> None:
        _set_options(stream.stream)
        stream.read_lock, stream.write_lock = QuickLock(), QuickLock()
        stream.stream = _PacedStream(stream.stream, self._pace)


class _PacedStream:
    """What py-libp2p uses of a `trio.SocketStream`, with waits. It holds a lock in each direction: order stays.

    py-libp2p's Noise reads the two bytes of a message's length, then the message. A small one is one read here.
    """

    def __init__(self, inner: trio.SocketStream, pace: Pace) -> None:
        self._inner, self._pace = inner, pace
        self._ahead = memoryview(b"")  # read from the socket, and not asked for yet
        self.socket = inner.socket

    async def send_all(self, data: bytes) -> None:
        await _sleep(self._pace.up(len(data)))
        await self._inner.send_all(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(await self._inner.receive_some(max(_READ_BYTES, max_bytes or 0)))
            await _sleep(self._pace.down(len(self._ahead)))
        data = bytes(self._ahead[:max_bytes])
        self._ahead = self._ahead[len(data) :]
        return data

    async def aclose(self) -> None:
        self._ahead = memoryview(b"")  # a closed stream gives nothing more
        await self._inner.aclose()


async def _sleep(seconds: float) -> None:
    if seconds:
        await trio.sleep(seconds)


def _set_options(inner: trio.SocketStream) -> None:
    inner.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS:
        option = getattr(socket, name, None)
        if option is not None:
            inner.socket.setsockopt(socket.IPPROTO_TCP, option, value)


def port_is_free(host: str, port: int) -> bool:
    """Whether nobody listens on this port yet.

    py-libp2p listens with SO_REUSEPORT: a second host on the same port would start without an error and take half of
    the first one's connections. A bind without that option tells.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
