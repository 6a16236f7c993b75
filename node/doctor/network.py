"""Checks against a run: can its peers be reached, can they reach this machine, do the clocks agree, how fast is it."""

from __future__ import annotations

import asyncio
import math
import socket
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ...protocol import resources
from ...protocol.directory.clocks import MAX_APART_SECONDS
from ...protocol.directory.dht import start_dht
from ...protocol.directory.directory import Directory
from ...protocol.directory.view import View
from ...protocol.errors import ShoalError
from ...protocol.identity import Identity
from ...protocol.relay.borrower import probe
from ...protocol.transport.client import Transport
from ..config import PeerConfig
from ..peer.way_in import free_port, interface_addresses
from ..run.asking import invite_of
from ..run.invite import Invite
from ..run.manifest import Manifest, verify
from ..storage.socket_folder import own_sockets
from .findings import Finding, fail, ok, warn

DIAL_SECONDS = 5.0
CLOCK_POLL = 0.3  # seconds between two looks
CLOSE_CLOCK = 1.0  # seconds apart that nobody minds
SLOW_LINK = 0.25e6  # bytes per second
SLOW_FETCH = 3.0  # seconds below which nothing is said about a link
FETCH_SECONDS = 30.0
FETCHED = 32 << 20  # at most


def network_checks(config: PeerConfig, invite_text: str) -> Iterator[Finding]:
    """Every one of them, as it is done; what a failure makes pointless is left out. Call it from the main thread."""
    try:
        invite = invite_of(invite_text)
    except ShoalError as error:
        yield Finding.of("invite", error)
        return
    yield ok("invite", f"leads to {invite.run_id}, good from {invite.reachable_from}")
    yield _addresses(invite)
    yield _way_in(config, invite)
    # A visitor of its own: the peer itself may be running.
    with TemporaryDirectory(prefix="shoal-doctor-") as folder, own_sockets():
        visitor = Path(folder) / "identity.key"
        identity = Identity.load_or_create(visitor)
        try:
            dht = start_dht(
                visitor,
                initial_peers=invite.multiaddrs(),
                host=config.host,
                port=0,
                announce=(),
                run_id=invite.run_id,
                client=True,
                deadline_seconds=min(20.0, config.join_seconds),
            )
        except ShoalError as error:
            yield Finding.of("directory", error)
            return
        try:
            yield from asyncio.run(_in_the_run(config, visitor, Directory(dht, identity, invite.run_id), invite))
        finally:
            dht.shutdown()


def _addresses(invite: Invite) -> Finding:
    """One that answers is enough for a peer."""
    answered, silent = [], []
    for address in invite.addresses:
        began = time.monotonic()
        try:
            socket.create_connection((address.host, address.port), DIAL_SECONDS).close()
        except OSError as error:
            silent.append(f"{address.host}:{address.port}: {error.strerror or error}")
        else:
            answered.append(f"{address.host}:{address.port} in {1e3 * (time.monotonic() - began):.0f} ms")
    if not answered:
        return fail("bootstrap", "; ".join(silent), "ask for a fresh invite; is this machine online?")
    if silent:
        return warn("bootstrap", f"answers: {', '.join(answered)}; silent: {'; '.join(silent)}", "one is enough")
    return ok("bootstrap", f"answers: {', '.join(answered)}")


def _way_in(config: PeerConfig, invite: Invite) -> Finding:
    """Whether others can dial this machine: its ports are opened for a moment, and the relay dials them."""
    if config.announce:
        return ok("way in", f"--announce says {', '.join(config.announce)}; that is believed")
    if invite.relay is None:
        fix = "behind a router, forward two ports and name them by --announce, or ask the founder to run with --relay"
        return warn("way in", "the run has no relay that could dial back, so it is not known", fix)
    try:
        ports = [port or free_port(config.host) for port in (config.dht_port, config.transport_port)]
        seen = asyncio.run(probe(invite.relay, config.host, ports))
    except ShoalError as error:
        return warn("way in", error.cause, "the relay is needed only by peers that nobody can dial")
    except OSError as error:
        fix = "if the peer itself runs, stop it first: its ports cannot be opened twice"
        return warn("way in", f"cannot listen: {error.strerror or error}", fix)
    if seen.address in interface_addresses():
        if seen.reachable:
            return ok("way in", f"no router in between: {seen.address} was dialled back")
        return warn("way in", f"{seen.address} is this machine's, and a firewall keeps it closed", _open(config))
    if seen.reachable:
        return ok("way in", f"behind a router that forwards: {seen.address} was dialled back, and is announced")
    return ok("way in", f"behind a router at {seen.address} that lets nobody in: the relay will carry what others send")


def _open(config: PeerConfig) -> str:
    fixed = " and ".join(str(port) for port in (config.dht_port, config.transport_port) if port)
    return f"open {fixed or 'two ports, fixed by --dht-port and --transport-port'}; until then the relay carries"


async def _in_the_run(config: PeerConfig, identity: Path, directory: Directory, invite: Invite) -> list[Finding]:
    try:
        signed = await directory.manifest()
        view = await directory.read()
    except ShoalError as error:
        return [Finding.of("directory", error)]
    if signed is None:
        fix = "ask its founder for a new invite: the peers at the invite's addresses do not know the run"
        return [fail("directory", f"nobody keeps {invite.run_id}", fix)]
    try:
        manifest = verify(signed, invite.run_id)
    except ShoalError as error:
        return [Finding.of("manifest", error)]
    roles = [record.role for record in view.peers.values()]
    count = {role: roles.count(role) for role in ("composer", "worker", "bootstrap")}
    steps = [record.step for record in view.peers.values() if record.role == "composer"]
    told = ", ".join(f"{number} {role}{'' if number == 1 else 's'}" for role, number in count.items())
    findings = [ok("run", f"{told}; step {max(steps, default=0)} of {manifest.train.steps}")]
    findings.append(await _clock(directory, manifest.ownership.lease_seconds))
    findings.append(await _speed(config, identity, view, manifest, invite.run_id))
    return findings


async def _clock(directory: Directory, lease: float) -> Finding:
    """By what peers sign while we look: they renew their records every fifth of a lease."""
    known = {peer: record.issued_at for peer, record in directory.view().peers.items()}
    offsets: dict[str, float] = {}
    deadline = time.monotonic() + lease
    while len(offsets) < len(known) and time.monotonic() < deadline:
        await asyncio.sleep(CLOCK_POLL)
        for peer, record in (await directory.read()).peers.items():
            if record.issued_at > known.get(peer, 0.0):  # signed since the last look
                known[peer] = record.issued_at
                offsets[peer] = max(offsets.get(peer, -math.inf), record.issued_at - time.time())
    if not offsets:
        return warn("clock", "no peer was heard", "try again in a minute")
    offset = statistics.median(offsets.values())
    said = f"{-offset:+.1f} s against the run's peers"
    if abs(offset) > MAX_APART_SECONDS:
        return fail("clock", said, "synchronise it: timedatectl set-ntp true")
    return ok("clock", said if abs(offset) > CLOSE_CLOCK else "agrees with the run's peers")


async def _speed(config: PeerConfig, identity: Path, view: View, manifest: Manifest, run_id: str) -> Finding:
    """By the largest thing that anybody may have: a fragment of the backbone, of whichever composer has one."""
    donors = [r for r in view.peers.values() if r.role == "composer" and r.transport_addrs]
    if not donors:
        return warn("streams", "no composer is there to fetch from", "try again when somebody trains")
    problem = ""
    async with await Transport.start(identity_path=identity, run_id=run_id, listen_host=config.host) as transport:
        for donor in donors:
            fetch = partial(transport.fetch, donor.transport_addrs, resources.backbone(0), max_bytes=FETCHED)
            try:
                await fetch(deadline_seconds=FETCH_SECONDS)  # dials, too
                began = time.monotonic()
                got = await fetch(deadline_seconds=FETCH_SECONDS)
            except ShoalError as error:
                problem = error.cause
                continue
            took = time.monotonic() - began
            said = f"{len(got.data) / 1e6:.1f} MB of {donor.peer_id[-8:]} in {took:.1f} s"
            if took > SLOW_FETCH and len(got.data) / took < SLOW_LINK:
                return warn("streams", said, f"rounds have {manifest.outer.timeout_seconds:g} s for as much")
            return ok("streams", said)
    return fail("streams", problem, "the composers' transport ports cannot be reached from here")
