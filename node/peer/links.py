"""What every part of a peer needs to talk to the swarm: identity, directory, transport, and the peer's own state.

News are signed directory records and small messages that also travel by gossip, so that peers act on them in
milliseconds; the directory is where they last. Both ways end in `Directory.receive`: it never matters which is first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from ...protocol import messages
from ...protocol.averaging.rounds import quorum
from ...protocol.directory import standing
from ...protocol.directory.directory import Directory
from ...protocol.directory.records import RECORD_TYPES, PeerRecord, Record, VoteRecord, seal_record
from ...protocol.directory.view import View
from ...protocol.envelope import ENVELOPE_OVERHEAD, Envelope, open_sealed, seal
from ...protocol.errors import BadSignature, DirectoryError, PeerUnreachable, Refused, TransportError
from ...protocol.identity import Identity
from ...protocol.relay.shortcuts import Shortcuts
from ...protocol.transport.client import Transport
from ...protocol.transport.downloads import Download, Resource
from ..errors import IdentityInUse
from ..logs import get_logger
from ..run.manifest import Manifest
from ..watching.state import Count, PeerState, Phase

log = get_logger(__name__)

T = TypeVar("T")

NEWS_TOPIC = "news"  # signed records and small messages; the transport keeps runs apart
DELTA_TOPIC = "deltas"  # of stand-ins
COUNTS_TOPIC = "counts"  # of tokens by layer and expert: among composers, workers do not hear them
VIEW_SECONDS = 1.0  # a view may be this old: so long after its expiry a record may still be in it


class News:
    """Lets coroutines wait until something new has been heard."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.number = 0  # of changes so far

    def next_change(self) -> asyncio.Event:
        """Set at the next change after this call; take it before looking, so that none is missed."""
        return self._changed

    async def wait(self, change: asyncio.Event, seconds: float) -> bool:
        """Wait for a change taken by `next_change`. False if none came in time."""
        try:
            async with asyncio.timeout(seconds):  # wait_for of Python 3.11 swallows a cancellation that comes with news
                await change.wait()
        except TimeoutError:
            return False
        return True

    def changed(self) -> None:
        """Wake all who wait."""
        self.number += 1
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass
class Links:
    """Built once the directory and the transport are up, on the asyncio loop."""

    identity: Identity
    run_id: str
    manifest: Manifest
    directory: Directory
    transport: Transport
    state: PeerState
    clock: Callable[[], float]
    loop: asyncio.AbstractEventLoop
    record_seconds: float  # how long a record of ours lives without renewal
    news: News = field(default_factory=News)
    num_active: int = 0  # composers that take part in rounds, as of the last view; read by the training thread
    active_steps: Mapping[str, int] = field(default_factory=dict)  # the steps they say they are at; never changed
    shortcuts: Shortcuts | None = None  # past the relay that the invite names
    _view: View | None = None
    _view_number: int = -1
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _failure: BaseException | None = None

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def view(self) -> View:
        """The swarm as far as it is known here, without a network round trip; computed anew only after news."""
        now = self.clock()
        if self._view is None or self.news.number != self._view_number or abs(now - self._view.time) > VIEW_SECONDS:
            self._view_number = self.news.number
            self._view = self.directory.view()
            active = self.active_composers()
            self.num_active = len(active)
            self.active_steps = {peer: self._view.peers[peer].step for peer in active}
        return self._view

    def active_composers(self, *, waiting: bool = False) -> list[str]:
        """Composers that train or have finished and stay, or are only `waiting` to; includes this peer if it is one."""
        return standing.active_composers(self.view(), waiting=waiting)

    def quorum(self) -> int:
        """How many composers must agree for a state to be everybody's."""
        return quorum(standing.electorate(self.view()))

    def distrust(self, peer: str) -> None:
        """See a peer's leases no more."""
        self.directory.distrust([peer])
        self._view = None

    def votes(self, fragment: int) -> dict[str, VoteRecord]:
        """By voter, what composers hold of a fragment."""
        return standing.votes_of(self.view(), fragment)

    async def announce(self, record: Record) -> None:
        """Publish a record of ours: by gossip for those who are here, in the directory for all who come."""
        sealed = seal_record(self.identity, self.run_id, record)
        self.spawn(self._put(record))
        await self._publish(NEWS_TOPIC, "news", sealed)

    async def _put(self, record: Record) -> None:
        try:
            await self.directory.put(record)
        except DirectoryError as error:
            log.warning("directory.put_failed", record=record.kind, error=str(error))

    async def gossip(self, topic: str, message: messages.Message) -> None:
        """Tell everybody something, signed."""
        await self._publish(
            topic, message.kind, seal(self.identity, self.run_id, message.kind, messages.encode(message))
        )

    async def _publish(self, topic: str, kind: str, data: bytes) -> None:
        self.state.count(Count.BYTES, kind, "out", by=len(data))
        try:
            await self.transport.publish(topic, data)
        except TransportError as error:
            stopped = self.state.phase is Phase.STOPPED  # and the transport closed before what was said last
            (log.debug if stopped else log.warning)("gossip.publish_failed", topic=topic, error=str(error))

    def open(self, data: bytes) -> Envelope | None:
        """Check a gossiped envelope's signature. None, and counted, if it does not hold."""
        try:
            envelope = open_sealed(data, self.run_id, max_bytes=messages.MAX_GOSSIP_BYTES + ENVELOPE_OVERHEAD)
        except Refused as error:
            self.state.count(Count.REFUSALS, error.reason)
            return None
        except BadSignature:
            self.state.count(Count.REFUSALS, "forged")
            return None
        known = envelope.kind in messages.KINDS or envelope.kind in RECORD_TYPES
        self.state.count(Count.BYTES, envelope.kind if known else "other", "in", by=len(data))
        return envelope

    def spawn(self, work: Coroutine[Any, Any, None], *, vital: bool = False) -> None:
        """Run something beside the caller; an error that it does not handle itself is logged, not lost.

        Without `vital` work the peer cannot go on: `check` raises its error.
        """
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._finished, vital=vital))

    def _finished(self, task: asyncio.Task[None], *, vital: bool) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logging.getLogger(__name__).error("task.failed", exc_info=error)
            if vital:
                self._failure = error

    def check(self) -> None:
        """Raise the reason why this peer cannot go on, if there is one: failed vital work, a DHT or transport gone.

        Nor can it join where another peer with its key is: neither would know what the other has said in its name.
        """
        if self._failure is not None:
            raise self._failure
        if self.directory.refusals["identity-in-use"] and self.state.phase in (Phase.JOINING, Phase.SYNCING):
            raise self.double()
        self.directory.require_alive()
        if self.transport.fatal.is_set():
            raise TransportError(f"the transport keeps dying: {self.transport.fatal_reason}", fix="restart this peer")

    def double(self) -> IdentityInUse:
        """The error that another running peer has this one's key."""
        return IdentityInUse(
            f"another running peer has this one's key and name, {self.peer_id}: its data directory is a copy",
            fix="stop one of the two; to make it a peer of its own, delete identity.key in its data directory",
        )

    async def read_directory(self) -> None:
        """Look into the DHT; gossip may have missed something. A failure is logged: what is known here stays."""
        try:
            await self.directory.read()
        except DirectoryError as error:
            log.warning("directory.read_failed", error=str(error))
        self._view = None

    def addrs(self, peer_id: str) -> list[str]:
        """A peer's data-plane addresses, or PeerUnreachable if the directory does not know it."""
        record = self.view().peers.get(peer_id)
        if record is None or not record.transport_addrs:
            raise PeerUnreachable(f"peer {peer_id} is not in the directory")
        return self.dialled(record)

    def dialled(self, record: PeerRecord) -> list[str]:
        """Where the transport dials a peer: what it says, or shortcuts to there."""
        addresses = list(record.transport_addrs)
        return addresses if self.shortcuts is None else self.shortcuts.addresses(addresses)

    async def while_here(self, peer_id: str, work: Coroutine[Any, Any, T]) -> T:
        """What `work` with a peer returns. PeerUnreachable, and it is cancelled, once the peer's record has run out.

        For fetches that others depend on: who broke off in the middle of a large one is waited for as long as its
        bytes would allow, which may be many leases.
        """
        task = self.loop.create_task(work)
        try:
            while not task.done():
                if peer_id not in self.view().peers:
                    raise PeerUnreachable(f"peer {peer_id} has gone")
                await asyncio.wait({task}, timeout=VIEW_SECONDS)
            return task.result()
        finally:
            task.cancel()

    async def fetch(
        self,
        peer_id: str,
        resource: str,
        *,
        max_bytes: int,
        deadline_seconds: float,
        progress: Callable[[int, int], None] | None = None,
        begun: Download | None = None,
    ) -> Resource:
        """Fetch a resource from a peer by its id. FetchFailed or PeerUnreachable say why not; `begun` as there."""
        resource_kind = resource.split("/")[0]
        got = await self.transport.fetch(
            self.addrs(peer_id),
            resource,
            deadline_seconds=deadline_seconds,
            max_bytes=max_bytes,
            progress=progress,
            begun=begun,
        )
        self.state.count(Count.BYTES, resource_kind, "in", by=len(got.data))
        return got
