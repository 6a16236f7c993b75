"""The py-libp2p host process: `python -m shoal.protocol.transport.host FD`, FD being its end of the IPC socket pair.

It runs in an interpreter of its own because py-libp2p and hivemind cannot share one (both register the protobuf package
`crypto.pb`), and so that Noise and Yamux, pure Python, never hold the trainer's interpreter lock. It lives as long as
the trainer does: it exits when the IPC channel ends, and, should a forked child of the trainer hold that channel open,
when its parent has changed.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.exceptions import SwarmException
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from ..errors import ShoalError
from ..identity import Identity
from ..pacing import Pace, Rates
from . import call_wire, ipc, wire
from .calling import Caller
from .channel import Channel, TrainerGone
from .fetching import Fetcher
from .gossip import Gossip, Router
from .inbox import GossipCounts
from .links import Links, NoConnector, Unreachable, parse
from .muxing import Muxing
from .receiving import Receiver
from .serving import Server
from .sockets import WatchedTCP, port_is_free

logger = logging.getLogger(__name__)

_PARENT_POLL_SECONDS = 0.5
_REPORT_SECONDS = 1.0
_DRAIN_SECONDS = 2.0
_MAX_STREAMS = 4096


class StartFailed(ShoalError):
    """The host cannot listen."""


class Host:
    """One run of the host: what each command does."""

    def __init__(self, channel: Channel, start: ipc.Start, libp2p_host: Any, nursery: trio.Nursery) -> None:
        limits = start.limits
        self._channel = channel
        self._nursery = nursery
        self._host = libp2p_host
        self.router = Router(GossipCounts())
        self.gossip = Gossip(libp2p_host, self.router, start.run_id, limits)
        self._links = Links(libp2p_host, limits, nursery, channel.send)
        self._server = Server(channel, start.run_id, limits, nursery)
        self._fetcher = Fetcher(self._links, channel, start.run_id, limits, nursery)
        self._receiver = Receiver(channel, start.run_id, limits, nursery)
        self._caller = Caller(self._links, channel, start.run_id, limits, nursery)
        self._publish, self._to_publish = trio.open_memory_channel[ipc.Publish](limits.publish_window)
        libp2p_host.set_stream_handler(TProtocol(wire.PROTOCOL), self._server.handle)
        libp2p_host.set_stream_handler(TProtocol(call_wire.PROTOCOL), self._receiver.handle)
        self._isolate_streams()
        self._let_go_of_connections()

    async def run(self, start: ipc.Start) -> None:
        """Answer commands until the trainer is gone or says Stop."""
        for topic in start.topics:
            await self._join(topic)
        for addrs in start.peers:
            self._links.keep(*parse(addrs))
        self._nursery.start_soon(self.gossip.handle_received)
        self._nursery.start_soon(self._publish_loop)
        self._nursery.start_soon(self._report_loop)
        async for command in self._channel.commands():
            if isinstance(command, ipc.Stop):
                with trio.move_on_after(_DRAIN_SECONDS):
                    await self.gossip.drained()
                return
            self._obey(command)

    def _obey(self, command: ipc.Command) -> None:
        """Never waits: the trainer's frames must keep flowing."""
        match command:
            case ipc.Connect():
                self._nursery.start_soon(self._connect, command)
            case ipc.Disconnect():
                self._nursery.start_soon(self._disconnect, command)
            case ipc.Publish():
                self._publish.send_nowait(command)  # the trainer keeps to the window
            case ipc.Subscribe():
                self._nursery.start_soon(self._subscribe, command)
            case ipc.GossipTaken(topic=topic):
                self.gossip.taken(topic)
            case ipc.FetchStart():
                self._nursery.start_soon(self._fetcher.run, command)
            case ipc.FetchCancel(id=id):
                self._nursery.start_soon(self._fetcher.cancel, id)
            case ipc.ServeOffer() | ipc.ServeRefuse():
                self._server.on_answer(command)
            case ipc.ServeChunk():
                self._server.on_chunk(command)
            case ipc.CallStart():
                self._nursery.start_soon(self._caller.run, command)
            case ipc.CallChunk():
                self._caller.on_chunk(command)
            case ipc.CallCancel(id=id):
                self._nursery.start_soon(self._caller.cancel, id)
            case ipc.CallAccept() | ipc.CallReply() | ipc.CallRefuse():
                self._receiver.on_answer(command)
            case _:
                raise AssertionError(f"unexpected {type(command).__name__}")

    async def _connect(self, command: ipc.Connect) -> None:
        try:
            peer_id, addrs = parse(command.addrs)
            await self._links.dial(peer_id, addrs)
        except (Unreachable, ValueError) as error:
            await self._channel.send(ipc.Done(command.id, str(error)))
        else:
            self._links.keep(peer_id, addrs)
            await self._channel.send(ipc.Done(command.id))

    async def _disconnect(self, command: ipc.Disconnect) -> None:
        await self._links.forget(command.peer_id)
        await self._channel.send(ipc.Done(command.id))

    async def _subscribe(self, command: ipc.Subscribe) -> None:
        await self._join(command.topic)
        await self._channel.send(ipc.Done(command.id))

    async def _join(self, topic: str) -> None:
        inbox = await self.gossip.join(topic)
        if inbox is not None:
            self._nursery.start_soon(inbox.deliver, self._channel.send)

    async def _publish_loop(self) -> None:
        async for command in self._to_publish:
            await self.gossip.send(command.topic, command.data)
            await self._channel.send(ipc.Done(command.id))

    async def _report_loop(self) -> None:
        while True:
            counts = self.gossip.counts
            await self._channel.send(
                ipc.Counters(
                    gossip_bytes_sent=counts.bytes_sent,
                    gossip_bytes_received=counts.bytes_received,
                    fetch_bytes_sent=self._server.bytes_sent,
                    fetch_bytes_received=self._fetcher.bytes_received,
                    gossip_dropped_in=counts.dropped_in,
                    gossip_dropped_out=counts.dropped_out,
                    garbage=counts.garbage + self._server.garbage + self._receiver.garbage,
                    refused_busy=self._server.refused_busy + self._receiver.refused_busy,
                    call_bytes_sent=self._caller.bytes_sent,
                    call_bytes_received=self._receiver.bytes_received,
                    calls_cut=self._receiver.cut,
                )
            )
            await trio.sleep(_REPORT_SECONDS)

    def _isolate_streams(self) -> None:
        """Let no exception of a stream handler reach the connection it came by."""
        swarm = self._host.get_network()
        inner = swarm.common_stream_handler

        async def handle(stream: Any) -> None:
            try:
                await inner(stream)
            except Exception as error:  # noqa: BLE001 - py-libp2p raises many kinds here, all about one stream
                logger.debug("stream from %s failed: %r", stream.muxed_conn.peer_id, error)
                await stream.reset()

        swarm.set_stream_handler(handle)

    def _let_go_of_connections(self) -> None:
        """Have the task of a connection that was accepted end with it.

        py-libp2p lets it wait for the host's end. It holds one of `max_connections` places, so that after as many
        connections, however short, nobody would get in any more.
        """
        swarm = self._host.get_network()
        inner = swarm.upgrade_inbound_raw_conn

        async def upgrade(raw: Any, address: Multiaddr) -> None:
            connection = await inner(raw, address)
            await connection.event_closed.wait()
            raise SwarmException("the connection has ended")

        swarm.upgrade_inbound_raw_conn = upgrade


async def main(descriptor: int) -> None:
    """Serve one trainer. Returns when told to stop; raises TrainerGone when it is gone."""
    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor))))
    commands = channel.commands()
    start = await anext(commands)
    assert isinstance(start, ipc.Start)
    threading.Thread(target=_die_with, args=(start.parent_pid,), daemon=True).start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.write_loop)
        try:
            identity = Identity.load(Path(start.identity_path))
            libp2p_host = _build(identity, start)
            listen = _listen_address(start.listen_host, start.listen_port)
            async with libp2p_host.run(listen_addrs=[listen]):
                addrs = [f"{addr}/p2p/{identity.peer_id}" for addr in libp2p_host.get_transport_addrs()]
                if not addrs:
                    raise StartFailed(f"cannot listen on {listen}", fix="choose an address of this machine")
                announced = libp2p_host.get_addrs()
                libp2p_host.get_addrs = lambda: announced  # parsed anew for every gossip message otherwise
                host = Host(channel, start, libp2p_host, nursery)
                async with (
                    background_trio_service(host.router),
                    background_trio_service(host.gossip),
                ):
                    await host.gossip.wait_until_ready()
                    await channel.send(ipc.Ready(str(libp2p_host.get_id()), addrs))
                    await host.run(start)
                    os._exit(0)  # the kernel closes everything, at once
        except ShoalError as error:
            await channel.send(ipc.Failed(error.cause, error.fix))
            await trio.sleep(_DRAIN_SECONDS)  # the trainer hangs up first
            os._exit(1)


def _build(identity: Identity, start: ipc.Start) -> Any:
    limits = start.limits
    folder = Path(start.pace_folder) if start.pace_folder else None
    pace = Pace(folder, Rates(start.rate_up, start.rate_down))
    negotiate_seconds = int(limits.dial_seconds) or 1
    host = new_host(
        key_pair=create_new_key_pair(identity.seed),
        transports=[WatchedTCP(pace)],
        muxer_preference="YAMUX",
        disable_identify_address_discovery=True,  # peers find each other through the directory
        negotiate_timeout=negotiate_seconds,
        connection_config=ConnectionConfig(
            max_connections=limits.max_connections,
            high_watermark=limits.max_connections,
            # As many are not accepted: places for whom we dial, however many strangers there are. py-libp2p's own
            # connector would look for peers until it has so many; links.py does that, which knows whom.
            low_watermark=limits.max_connections // 4,
            min_connections=limits.max_connections // 4,
        ),
        # Its circuit breaker and degradation answer a burst of refusals by refusing everybody.
        resource_manager=ResourceManager(
            # A connection takes two of its places while it is made.
            limits=ResourceLimits(max_connections=2 * limits.max_connections, max_streams=_MAX_STREAMS),
            enable_circuit_breaker=False,
            enable_graceful_degradation=False,
            enable_memory_limits=False,
            enable_rate_limiting=False,
        ),
    )
    swarm: Any = host.get_network()
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.auto_connector = NoConnector(swarm)
    swarm.upgrader.muxer_multistream = Muxing(negotiate_seconds=negotiate_seconds)
    assert str(host.get_id()) == identity.peer_id
    return host


def _listen_address(host: str, port: int) -> Multiaddr:
    if port and not port_is_free(host, port):
        raise StartFailed(f"port {port} on {host} is taken", fix="choose another port, or 0 for any")
    return Multiaddr(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")


def _die_with(parent_pid: int) -> None:
    """A thread, so that it works even when the event loop does not."""
    while os.getppid() == parent_pid:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def _run() -> NoReturn:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    # It warns of each peer that has left, in up to seven lines; who wanted something of that peer is told what failed.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    try:
        trio.run(main, int(sys.argv[1]))
    except BaseExceptionGroup as group:
        if group.split(TrainerGone)[1] is not None:
            raise
    except TrainerGone:
        pass
    os._exit(0)


if __name__ == "__main__":
    _run()
