"""The trainer's side of the data plane: gossip, verified, resumable fetches, and calls with a body.

    transport = await Transport.start(identity_path=path, run_id=run)
    transport.serve(handler)                          # answer other peers' fetches
    await transport.connect(addrs)                    # stays connected from now on
    await transport.subscribe("deltas", on_delta)
    await transport.publish("deltas", data)
    resource = await transport.fetch(addrs, "snapshot/3", deadline_seconds=60, max_bytes=10**8)
    transport.answer_calls(on_call)                   # answer other peers' calls
    reply = await transport.call(addrs, "sketches", body, deadline_seconds=60)

Gossip is best effort: whoever publishes numbers its messages and repairs gaps by a fetch. A message may come twice
across a restart of the host process. All methods belong to the event loop that `start` ran in.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType

import msgspec

from ..errors import PeerUnreachable, ShoalError
from ..identity import Identity
from ..pacing import UNLIMITED, Pace
from . import ipc
from .answering import Answerer, ServeHandler
from .calls import Calls
from .downloads import Download, Resource
from .fetches import Fetches
from .handling import CallAdmission, CallHandler, CallHandling
from .limits import MAX_PUBLISH_BYTES, Limits
from .process import HostLost, HostProcess
from .supervisor import Supervisor

logger = logging.getLogger(__name__)

GossipHandler = Callable[[str, bytes], Awaitable[None] | None]
_Messages = asyncio.Queue[tuple[HostProcess, ipc.Gossip]]


class Transport:
    """One peer's data plane. Made by `start`, ended by `close`.

    Attributes:
        peer_id: the identity file's peer id.
        counters: bytes and drops since `start`, summed over host processes; a second old at most.
    """

    def __init__(self, peer_id: str, start: ipc.Start, clock: Callable[[], float]) -> None:
        self.peer_id = peer_id
        self._ids = count(1)
        self._replies: dict[int, asyncio.Future[str]] = {}
        self._answerer = Answerer(start.limits)
        self._handling = CallHandling(start.limits)
        self._topics: dict[str, _Messages] = {}
        self._peers: dict[str, list[str]] = {}  # connect()'s, by peer id: a new host dials them again
        self._connected: set[str] = set()
        self._past = ipc.Counters()  # of host processes that have ended
        self._present = ipc.Counters()
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing = asyncio.Semaphore(start.limits.publish_window)
        self._supervisor = Supervisor(start, renew=self._renew, handle=self._handle, lost=self._host_lost, clock=clock)
        self._fetches = Fetches(self._supervisor, start.limits, self._ids)
        self._calls = Calls(self._supervisor, start.limits, self._ids)

    @classmethod
    async def start(
        cls,
        *,
        identity_path: Path,
        run_id: str,
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        limits: Limits | None = None,
        pace: Pace = UNLIMITED,
        clock: Callable[[], float] = time.monotonic,
    ) -> Transport:
        """Spawn the host process and wait until it listens.

        Args:
            identity_path: the peer's key; created if missing.
            run_id: topics and resources of other runs are invisible.
            listen_port: 0 picks one, which stays the same across restarts of the host process.
            pace: what all connections together may use.
            clock: monotonic seconds; decides whether failures are close together.

        Raises:
            TransportError: the host cannot listen; `fix` says what to do.
            IdentityError: the identity file is unusable.
        """
        identity = Identity.load_or_create(identity_path)
        order = ipc.Start(
            identity_path=str(identity_path),
            run_id=run_id,
            listen_host=listen_host,
            listen_port=listen_port,
            limits=limits or Limits(),
            parent_pid=os.getpid(),
            peers=[],
            topics=[],
            pace_folder="" if pace.folder is None else str(pace.folder),
            rate_up=pace.rates.up,
            rate_down=pace.rates.down,
        )
        self = cls(identity.peer_id, order, clock)
        ready = await self._supervisor.start()
        assert ready.peer_id == identity.peer_id
        return self

    async def close(self) -> None:
        """Send what is queued, end the host process, fail whatever still waits with TransportError. Idempotent."""
        await self._supervisor.close()
        self._host_lost("the transport was closed")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def addrs(self) -> list[str]:
        """Where this peer listens: multiaddrs with /p2p/<peer id>."""
        assert self._supervisor.ready is not None
        return list(self._supervisor.ready.addrs)

    @property
    def restarts(self) -> int:
        """How often the host process was replaced."""
        return self._supervisor.restarts

    @property
    def on_restart(self) -> list[Callable[[], None]]:
        """Called after every restart of the host process. Append to it."""
        return self._supervisor.on_restart

    @property
    def fatal(self) -> asyncio.Event:
        """Set when the host process keeps dying; `fatal_reason` says why, and every call raises TransportError."""
        return self._supervisor.fatal

    @property
    def fatal_reason(self) -> str:
        return self._supervisor.reason if self.fatal.is_set() else ""

    @property
    def host_pid(self) -> int | None:
        """Process id of the host; None while there is none."""
        return self._supervisor.pid

    @property
    def counters(self) -> ipc.Counters:
        return self._past + self._present

    def connected_peers(self) -> set[str]:
        """Peers with an open connection, whoever dialled."""
        return set(self._connected)

    # --- peers ------------------------------------------------------------------------------------------------

    async def connect(self, addrs: Sequence[str]) -> None:
        """Connect to one peer by any of its addresses, and stay connected: a lost connection is dialled again.

        Raises:
            PeerUnreachable: no address answered as that peer. It is not dialled again.
            TransportError: there is no host process any more.
        """
        error = await self._ask(lambda id: ipc.Connect(id, list(addrs)))
        if error:
            raise PeerUnreachable(
                f"cannot connect: {error}",
                fix="check that the peer runs, that its address is current and that no firewall blocks the port",
            )
        self._peers[addrs[0].rsplit("/p2p/", 1)[1]] = list(addrs)

    async def disconnect(self, peer_id: str) -> None:
        """Hang up and dial no more. Raises TransportError."""
        self._peers.pop(peer_id, None)
        await self._ask(lambda id: ipc.Disconnect(id, peer_id))

    # --- gossip -----------------------------------------------------------------------------------------------

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to everybody who subscribes to the topic; returns when the neighbours' queues have taken it.

        Raises:
            ValueError: more than MAX_PUBLISH_BYTES.
            TransportError: there is no host process any more.
        """
        if len(data) > MAX_PUBLISH_BYTES:
            raise ValueError(f"{len(data)} bytes do not fit a gossip message of at most {MAX_PUBLISH_BYTES}: cut them")
        async with self._publishing:
            await self._ask(lambda id: ipc.Publish(id, topic, data))

    async def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Call `handler(peer id of the publisher, data)` for every message, one at a time, in order of arrival.

        While the handler is slow, messages wait in the host process, where the oldest are dropped and counted
        (`counters.gossip_dropped_in`). A handler that raises loses that message only.

        Raises:
            ValueError: the topic has a handler already.
            TransportError: there is no host process any more.
        """
        if topic in self._topics:
            raise ValueError(f"there is a handler for {topic!r} already")
        queue = self._topics[topic] = asyncio.Queue()  # bounded by Limits.gossip_window
        self._spawn(self._handle_gossip(queue, handler))
        await self._ask(lambda id: ipc.Subscribe(id, topic))

    # --- fetch ------------------------------------------------------------------------------------------------

    def serve(self, handler: ServeHandler) -> None:
        """Answer fetches: return the resource, or None when there is none by that name.

        To refuse, raise errors.Refused: the peer is told `busy`. Admission to streams is `Limits`' business.
        """
        self._answerer.handler = handler

    async def fetch(
        self,
        addrs: Sequence[str],
        resource: str,
        *,
        deadline_seconds: float,
        max_bytes: int,
        progress: Callable[[int, int], None] | None = None,
        begun: Download | None = None,
    ) -> Resource:
        """Fetch a whole resource from one peer and check its sha256.

        A cut stream, a restart of the peer or of our own host process are resumed from the last byte received, until
        the deadline; if the resource has changed meanwhile, from the start.

        Args:
            deadline_seconds: for everything, including waiting for a turn, at `Limits.min_fetch_bytes_per_second` or
                less; every byte that comes allows as much more as it would take at that rate.
            max_bytes: a larger resource is refused before a byte of it is read.
            progress: called with (bytes received, bytes in all).
            begun: keeps what came if this fails; given to the next fetch of the same bytes, from this peer or
                another one, it is gone on from there. A peer that goes away is then not waited for.

        Raises:
            FetchEnded: with `reason` one of wire.Reason; nothing of the resource is kept but in `begun`.
            TransportError: there is no host process any more.
            ValueError: the resource's name is empty or too long.
        """
        return await self._fetches.fetch(
            addrs, resource, deadline_seconds=deadline_seconds, max_bytes=max_bytes, progress=progress, begun=begun
        )

    # --- calls ------------------------------------------------------------------------------------------------

    def answer_calls(self, handler: CallHandler, *, admit: CallAdmission | None = None) -> None:
        """Answer calls: `handler(peer id of the caller, name, body)` returns the reply's body.

        To refuse, raise errors.Refused: the caller gets it with that reason. Bodies are bounded, and checked against
        their sha256, before the handler sees them; a call holds its place (`Limits`) until the handler has returned.

        Args:
            admit: called with (peer id, name, size of the body) before a byte of the body is read; may raise Refused.
        """
        self._handling.handler, self._handling.admit = handler, admit

    async def call(self, addrs: Sequence[str], name: str, body: bytes, *, deadline_seconds: float) -> bytes:
        """Send one request with a body to one peer and return its reply. Nothing is repeated.

        Args:
            deadline_seconds: for everything, including waiting for a turn.

        Raises:
            Refused: the peer took no call by that name, or broke the protocol; `reason` is one of
                call_wire.CallReason or its handler's own.
            PeerUnreachable: no address answered, the call broke off or its time ran out. Unless it was the former, the
                peer may have handled the call all the same.
            TransportError: there is no host process any more.
            ValueError: the name is empty or too long, or the body over `Limits.max_call_bytes`.
        """
        return await self._calls.call(addrs, name, body, deadline_seconds=deadline_seconds)

    # --- the host process -------------------------------------------------------------------------------------

    async def _ask(self, make: Callable[[int], ipc.Frame]) -> str:
        """Send a command and return its error text; repeat it if the host dies before it has answered."""
        while True:
            host = await self._supervisor.host()
            id = next(self._ids)
            reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            self._replies[id] = reply
            try:
                host.send(make(id))
                await host.flush()
                return await reply
            except HostLost:
                continue
            finally:
                del self._replies[id]

    def _handle(self, host: HostProcess, frame: ipc.Event) -> None:
        """One frame from the host. Never waits."""
        match frame:
            case ipc.Done(id=id, error=error):
                if id in self._replies and not self._replies[id].done():
                    self._replies[id].set_result(error)
            case ipc.Gossip(topic=topic):
                self._topics[topic].put_nowait((host, frame))
            case ipc.FetchHeader() | ipc.FetchData() | ipc.FetchEnd():
                self._fetches.on_frame(frame)
            case ipc.ServeRequest():
                self._spawn(self._answerer.begin(host, frame))
            case ipc.ServePull():
                self._answerer.pull(host, frame)
            case ipc.ServeEnd():
                self._answerer.end(frame)
            case ipc.CallPull():
                self._calls.pull(host, frame)
            case ipc.CallEnd():
                self._calls.end(frame)
            case ipc.CallOpen():
                self._handling.begin(host, frame)
            case ipc.CallData():
                self._handling.add(frame)
            case ipc.CallWhole():
                self._spawn(self._handling.answer(host, frame))
            case ipc.CallCut():
                self._handling.cut(frame)
            case ipc.PeerUp(peer_id=peer_id):
                self._connected.add(peer_id)
            case ipc.PeerDown(peer_id=peer_id):
                self._connected.discard(peer_id)
            case ipc.Counters():
                self._present = frame
            case _:
                raise AssertionError(f"unexpected {type(frame).__name__}")

    def _host_lost(self, reason: str) -> None:
        self._past, self._present = self._past + self._present, ipc.Counters()
        self._connected.clear()
        self._answerer.clear()
        self._handling.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(HostLost())
        self._fetches.host_lost(reason)
        self._calls.host_lost()

    def _renew(self, start: ipc.Start) -> ipc.Start:
        return msgspec.structs.replace(start, peers=list(self._peers.values()), topics=list(self._topics))

    async def _handle_gossip(
        self, queue: asyncio.Queue[tuple[HostProcess, ipc.Gossip]], handler: GossipHandler
    ) -> None:
        while True:
            host, message = await queue.get()
            try:
                pending = handler(message.sender, message.data)
                if inspect.isawaitable(pending):
                    await pending
            except ShoalError as error:
                logger.info("refused a message on %s from %s: %s", message.topic, message.sender, error.cause)
            except Exception:  # a bug that one message provokes must not cost the others
                logger.exception("the handler of %s failed", message.topic)
            host.send(ipc.GossipTaken(message.topic))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a transport task failed", exc_info=task.exception())
