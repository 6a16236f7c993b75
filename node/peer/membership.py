"""Being a member of the swarm: announcing oneself, hearing of others, staying connected. The same for every role."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from ... import __version__
from ...protocol import messages
from ...protocol.directory.records import RECORD_TYPES, PeerRecord, Role
from ...protocol.directory.sight import sight_of
from ...protocol.errors import DirectoryError, PeerUnreachable, Refused, TransportError
from ...protocol.messages import Accusation, DeltaBatch, ExpertCounts, RoundOpen, SketchOpen
from ..logs import get_logger
from ..run.manifest import PROTOCOL_VERSION
from ..storage.known_peers import KnownPeers
from ..watching.clock_report import ClockReport
from ..watching.state import Count, PeerSeen, Phase
from .links import COUNTS_TOPIC, DELTA_TOPIC, NEWS_TOPIC, Links

log = get_logger(__name__)

MAX_NEIGHBOURS = 32  # connections that this peer keeps up by itself; gossip passes messages on to the others
MANIFEST_EVERY_SECONDS = 120.0  # any peer keeps the manifest alive in the DHT
RECONNECT_SECONDS = 5.0
DOUBLE_SECONDS = 60.0  # that somebody else has this peer's key is told so often
MEET_SECONDS = 5.0  # between looks for peers that the DHT has lost sight of


class Membership:
    """One peer's standing in the swarm. All on the asyncio loop.

    Args:
        capacity: slots this peer can own.
        transport_addrs, dht_addrs: where others reach it.
        known: takes down whom this peer meets.

    Attributes:
        on_deltas, on_counts, on_round_open, on_sketch_open, on_accusation: what to do with gossip of that type; each
            gets (sender, message). Where there is none the message is passed over.
        on_records: called when gossip brought the directory a record that it did not have.
    """

    def __init__(
        self,
        links: Links,
        *,
        role: Role,
        capacity: int,
        transport_addrs: list[str],
        dht_addrs: list[str],
        metrics_url: str,
        signed_manifest: bytes,
        known: KnownPeers,
    ) -> None:
        self._links = links
        self._role: Role = role
        self.capacity = capacity
        self._transport_addrs, self.dht_addrs = transport_addrs, dht_addrs
        self._metrics_url = metrics_url
        self._signed_manifest = signed_manifest
        self._known = known
        self._clock_report = ClockReport(links.directory.clocks, links.state)
        self._cut_off_since: float | None = None  # of the loop's clock
        self._doubles = 0  # records of another peer with our key, when that was last told
        self._doubles_told = -math.inf  # of the loop's clock
        self._dialling: set[str] = set()
        self._kept: set[str] = set()  # peers that the transport was told to stay connected to
        self.on_deltas: Callable[[str, DeltaBatch], None] | None = None
        self.on_counts: Callable[[str, ExpertCounts], None] | None = None
        self.on_round_open: Callable[[str, RoundOpen], None] | None = None
        self.on_sketch_open: Callable[[str, SketchOpen], None] | None = None
        self.on_accusation: Callable[[str, Accusation], None] | None = None
        self.on_records: Callable[[], None] | None = None

    async def start(self) -> None:
        """Listen to the run's gossip. Messages are routed from then on."""
        await self._links.transport.subscribe(NEWS_TOPIC, self._heard)
        if self._role != "worker":  # it needs no stand-ins, and is not to know layers
            await self._links.transport.subscribe(DELTA_TOPIC, self._heard)
            await self._links.transport.subscribe(COUNTS_TOPIC, self._heard)

    def _heard(self, _publisher: str, data: bytes) -> None:
        envelope = self._links.open(data)
        if envelope is None or envelope.sender == self._links.peer_id:
            return
        if envelope.kind in RECORD_TYPES:
            if self._links.directory.receive(data):
                self._links.news.changed()
                if self.on_records is not None:
                    self.on_records()
            return
        try:
            message = messages.decode_kind(envelope.kind, envelope.payload)
        except Refused as error:
            self._links.state.count(Count.REFUSALS, error.reason)
            return
        if isinstance(message, DeltaBatch) and self.on_deltas is not None:
            self.on_deltas(envelope.sender, message)
        elif isinstance(message, ExpertCounts) and self.on_counts is not None:
            self.on_counts(envelope.sender, message)
        elif isinstance(message, RoundOpen) and self.on_round_open is not None:
            self.on_round_open(envelope.sender, message)
        elif isinstance(message, SketchOpen) and self.on_sketch_open is not None:
            self.on_sketch_open(envelope.sender, message)
        elif isinstance(message, Accusation) and self.on_accusation is not None:
            self.on_accusation(envelope.sender, message)

    async def announce(self, phase: Phase | None = None) -> None:
        """Say how this peer is, now. `phase` overrides the state's, to say `leaving` before anything else does."""
        told = self._links.state.snapshot()
        now = self._links.clock()
        fidelity = [value for value in told["fidelity"].values() if value is not None]
        last = told["outer"]["last"]
        leaving = (phase or Phase(told["phase"])) is Phase.LEAVING
        await self._links.announce(
            PeerRecord(
                peer_id=self._links.peer_id,
                role=self._role,
                phase=str(phase or told["phase"]),
                capacity=0 if leaving else self.capacity,
                transport_addrs=self._transport_addrs,
                dht_addrs=self.dht_addrs,
                metrics_url=self._metrics_url,
                version=__version__,
                protocol_version=PROTOCOL_VERSION,
                step=told["step"],
                tokens=told["tokens"],
                tokens_per_second=told["tokens_per_second"] or 0.0,
                loss=told["loss"] or 0.0,
                slots=told["slots"]["owned"],
                round=max(0, last["round"]) if last else 0,
                fidelity=sum(fidelity) / len(fidelity) if fidelity else 0.0,
                issued_at=now,
                expires_at=now + self._links.record_seconds,
            )
        )
        self._links.news.changed()

    async def run(self) -> None:
        """Until the peer has stopped: announce, keep connections and the manifest up, show what is seen."""
        next_manifest, next_announcement, next_meeting = 0.0, 0.0, 0.0
        phase = None
        while self._links.state.phase is not Phase.STOPPED:  # that it leaves was told; nobody is there to tell more
            changed = self._links.news.next_change()
            now, interval = self._links.loop.time(), self._links.record_seconds / 5
            if self._links.state.phase != phase:
                phase = self._links.state.phase
                next_announcement = now + interval
                await self.announce()
                await self._links.read_directory()
            elif now >= next_announcement:
                next_announcement = now + interval
                await self._links.read_directory()  # first: our next record would hide one that a copy of us put there
                await self.announce()
            if now >= next_manifest:
                next_manifest = now + MANIFEST_EVERY_SECONDS
                self._links.spawn(self._keep_manifest())
            if now >= next_meeting:
                next_meeting = now + max(interval, MEET_SECONDS)
                self._links.spawn(self._meet_again())
                peers = self._links.view().peers
                self._known.meet({p: r.dht_addrs for p, r in peers.items() if p != self._links.peer_id})
            self._connect_to_strangers()
            self._look_round()
            self._tell_of_double()
            self._show()
            await self._links.news.wait(changed, min(1.0, interval))

    async def _meet_again(self) -> None:
        try:
            found = await self._links.directory.meet_again()
        except DirectoryError as error:
            log.warning("directory.meeting_failed", error=str(error))
            return
        if found:
            log.info("directory.met_again", peers=found)

    async def _keep_manifest(self) -> None:
        try:
            await self._links.directory.put_manifest(self._signed_manifest)
        except DirectoryError as error:
            log.warning("directory.put_failed", record="manifest", error=str(error))

    def _connect_to_strangers(self) -> None:
        connected = self._links.transport.connected_peers()
        peers = self._links.view().peers
        # By a clock that has jumped all records have run out, and those who could tell so must still be heard.
        if self._links.directory.clocks.right(self._links.record_seconds):
            for peer in self._kept - peers.keys():
                self._kept.discard(peer)
                self._links.spawn(self._hang_up(peer))
        for peer, record in peers.items():
            if len(connected) + len(self._dialling) >= MAX_NEIGHBOURS:
                return
            if peer == self._links.peer_id or peer in connected or peer in self._dialling:
                continue
            if record.transport_addrs and record.phase != Phase.LEAVING:  # or it has left, and cannot be dialled
                self._dialling.add(peer)
                self._links.spawn(self._dial(peer, self._links.dialled(record)))

    async def _dial(self, peer: str, addrs: list[str]) -> None:
        try:
            await self._links.transport.connect(addrs)
            self._kept.add(peer)
            log.info("peer.connected", peer=peer)
        except (PeerUnreachable, TransportError) as error:
            log.info("peer.unreachable", peer=peer, error=error.cause)
            await asyncio.sleep(RECONNECT_SECONDS)
        finally:
            self._dialling.discard(peer)

    async def _hang_up(self, peer: str) -> None:
        """A peer whose record has run out is not dialled any more; if it comes back, its record brings it back."""
        try:
            await self._links.transport.disconnect(peer)
        except TransportError as error:
            log.info("peer.not_disconnected", peer=peer, error=error.cause)

    def _look_round(self) -> None:
        """Tell a peer that is cut off from one whose others have left."""
        links = self._links
        sight = sight_of(links.view(), links.peer_id, links.transport.connected_peers())
        links.state.set_sight(sight)
        now = links.loop.time()
        if sight.cut_off and self._cut_off_since is None:
            self._cut_off_since = now
            links.state.count(Count.CUT_OFF)
            log.warning("swarm.cut_off", live=sight.live, silent=sight.silent)
        elif not sight.cut_off and self._cut_off_since is not None:
            log.info("swarm.in_sight", live=sight.live, silent=sight.silent, seconds=round(now - self._cut_off_since))
            self._cut_off_since = None

    def _tell_of_double(self) -> None:
        heard, now = self._links.directory.refusals["identity-in-use"], self._links.loop.time()
        if heard > self._doubles and now >= self._doubles_told + DOUBLE_SECONDS:
            self._doubles, self._doubles_told = heard, now
            error = self._links.double()
            self._links.state.note_error(error)
            log.error("identity.in_use", error=str(error))

    def _show(self) -> None:
        links = self._links
        links.state.set_peers(
            PeerSeen(
                peer_id=peer,
                role=r.role,
                phase=r.phase,
                version=r.version,
                step=r.step,
                tokens=r.tokens,
                tokens_per_second=r.tokens_per_second,
                loss=r.loss or None,
                fidelity=r.fidelity or None,
                slots=tuple(r.slots),
                round=r.round,
                metrics_url=r.metrics_url,
            )
            for peer, r in links.view().peers.items()
        )
        counters = links.transport.counters
        links.state.absorb("transport", Count.GOSSIP_DROPPED, {("in",): counters.gossip_dropped_in})
        links.state.absorb("transport", Count.TRANSPORT_RESTARTS, {(): links.transport.restarts})
        links.state.absorb("directory", Count.REFUSALS, {(r,): n for r, n in links.directory.refusals.items()})
        self._clock_report.tell(links.loop.time())
