"""What a composer answers to fetches of an onlooker, and a whole model gathered from two of them."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import HANDLE_KEY, MANIFEST_BYTES, SECONDS, Loopback, loopback
from msgspec import structs
from safetensors.torch import load
from shoal.node.peer.links import Links
from shoal.node.run.gather import ExportFailed, _fetch_all, _slot, _write, spread
from shoal.node.run.joining import newest
from shoal.node.slots.slot_order import moved, renamed
from shoal.node.storage.blobs import fragment_from_bytes, from_bytes, to_bytes
from shoal.protocol import messages, resources
from shoal.protocol.errors import PeerUnreachable, Refused
from shoal.protocol.experts.handles import Handles
from shoal.protocol.messages import SlotState, StandInSnapshot
from shoal.protocol.transport.downloads import Download, FetchEnded, FetchQuery, Resource
from shoal.protocol.transport.fetches import Turns
from shoal.protocol.transport.wire import Reason
from tiny import LAYERS, SLOTS, manifest_of
from torch import Tensor

STEPS = 8


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """Two composers that have finished, every slot owned, every step merged."""
    manifest = manifest_of(outer={"every_steps": 4}, train={"steps": STEPS}, standin={"publish_every": 2})
    with loopback(tmp_path_factory.mktemp("serving"), manifest, 2) as swarm:
        tasks: list[asyncio.Task[None]] = []
        loop = swarm.network.loop

        def start() -> None:
            tasks.extend(loop.create_task(w) for p in swarm.peers for w in (p.keeper.run(), p.outer.run()))

        loop.call_soon_threadsafe(start)
        owned = [peer.keeper.held for peer in swarm.peers]
        swarm.until(lambda: owned[0].keys() | owned[1].keys() == set(range(SLOTS)), "every slot is owned")
        for peer in swarm.peers:
            peer.trainer.start_training()
        swarm.until(
            lambda: all(
                p.composer.step == STEPS and p.ask(lambda c, p=p: p.outer.unmerged_steps(c)) == 0 for p in swarm.peers
            ),
            "all is merged",
        )
        yield swarm


@pytest.fixture(scope="module")
def onlooker(swarm: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Links]:
    with swarm.observer(tmp_path_factory.mktemp("onlooker")) as links:
        swarm.call(links.read_directory())
        yield links


def fetched(swarm: Loopback, onlooker: Links, resource: str, peer: int = 0) -> bytes:
    peer_id = swarm.peers[peer].peer_id
    return swarm.call(onlooker.fetch(peer_id, resource, max_bytes=1 << 24, deadline_seconds=SECONDS)).data


def test_the_manifest(swarm: Loopback, onlooker: Links) -> None:
    assert fetched(swarm, onlooker, resources.manifest()) == MANIFEST_BYTES


@pytest.mark.parametrize("index", [0, 1])
def test_backbone_fragments(swarm: Loopback, onlooker: Links, index: int) -> None:
    composer = swarm.peers[0].composer
    common, momentum = fragment_from_bytes(
        fetched(swarm, onlooker, resources.backbone(index)), composer.common[index].numel()
    )
    assert torch.equal(common, composer.common[index])
    assert torch.equal(momentum, composer.momentum[index])
    local, _ = fragment_from_bytes(fetched(swarm, onlooker, resources.local(index)), common.numel())
    assert torch.equal(local, composer.local_fragment(index))


def test_slots_and_standins(swarm: Loopback, onlooker: Links) -> None:
    owner = swarm.peers[0]
    slot = min(owner.keeper.held)
    state = messages.decode(fetched(swarm, onlooker, resources.snapshot(slot)), SlotState)
    assert (state.slot, state.epoch) == (slot, owner.keeper.held[slot])
    ours = owner.ask(lambda composer: composer.snapshot(slot))
    order = Handles(HANDLE_KEY).order(slot, state.epoch, LAYERS)
    theirs = renamed(from_bytes(state.tensors, what="slot"), order)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    snapshot = messages.decode(fetched(swarm, onlooker, resources.standin(slot)), StandInSnapshot)
    assert moved(snapshot.layers, order) == [s.to_bytes() for s in owner.ask(lambda composer: composer.standins(slot))]
    assert len(snapshot.layers) == LAYERS


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        (resources.backbone(2), Reason.NOT_FOUND),
        (resources.standin(SLOTS), Reason.NOT_FOUND),
        (resources.snapshot(SLOTS + 1), Reason.NOT_FOUND),
        (resources.handover(SLOTS), Reason.NOT_FOUND),
        ("nonsense/0", Reason.BUSY),
    ],
)
def test_what_is_not_there(swarm: Loopback, onlooker: Links, resource: str, reason: Reason) -> None:
    with pytest.raises(FetchEnded) as caught:
        fetched(swarm, onlooker, resource)
    assert caught.value.reason == reason


def test_a_stranger_gets_no_handover(swarm: Loopback, onlooker: Links) -> None:
    owner = swarm.peers[0]
    slot = min(owner.keeper.held)
    with pytest.raises(FetchEnded):
        fetched(swarm, onlooker, resources.handover(slot))
    assert not owner.composer._frozen


def test_a_whole_model_is_gathered(swarm: Loopback, onlooker: Links) -> None:
    whole = swarm.call(_fetch_all(onlooker, Handles(HANDLE_KEY), lambda _: None))
    composer = swarm.peers[1].composer
    assert sum(record.role == "composer" for record in whole.peers.values()) == 2
    for name, parameter in composer.backbone.items():
        torch.testing.assert_close(whole.backbone[name].view_as(parameter), parameter.detach(), rtol=0, atol=0)
    assert set(whole.slots) == set(range(SLOTS))
    for peer in swarm.peers:
        for slot in peer.keeper.held:
            for layer, expert in enumerate(peer.composer.model.experts_of(slot)):
                assert torch.equal(whole.slots[slot][f"{layer}.gate_up"], expert.gate_up)
                assert torch.equal(whole.slots[slot][f"{layer}.down"], expert.down)


def test_slots_that_many_ask_for_at_once_do_not_fill_the_memory(swarm: Loopback, onlooker: Links) -> None:
    library, slots = swarm.peers[0].library, sorted(swarm.peers[0].keeper.held)
    assert library is not None
    assert len(slots) > 1

    async def ask(slot: int) -> Resource | None:
        assert library is not None
        return await library.answer(FetchQuery(onlooker.peer_id, resources.snapshot(slot)))

    async def all_at_once() -> list[Resource | BaseException | None]:
        return await asyncio.gather(*map(ask, slots), return_exceptions=True)

    limit, library._slots.limit = library._slots.limit, 1
    try:
        first, *others = swarm.call(all_at_once())
        assert isinstance(first, Resource)
        assert [isinstance(other, Refused) and other.reason for other in others] == ["busy"] * len(others)
        assert fetched(swarm, onlooker, resources.snapshot(slots[0])) == first.data, "the same, once more"
        assert fetched(swarm, onlooker, resources.standin(slots[0])), "there is room for other things"
        del first, others
        gc.collect()
        assert fetched(swarm, onlooker, resources.snapshot(slots[1]))
    finally:
        library._slots.limit = limit


def test_who_asks_for_a_handover_again_gets_the_one_that_is_being_made(
    swarm: Loopback, onlooker: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little of its machine an owner takes longer than anybody waits, each time that it begins anew."""
    library, asked = swarm.peers[0].library, list[str]()
    assert library is not None
    ask = FetchQuery(onlooker.peer_id, resources.handover(0))

    async def slowly(slot: int, requester: str) -> Resource:
        asked.append(requester)
        await asyncio.sleep(0.5)
        return Resource(b"slot %d for %d" % (slot, len(asked)))

    async def twice() -> list[Resource | None]:
        given_up = asyncio.ensure_future(library.answer(ask))
        await asyncio.sleep(0.1)
        given_up.cancel()
        other = FetchQuery(swarm.peers[1].peer_id, resources.handover(0))
        return [*await asyncio.gather(library.answer(ask), library.answer(other)), await library.answer(ask)]

    monkeypatch.setattr(swarm.peers[0].keeper, "serve_handover", slowly)
    first, _, later = swarm.call(twice())
    assert asked == [onlooker.peer_id, swarm.peers[1].peer_id, onlooker.peer_id]
    assert first is not None
    assert later is not None
    assert first.data != later.data, "it may have been trained meanwhile"


@contextmanager
def answering(
    swarm: Loopback, peer: int, spoilt: Callable[[bytes], bytes], kind: str, *, seconds: float = 0.0
) -> Iterator[list[str]]:
    """One peer sends something else for resources of a kind, and takes its time. Yields what it was asked for."""
    library, transport, asked = swarm.peers[peer].library, swarm.peers[peer].links.transport, list[str]()
    assert library is not None

    async def answer(query: FetchQuery) -> Resource | None:
        wanted = query.resource.split("/")[0] == kind
        if wanted:
            asked.append(query.resource)
        resource = await library.answer(query)
        await asyncio.sleep(seconds if wanted else 0.0)
        return Resource(spoilt(resource.data)) if wanted and resource is not None else resource

    transport.serve(answer)
    try:
        yield asked
    finally:
        transport.serve(library.answer)


def test_an_export_of_large_slots_asks_each_owner_for_one_at_a_time(swarm: Loopback, onlooker: Links) -> None:
    """Who has room for no more than one would answer `busy` to the rest, for longer than is waited."""
    limits, asked = [], Counter[str]()
    for peer in swarm.peers:
        assert peer.library is not None
        limits.append(peer.library._slots.limit)
        peer.library._slots.limit = 1
    try:
        with answering(swarm, 0, lambda data: data, "weights", seconds=0.3) as seen:
            whole = swarm.call(_fetch_all(onlooker, Handles(HANDLE_KEY), lambda _: None))
        asked.update(seen)
    finally:
        for peer, limit in zip(swarm.peers, limits, strict=True):
            assert peer.library is not None
            peer.library._slots.limit = limit
    assert len(whole.slots) == sum(len(peer.keeper.held) for peer in swarm.peers)
    assert asked.keys() == {resources.weights(slot) for slot in swarm.peers[0].keeper.held}
    assert asked.total() == len(asked), "none was refused, and asked for again"


def test_exports_do_not_all_ask_the_same_backer_first() -> None:
    backers = {f"peer {number}" for number in range(8)}
    orders = [spread(backers, f"exporter {number}/0/40") for number in range(400)]
    assert orders == [spread(backers, f"exporter {number}/0/40") for number in range(400)]
    assert all(set(order) == backers for order in orders)
    first = Counter(order[0] for order in orders)
    assert first.keys() == backers
    assert max(first.values()) < 100, "of 50 each"
    assert len({spread(backers, f"exporter/{fragment}/40")[0] for fragment in range(40)}) > 4


def test_an_export_waits_for_nobody_who_has_gone(
    swarm: Loopback, onlooker: Links, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch that has begun and may not be gone on with elsewhere waits as long as its bytes allow: hours."""
    fetch, seen = onlooker.fetch, dict[str, list[object]]()

    async def noted(peer: str, resource: str, **more: Any) -> Resource:
        seen.setdefault(resource, []).append(more.get("begun"))
        if resource == resources.backbone(0) and len(seen[resource]) == 1:
            raise PeerUnreachable("it has gone")
        return await fetch(peer, resource, **more)

    monkeypatch.setattr(onlooker, "fetch", noted)
    swarm.call(_fetch_all(onlooker, Handles(HANDLE_KEY), lambda _: None))
    assert all(isinstance(begun, Download) for each in seen.values() for begun in each)
    first, second = seen[resources.backbone(0)]
    assert first is second, "another backer goes on with what has come"


def a_nan(data: bytes) -> bytes:
    tensors = load(data)
    tensors["fragment"][3] = torch.nan
    return to_bytes(tensors)


@pytest.mark.parametrize("spoilt", [a_nan, lambda data: data[:50], lambda _: to_bytes({"fragment": torch.zeros(1)})])
def test_a_backer_that_sends_nonsense_is_passed_over(
    swarm: Loopback, onlooker: Links, spoilt: Callable[[bytes], bytes]
) -> None:
    state, backers = newest(onlooker, 0, 2)
    assert state is not None
    asked_first = spread(backers, f"{onlooker.peer_id}/0/{state.round}")[0]
    first = [peer.peer_id for peer in swarm.peers].index(asked_first)
    with answering(swarm, first, spoilt, "backbone") as asked:
        whole = swarm.call(_fetch_all(onlooker, Handles(HANDLE_KEY), lambda _: None))
    assert asked.count(resources.backbone(0)) == 1, "and not asked again"
    for name, parameter in swarm.peers[0].composer.backbone.items():
        assert torch.equal(whole.backbone[name].view_as(parameter), parameter.detach())


@pytest.mark.parametrize(
    "value", [torch.full((), 1e300, dtype=torch.float64), torch.tensor(torch.nan), torch.tensor(1)]
)
def test_an_owner_whose_weights_are_none_is_named(swarm: Loopback, onlooker: Links, value: Tensor) -> None:
    """A float64 may be finite and not fit into the float32 that is written; an integer tensor cannot be trained."""

    def spoilt(data: bytes) -> bytes:
        state = messages.decode(data, SlotState)
        tensors = from_bytes(state.tensors, what="slot")
        tensors["1.down"] = value.expand(tensors["1.down"].shape)
        return messages.encode(structs.replace(state, tensors=to_bytes(tensors)))

    slot, owner = min(swarm.peers[1].keeper.held), swarm.peers[1].peer_id
    with answering(swarm, 1, spoilt, "weights"), pytest.raises(Refused, match=owner) as refused:
        swarm.call(_slot(onlooker, Handles(HANDLE_KEY), slot, Turns(1)))
    assert refused.value.reason == "not-finite"


def test_a_model_that_is_not_finite_is_no_checkpoint(swarm: Loopback, onlooker: Links, tmp_path: Path) -> None:
    whole = swarm.call(_fetch_all(onlooker, Handles(HANDLE_KEY), lambda _: None))
    _write(whole, tmp_path / "sound")
    name = next(iter(whole.backbone))
    ill = replace(whole, backbone=whole.backbone | {name: torch.full_like(whole.backbone[name], torch.nan)})
    with pytest.raises(ExportFailed, match="not finite") as failed:
        _write(ill, tmp_path / "ill")
    assert "loss" in failed.value.fix
