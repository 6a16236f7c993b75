"""TCP for py-libp2p with dead peers noticed by the kernel.

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

_OPTIONS = (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPIDLE", 10),  # seconds of silence before the first probe
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 25_000),  # ms that sent bytes may stay unacknowledged
)


class WatchedTCP(TCP):
    """TCP transport whose sockets carry the options above (those the platform has)."""

    async def dial(self, maddr: Multiaddr) -> Any:
        connection: Any = await super().dial(maddr)
        _watch(connection.stream)
        return connection

    def create_listener(self, handler_function: Any) -> Any:
        async def watched(stream: Any) -> None:
            _watch(stream)
            await handler_function(stream)

        return super().create_listener(watched)


def _watch(stream: Any) -> None:
    inner: trio.SocketStream = stream.stream
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
