"""A peer's life: start the parts, join, catch up, train, drain, leave.

Threads and processes, in the order in which they start (what forks comes before what threads):

    main thread     starts everything, then is the training thread
    HTTP thread     metrics, health, status page
    DHT process     forked by hivemind; with it the Go daemon p2pd
    averagers       forked; outer rounds, and rounds of gradient sketches
    network thread  one asyncio loop: membership, ownership, exchange, rounds
    transport       spawned; the py-libp2p host

All children die with the main process, however it ends. SIGTERM, SIGINT or SIGHUP drains; a second one of the first two
leaves at once. Where a forked child ends by itself, so does the peer, and starts over in place (`reviving.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...protocol.addresses import Address, Reach
from ...protocol.directory.dht import start_dht, visible_addresses
from ...protocol.directory.directory import Directory
from ...protocol.identity import Identity
from ...protocol.imports import importing
from ...protocol.transport.client import Transport
from .. import logs
from ..config import PeerConfig
from ..ending import stop_signals
from ..errors import RunNotFound
from ..logs import get_logger
from ..run.asking import invite_of
from ..run.invite import Invite
from ..run.kept_manifests import asked_otherwise, founded_before, keep_manifest
from ..run.manifest import Manifest, Run, read_signed, sign
from ..slots.handle_key import fetch_key, kept_key
from ..storage.known_peers import KnownPeers
from ..storage.last_ports import keep_ports, with_last_ports
from ..storage.presence import announce_here, hold_data_dir
from ..storage.socket_folder import own_sockets
from ..watching.http import StatusServer
from ..watching.state import PeerState, Phase
from ..watching.status import print_invite
from .background import NetworkThread
from .links import Links
from .membership import Membership
from .reviving import HELPER_ENDED, StartOver
from .serving import Library
from .way_in import find_way_in
from .way_out import open_ways

if TYPE_CHECKING:
    import hivemind

    from .composing import ComposerPeer
    from .working import WorkerPeer

log = get_logger(__name__)

IDLE_SECONDS = 0.5
ALONE_SECONDS = 10.0  # a founder that comes back looks so long for the peers that it knew


def run_peer(config: PeerConfig, manifest_to_found: Manifest | None) -> int:
    """Run a peer until it is told to stop. Returns the exit code.

    Args:
        config: what this peer was told. Without an invite it founds `manifest_to_found`, or goes on with the run that
            it founded on this data directory before.

    Raises:
        ShoalError: it could not join; nothing is left running.
        StartOver: it has to be started again; nothing is left running.
    """
    config = with_last_ports(config)
    state = PeerState(config.role)
    with (
        hold_data_dir(config.data_dir),
        own_sockets(),
        StatusServer(state, host=config.http_host, port=config.http_port) as server,
        announce_here(config.data_dir, server.url),
        _stop_signals() as stop,
    ):
        try:
            return _Peer(config, state, server, stop).run(manifest_to_found)
        except BaseException as error:
            state.enter(Phase.FAILED, str(error))
            state.note_error(error)
            if isinstance(error, HELPER_ENDED) and not stop.requested:
                raise StartOver(error) from error
            raise


class StopRequest:
    """Set by the first SIGTERM or SIGINT, or SIGHUP of a terminal that is closed; another of the first two ends the
    process on the spot. A shell and its terminal may each send a SIGHUP."""

    def __init__(self) -> None:
        self.requested = False
        self.joined = False  # others know of this peer
        self.holds = False  # there is something to hand over; before that it ends on the spot

    def on_signal(self, number: int, _frame: object) -> None:
        if self.requested:
            if number == signal.SIGHUP:
                return
            os._exit(128 + number)
        self.requested = True
        if not self.holds:
            raise SystemExit(0 if self.joined else 128 + number)


@contextlib.contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    stop = StopRequest()
    before = {number: signal.signal(number, stop.on_signal) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Peer:
    def __init__(self, config: PeerConfig, state: PeerState, server: StatusServer, stop: StopRequest) -> None:
        self.config, self.state, self.server, self.stop = config, state, server, stop
        self.identity = Identity.load_or_create(config.identity_path)
        state.identify(peer_id=self.identity.peer_id)

    def run(self, manifest_to_found: Manifest | None) -> int:
        """Main thread: start the parts in their order, then do the role's work until told to stop."""
        config, state = self.config, self.state
        state.enter(Phase.JOINING, "reading the invite")
        founded = self._founded(manifest_to_found)
        invite = None
        if config.invite is not None:
            seconds = config.join_seconds
            invite = invite_of(config.invite, keep_in=config.data_dir, seconds=seconds, beat=state.beat)
        state.enter(Phase.JOINING, "starting the directory")
        if founded is not None:
            run_id = founded.run_id
        elif invite is not None:
            run_id = invite.run_id
        else:
            raise RunNotFound("neither an invite nor a run to found", fix="join with an invite, or found a run")
        self.known = KnownPeers(config.data_dir, run_id)
        self.way_in = find_way_in(config, self.identity, None if invite is None else invite.relay)
        self.relay = self.way_in.lends(config) or (None if invite is None else invite.relay)
        invited = [] if invite is None else invite.multiaddrs()
        dht = start_dht(
            config.identity_path,
            initial_peers=list(dict.fromkeys([*invited, *self.known.addresses()])),
            host=config.host,
            port=self.way_in.dht_port,
            announce=self.way_in.announce_dht,
            run_id=run_id,
            deadline_seconds=config.join_seconds if founded is None else min(ALONE_SECONDS, config.join_seconds),
            founder=founded is not None,
        )
        logs.adopt_third_parties()
        try:
            run = founded or self._fetch_manifest(dht, run_id, invited)
            state.identify(run_id=run.run_id)
            keep_manifest(config.data_dir, run.run_id, run.signed)
            state.enter(Phase.JOINING, "loading what its role takes")
            if config.role == "composer":
                with importing():
                    from .composing import ComposerPeer

                work: ComposerPeer | WorkerPeer | None = ComposerPeer(config, state, self.identity, run, dht)
            elif config.role == "worker":
                with importing():
                    from .working import WorkerPeer

                work = WorkerPeer(config, state, self.identity, run, dht)
            else:
                work = None
            network = NetworkThread()
            try:
                links, member, library = network.call(self._connect(dht, run))
                try:
                    self._show_invite(run, member)
                    self._find_key(run, network, links, library)
                    self.stop.joined = True
                    if work is not None:
                        return work.run(network, links, member, library, self.stop)
                    self.stop.holds = True
                    return self._idle(network, links, member)
                except SystemExit:
                    network.last(member.announce(Phase.LEAVING))
                    raise
                finally:
                    network.last(links.transport.close())  # its last news are sent by then
            finally:
                network.close()
        finally:
            dht.shutdown()

    def _find_key(self, run: Run, network: NetworkThread, links: Links, library: Library) -> None:
        """The handle key: composers need it, a founder has it, nobody else is given it."""
        digest = run.manifest.privacy.handle_key_digest
        if self.config.role == "composer":
            self.state.enter(Phase.JOINING, "fetching the handle key")
            path = self.config.data_dir / f"handle-{run.run_id}.key"
            key = network.call(fetch_key(links, [self.config.handle_key_path, path], seconds=self.config.join_seconds))
            library.handle_key = key
        elif self.config.role == "bootstrap":
            library.handle_key = kept_key([self.config.handle_key_path], digest)

    # -- joining ---------------------------------------------------------------------------------------------------

    def _founded(self, manifest: Manifest | None) -> Run | None:
        """The run to found, or the one that was founded on this data directory before."""
        if manifest is None:
            return None
        known = founded_before(self.config.data_dir, self.identity.peer_id, manifest.name)
        if known is not None:
            log.info("run.resumed", run_id=known.run_id)
            if otherwise := asked_otherwise(known.manifest, manifest):
                log.warning("run.not_changed", run_id=known.run_id, facts=", ".join(otherwise))
            return known
        return read_signed(sign(self.identity, manifest))

    def _fetch_manifest(self, dht: hivemind.DHT, run_id: str, invited: list[str]) -> Run:
        """Ask the DHT until the run's manifest comes; everything in it is checked before it is believed."""
        self.state.enter(Phase.JOINING, "fetching the manifest")

        async def ask() -> bytes:
            directory = Directory(dht, self.identity, run_id)
            deadline = time.monotonic() + self.config.join_seconds
            while time.monotonic() < deadline and not self.stop.requested:
                signed = await directory.manifest()
                if signed is not None:
                    return signed
                await asyncio.sleep(IDLE_SECONDS)
            if all(address.endswith(f"/p2p/{self.identity.peer_id}") for address in invited):
                raise RunNotFound(
                    f"the invite leads to this peer itself: the key that it names is in {self.config.data_dir}",
                    fix="if this peer founded the run, start it by `shoal found`; if not, give a --data-dir of its own",
                )
            raise RunNotFound(
                f"the peers at the invite's addresses do not know the run {run_id}",
                fix="check the invite; if the run is over or its peers are all gone, ask its founder for a new one",
            )

        return read_signed(asyncio.run(ask()), run_id)

    async def _connect(self, dht: hivemind.DHT, run: Run) -> tuple[Links, Membership, Library]:
        config = self.config
        self.state.enter(Phase.JOINING, "starting the transport")
        transport = await Transport.start(
            identity_path=config.identity_path,
            run_id=run.run_id,
            listen_host=config.host,
            listen_port=self.way_in.transport_port,
            pace=config.pace,
        )
        lease = run.manifest.ownership.lease_seconds
        links = Links(
            identity=self.identity,
            run_id=run.run_id,
            manifest=run.manifest,
            directory=Directory(dht, self.identity, run.run_id),
            transport=transport,
            state=self.state,
            clock=time.time,
            loop=asyncio.get_running_loop(),
            record_seconds=lease,
        )
        links.directory.remembered = self.known.peers
        await open_ways(config, links, self.way_in, self.relay)
        library = Library(links, run.signed)
        if config.role == "bootstrap" and run.manifest.model.start:
            from ..seed.joining import SeedAtHome

            library.seed = SeedAtHome(links, config.data_dir / "seed", config.join_seconds)
        transport.serve(library.answer)
        port = Address.parse(transport.addrs[0]).port
        dht_addrs = await asyncio.to_thread(visible_addresses, dht)
        listening = self.way_in.dht_port or Address.parse(dht_addrs[0]).port
        keep_ports(config.data_dir, dht_port=listening, transport_port=port, http_port=self.server.port)
        stated = run.manifest.model.experts
        num_slots, capacity = (0 if stated is None else stated.num_experts), 0
        if config.role in ("composer", "worker"):
            from ..capacity import capacity_of

            num_slots, capacity = capacity_of(config, run.manifest)
        self.state.identify(slots_total=num_slots, steps_total=run.manifest.train.steps)
        member = Membership(
            links,
            role=config.role,
            capacity=capacity,
            transport_addrs=self.way_in.transport_addresses(port, self.identity.peer_id),
            dht_addrs=dht_addrs,
            metrics_url=self.server.url,
            signed_manifest=run.signed,
            known=self.known,
        )
        await member.start()
        links.spawn(member.run(), vital=True)
        return links, member, library

    def _show_invite(self, run: Run, member: Membership) -> None:
        addresses = [Address.parse(addr) for addr in member.dht_addrs]
        hosts = self.way_in.hosts
        ports = {address.port for address in addresses}
        mine = [Address.of_host(host, port, self.identity.peer_id) for host in hosts for port in sorted(ports)]
        invite = Invite(addresses=tuple(mine[:2]), run_id=run.run_id, relay=self.relay)
        self.state.identify(invite=str(invite))
        print_invite(
            str(invite),
            http_url=self.server.url,
            only_this_machine=all(address.reach is Reach.THIS_MACHINE for address in mine),
        )

    # -- a bootstrap's or an observer's work ---------------------------------------------------------------------

    def _idle(self, network: NetworkThread, links: Links, member: Membership) -> int:
        self.state.enter(Phase.READY)
        while not self.stop.requested:
            self.state.beat()
            network.check()
            links.check()
            time.sleep(IDLE_SECONDS)
        self.state.enter(Phase.LEAVING)
        network.call(member.announce(Phase.LEAVING))
        self.state.enter(Phase.STOPPED)
        return 0
