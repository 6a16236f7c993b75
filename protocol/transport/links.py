"""Connections: dialled address by address, and dialled again when they drop.

py-libp2p's own dialling tries one TCP address per peer, ignores loopback when there is any other, and refuses for a
minute to dial a peer that has failed once. None of that suits a peer with several addresses that has just restarted.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.auto_connector import AutoConnector
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from . import ipc
from .limits import Limits
from .streams import PeerStream

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_MAX_ADDRS = 16
_UNKNOWN_PROTOCOL = "protocols not supported"  # py-libp2p has a type for it, and raises another with this text


class Unreachable(Exception):
    """No address of a peer answered."""


class UnknownProtocol(Unreachable):
    """The peer answered, and does not speak the protocol."""


def parse(addrs: Sequence[str]) -> tuple[str, list[Multiaddr]]:
    """Peer id and multiaddrs without it. Raises ValueError unless all of them name one and the same peer."""
    peer_id, bare = _parse(tuple(addrs[:_MAX_ADDRS]))
    return peer_id, list(bare)


@lru_cache(maxsize=512)
def _parse(addrs: tuple[str, ...]) -> tuple[str, tuple[Multiaddr, ...]]:
    """Takes 0.1 ms for one address, and every call asks."""
    if not addrs:
        raise ValueError("no address given")
    peers, bare = set(), []
    for text in addrs:
        try:
            addr = Multiaddr(text)
            peer = addr.value_for_protocol("p2p")
            ID.from_string(peer or "")
            bare.append(addr.decapsulate(Multiaddr(f"/p2p/{peer}")))
        except (MultiaddrError, BaseLibp2pError, ValueError, LookupError) as error:
            raise ValueError(f"{text!r} is not an address like /ip4/1.2.3.4/tcp/4000/p2p/12D3KooW...") from error
        peers.add(str(peer))
    if len(peers) != 1:
        raise ValueError(f"addresses of {len(peers)} different peers in one list")
    return peers.pop(), tuple(bare)


class NoConnector(AutoConnector):
    """In place of py-libp2p's own, which dials whoever it ever heard of, until half of `max_connections` are taken.

    Those are peers that have left, and those that we hung up on.
    """

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()

    def record_disconnect(self, peer_id: ID) -> None:
        pass  # only whoever dials has to know


class Links:
    """What we are connected to, and what we want to be connected to. Also py-libp2p's notifee."""

    def __init__(
        self, host: Any, limits: Limits, nursery: trio.Nursery, send: Callable[[ipc.Frame], Awaitable[None]]
    ) -> None:
        self._host = host
        self._swarm = host.get_network()
        self._limits = limits
        self._nursery = nursery
        self._send = send
        self._dialling: dict[str, trio.Lock] = {}  # of peers that somebody dials or waits to dial
        self._kept: dict[str, list[Multiaddr]] = {}
        self._staying: set[str] = set()  # whom a task keeps connected; it ends some time after they are forgotten
        self._changed: dict[str, trio.Event] = {}
        self._up: set[str] = set()
        self._swarm.register_notifee(self)

    def is_connected(self, peer_id: str) -> bool:
        return any(not connection.is_closed for connection in self._swarm.get_connections(ID.from_string(peer_id)))

    def keep(self, peer_id: str, addrs: list[Multiaddr]) -> None:
        """Stay connected to this peer from now on."""
        self._kept[peer_id] = addrs
        if peer_id not in self._staying:
            self._staying.add(peer_id)
            self._nursery.start_soon(self._stay_connected, peer_id)

    async def forget(self, peer_id: str) -> None:
        """Hang up, and stay so until somebody dials."""
        self._kept.pop(peer_id, None)
        self._wake(peer_id)
        await self._swarm.close_peer(ID.from_string(peer_id))

    async def dial(self, peer_id: str, addrs: list[Multiaddr]) -> None:
        """Connect unless connected. Raises Unreachable."""
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                await self._dial(peer_id, addrs)
        finally:
            if not lock.locked() and self._dialling.get(peer_id) is lock:  # it passes at once to who waits
                del self._dialling[peer_id]

    async def _dial(self, peer_id: str, addrs: list[Multiaddr]) -> None:
        if self.is_connected(peer_id):
            return
        causes = []
        for addr in addrs:
            try:
                with trio.fail_after(self._limits.dial_seconds):
                    await self._swarm.dial_addr(addr, ID.from_string(peer_id))
                return
            except trio.TooSlowError:
                causes.append(f"{addr}: no answer within {self._limits.dial_seconds:g} s")
            except BaseLibp2pError as error:
                causes.append(f"{addr}: {_root(error)}")
        raise Unreachable("; ".join(causes) or "no address")

    async def open(self, addrs: list[str], protocol: str) -> PeerStream:
        """A new stream to the peer at these addresses, dialled if need be.

        Raises:
            ValueError: the addresses are not those of one peer.
            UnknownProtocol: the peer does not speak the protocol. The connection stays.
            Unreachable
        """
        peer_id, bare = parse(addrs)
        for attempt in (1, 2):
            await self.dial(peer_id, bare)
            try:
                stream = await self._host.new_stream(ID.from_string(peer_id), [TProtocol(protocol)])
            except BaseLibp2pError as error:
                if _UNKNOWN_PROTOCOL in _root(error):
                    raise UnknownProtocol(f"{peer_id} does not speak {protocol}") from error
                if attempt == 2:
                    raise Unreachable(f"{peer_id} opens no stream: {error}") from error
                # An old connection may have died unnoticed: dial afresh, once.
                await self._swarm.close_peer(ID.from_string(peer_id))
            else:
                return PeerStream(stream, progress_seconds=self._limits.read_deadline_seconds)
        raise AssertionError("unreachable")

    async def _stay_connected(self, peer_id: str) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while peer_id in self._kept:
            if self.is_connected(peer_id):
                pause = _FIRST_PAUSE_SECONDS
                await self._changed.setdefault(peer_id, trio.Event()).wait()
                continue
            try:
                await self.dial(peer_id, self._kept[peer_id])
            except Unreachable as error:
                logger.info("cannot reach %s: %s", peer_id, error)
                with trio.move_on_after(pause * random.uniform(0.5, 1.0)):
                    await self._changed.setdefault(peer_id, trio.Event()).wait()
                pause = min(2 * pause, self._limits.redial_max_seconds)
        self._staying.discard(peer_id)
        self._changed.pop(peer_id, None)

    def _wake(self, peer_id: str) -> None:
        event = self._changed.pop(peer_id, None)
        if event is not None:
            event.set()

    # What py-libp2p calls.

    async def connected(self, _network: Any, connection: Any) -> None:
        peer_id = str(connection.muxed_conn.peer_id)
        if peer_id not in self._up:
            self._up.add(peer_id)
            await self._send(ipc.PeerUp(peer_id))
        self._wake(peer_id)

    async def disconnected(self, _network: Any, connection: Any) -> None:
        peer_id = str(connection.muxed_conn.peer_id)
        if peer_id in self._up and not self.is_connected(peer_id):
            self._up.discard(peer_id)
            await self._send(ipc.PeerDown(peer_id))
        self._wake(peer_id)
        self._forget_strangers()

    def _forget_strangers(self) -> None:
        """py-libp2p keeps addresses, keys and protocols of everybody who was ever connected."""
        store = self._host.get_peerstore()
        for peer in set(store.peer_ids()) - {self._host.get_id()}:
            if not self._swarm.get_connections(peer):
                store.clear_peerdata(peer)

    async def opened_stream(self, _network: Any, _stream: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def closed_stream(self, _network: Any, _stream: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, _network: Any, _addr: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def listen_close(self, _network: Any, _addr: Any) -> None:
        await trio.lowlevel.checkpoint()


def _root(error: BaseException) -> str:
    """The innermost cause, which is the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
