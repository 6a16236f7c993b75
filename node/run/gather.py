"""`shoal export`: joins a run as an onlooker, fetches the merged model from who holds it, writes a checkpoint.

The backbone is the state that a quorum voted for, checked against its digest; every expert comes from the owner that
the leases name. A run of one composer has no quorum and no votes: then that composer's own backbone is the run's.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ... import __version__
from ...protocol import messages, resources
from ...protocol.averaging.fragments import Fragment, unflatten
from ...protocol.averaging.merging import digest as digest_of
from ...protocol.directory.dht import start_dht
from ...protocol.directory.directory import Directory
from ...protocol.directory.records import PeerRecord
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused, ShoalError
from ...protocol.experts.handles import Handles
from ...protocol.identity import Identity
from ...protocol.transport.client import Transport
from ...protocol.transport.downloads import Download, FetchEnded
from ...protocol.transport.fetches import Turns
from ...protocol.transport.wire import Reason
from ..config import PeerConfig
from ..errors import RunNotFound
from ..logs import get_logger
from ..model.cut import backbone_fragments
from ..model.init import backbone_shapes, expert_shape
from ..peer.links import Links
from ..seed.joining import SeedAtHome
from ..seed.store import TOKENIZER
from ..slots.copies import READ_BYTES_PER_SECOND
from ..slots.handle_key import fetch_key
from ..storage.blobs import fragment_from_bytes, from_bytes
from ..storage.new_folder import new_folder
from ..storage.presence import hold_data_dir
from ..storage.socket_folder import own_sockets
from ..watching.state import PeerState
from .asking import invite_of
from .joining import newest
from .manifest import PROTOCOL_VERSION, Manifest, verify

log = get_logger(__name__)

T = TypeVar("T")

FIND_SECONDS = 60.0
FETCH_SECONDS = 120.0
ATTEMPTS = 4
BUSY_SECONDS = 120.0  # an owner serves few whole slots at a time, and others may read them
PAUSE_SECONDS = 1.0
PARALLEL = 4


class ExportFailed(ShoalError):
    """A part of the model could not be had from any peer."""

    code = "SHOAL-229"


@dataclass(frozen=True)
class Gathered:
    """A whole model: backbone by parameter name, and per slot the tensors `<layer>.gate_up` and `<layer>.down`.

    Private layers are in the backbone; layers that have slots are counted from 0."""

    manifest: Manifest
    backbone: dict[str, Tensor]
    slots: dict[int, dict[str, Tensor]]
    rounds: list[int]  # per fragment, the outer round that made it; -1 without one
    run_id: str
    peers: dict[str, PeerRecord]  # who is in the run
    tokenizer: bytes = b""  # tokenizer.json; empty: bytes are tokens


def export_run(invite: str, out: Path, config: PeerConfig) -> None:
    """Gather the run's model and write it as a Hugging Face checkpoint.

    Raises:
        ShoalError: `out` cannot be made, which is known before anything is fetched; the run cannot be reached, a part
            of it is nowhere to be had, or there is no room for it. `out` is not there then.
    """
    with new_folder(out) as folder:
        whole = gather(invite, config, lambda what: log.info("export.progress", what=what))
        _write(whole, folder)
    log.info("export.done", folder=str(out))


def _write(whole: Gathered, folder: Path) -> None:
    from ..learning.tokenizer import byte_tokenizer, read_tokenizer
    from ..model.export import write_checkpoint
    from .model_card import model_card

    shapes = backbone_shapes(whole.manifest.model)

    def expert_of(layer: int, slot: int) -> tuple[Tensor, Tensor]:
        return whole.slots[slot][f"{layer}.gate_up"], whole.slots[slot][f"{layer}.down"]

    length = whole.manifest.data.context_length
    config = whole.manifest.model.config
    tokenizer = read_tokenizer(whole.tokenizer, length, config) if whole.tokenizer else byte_tokenizer(length)
    card = model_card(whole.manifest, whole.run_id, whole.rounds, whole.peers)
    backbone = {name: tensor.view(shapes[name]) for name, tensor in whole.backbone.items()}
    try:
        write_checkpoint(folder, whole.manifest.model, backbone, expert_of, tokenizer=tokenizer, card=card)
    except ValueError as error:
        raise ExportFailed(f"what the run has learned is no model: {error}", fix=_SPOILT) from error


def gather(invite_text: str, config: PeerConfig, progress: Callable[[str], None]) -> Gathered:
    """Fetch the whole model of a run. Blocks; call it from the main thread."""
    invite = invite_of(invite_text)
    with hold_data_dir(config.data_dir), own_sockets():
        identity = Identity.load_or_create(config.identity_path)
        dht = start_dht(
            config.identity_path,
            initial_peers=invite.multiaddrs(),
            host=config.host,
            port=config.dht_port,
            announce=(),
            run_id=invite.run_id,
            client=True,
        )
        try:
            directory = Directory(dht, identity, invite.run_id)
            return asyncio.run(_gather(invite.run_id, config, identity, directory, progress))
        finally:
            dht.shutdown()


async def _gather(
    run_id: str, config: PeerConfig, identity: Identity, directory: Directory, progress: Callable[[str], None]
) -> Gathered:
    progress("finding the run")
    manifest = verify(await _manifest(directory, run_id), run_id)
    transport = await Transport.start(identity_path=config.identity_path, run_id=run_id, listen_host=config.host)
    async with transport:
        links = Links(
            identity=identity,
            run_id=run_id,
            manifest=manifest,
            directory=directory,
            transport=transport,
            state=PeerState("observer"),
            clock=time.time,
            loop=asyncio.get_running_loop(),
            record_seconds=manifest.ownership.lease_seconds,
        )
        await _say_hello(links)
        key = await fetch_key(links, [config.data_dir / f"handle-{run_id}.key"], seconds=FIND_SECONDS)
        whole = await _fetch_all(links, Handles(key), progress)
        if manifest.data.tokenizer != "seed":
            return whole
        seed = SeedAtHome(links, config.data_dir / "seed", FIND_SECONDS)
        await seed.fetch_tokenizer()
        return replace(whole, tokenizer=seed.store.need(TOKENIZER))


async def _say_hello(links: Links) -> None:
    """The run's composers tell its handle key to peers that they see in the directory."""
    now = links.clock()
    record = PeerRecord(
        peer_id=links.peer_id,
        role="observer",
        phase="joining",
        capacity=0,
        transport_addrs=[],
        dht_addrs=[],
        metrics_url="",
        step=0,
        tokens=0,
        tokens_per_second=0.0,
        loss=0.0,
        slots=[],
        round=0,
        fidelity=0.0,
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        issued_at=now,
        expires_at=now + links.record_seconds,
    )
    await links.directory.put(record)


async def _manifest(directory: Directory, run_id: str) -> bytes:
    deadline = time.monotonic() + FIND_SECONDS
    while time.monotonic() < deadline:
        signed = await directory.manifest()
        if signed is not None:
            return signed
        await asyncio.sleep(PAUSE_SECONDS)
    raise RunNotFound(f"nobody at the invite's addresses knows {run_id}", fix="check the invite, or ask for a new one")


async def _fetch_all(links: Links, handles: Handles, progress: Callable[[str], None]) -> Gathered:
    manifest = links.manifest
    await links.directory.read()
    fragments = backbone_fragments(manifest)
    backbone: dict[str, Tensor] = {}
    rounds = []
    for fragment in fragments:
        progress(f"backbone fragment {fragment.index + 1} of {len(fragments)}")
        flat, number = await _retry(links, partial(_fragment, links, fragment, len(fragments)))
        backbone |= unflatten(fragment, flat)
        rounds.append(number)
    num_slots = expert_shape(manifest.model).num_experts
    gate, turns = asyncio.Semaphore(PARALLEL), Turns(1)  # at an owner, who may serve no more of large ones
    patience = BUSY_SECONDS + _slot_bytes(manifest) / READ_BYTES_PER_SECOND

    async def one(slot: int) -> tuple[int, dict[str, Tensor]]:
        async with gate:
            tensors = await _retry(links, partial(_slot, links, handles, slot, turns), patience)
            progress(f"slot {slot} of {num_slots}")
            return slot, tensors

    slots = dict(await asyncio.gather(*(one(slot) for slot in range(num_slots))))
    return Gathered(manifest, backbone, slots, rounds, links.run_id, dict(links.view().peers))


async def _retry(links: Links, fetch: Callable[[], Awaitable[T]], patience: float = BUSY_SECONDS) -> T:
    """A peer may leave or a round may be committed between two looks: look again. Who is busy is waited for."""
    attempt, until = 0, links.loop.time() + patience
    while True:
        try:
            return await fetch()
        except (FetchFailed, PeerUnreachable, Refused, ExportFailed) as error:
            busy = isinstance(error, FetchEnded) and error.reason is Reason.BUSY and links.loop.time() < until
            attempt = max(1, attempt) if busy else attempt + 1
            if attempt >= ATTEMPTS:
                raise ExportFailed(f"a part of the model cannot be had: {error.cause}", fix=_WAIT) from error
            await asyncio.sleep(PAUSE_SECONDS * attempt)
            await links.directory.read()
            links.news.changed()


_WAIT = "wait until the swarm has recovered (every slot owned, at least two composers or exactly one), then try again"
_SPOILT = "see whether the run's loss is still a number: if so try again later, else take an earlier export"


async def _fragment(links: Links, fragment: Fragment, parts: int) -> tuple[Tensor, int]:
    wanted, backers = newest(links, fragment.index, parts)
    limit = 8 * fragment.numel + 4096
    if wanted is None:
        composers = links.active_composers()
        if len(composers) != 1:
            raise ExportFailed(f"no quorum backs a state of backbone fragment {fragment.index} yet")
        got = await links.fetch(
            composers[0], resources.local(fragment.index), max_bytes=limit, deadline_seconds=FETCH_SECONDS
        )
        return fragment_from_bytes(got.data, fragment.numel)[0], -1
    problem, begun = "nobody backs it", Download()  # what one has sent of it the next one goes on with
    for peer in spread(backers, f"{links.peer_id}/{fragment.index}/{wanted.round}"):
        try:
            got = await links.fetch(
                peer, resources.backbone(fragment.index), max_bytes=limit, deadline_seconds=FETCH_SECONDS, begun=begun
            )
            begun.restart()
            flat, momentum = fragment_from_bytes(got.data, fragment.numel)
        except (FetchFailed, PeerUnreachable, Refused) as error:
            problem = f"{peer}: {error.cause}"
            continue
        if digest_of(flat, momentum) == wanted.digest:
            return flat, wanted.round
        problem = f"{peer} has another state by now"
    raise ExportFailed(f"backbone fragment {fragment.index}: {problem}")


def spread(backers: Collection[str], of: str) -> list[str]:
    """In the order to ask them in, another one for every `of`: no peer serves all who export, or every fragment."""
    return sorted(backers, key=lambda peer: hashlib.blake2b(f"{of}/{peer}".encode(), digest_size=16).digest())


def _slot_bytes(manifest: Manifest) -> int:
    """Weights of a slot as they travel are no larger."""
    shape = expert_shape(manifest.model)
    return 8 * 3 * shape.hidden * shape.width * shape.num_layers + (1 << 20)


async def _slot(links: Links, handles: Handles, slot: int, turns: Turns) -> dict[str, Tensor]:
    claim = links.view().leases.get(slot)
    if claim is None:
        raise ExportFailed(f"nobody owns slot {slot} right now")
    shape = expert_shape(links.manifest.model)
    async with turns.take(claim.owner):
        got = await links.fetch(
            claim.owner,
            resources.weights(slot),
            max_bytes=_slot_bytes(links.manifest),
            deadline_seconds=FETCH_SECONDS,
            begun=Download(),  # an owner that goes away is not waited for: the slot has another one soon
        )
    state = messages.decode(got.data, messages.SlotState)
    tensors = from_bytes(state.tensors, what=f"slot {slot} from {claim.owner}")
    weights = {}
    for place, layer in enumerate(handles.order(slot, state.epoch, shape.num_layers)):
        for name, size in (("gate_up", (2 * shape.width, shape.hidden)), ("down", (shape.hidden, shape.width))):
            value = tensors.get(f"{place}.{name}")
            if value is None or tuple(value.shape) != size:
                raise Refused("misshapen", f"slot {slot} from {claim.owner}: expert {place} {name} is not {size}")
            # Again, in the type that is written: a float64 may be finite and too large for it; integers are no weights.
            if not value.is_floating_point() or not bool(value.float().isfinite().all()):
                what = f"expert {place} {name} is no finite float32"
                raise Refused("not-finite", f"slot {slot} from {claim.owner}: {what}")
            weights[f"{layer}.{name}"] = value
    return weights
