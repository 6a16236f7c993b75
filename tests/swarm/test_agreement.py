"""A run to its end: everybody holds the same bits, and the exported checkpoint is exactly what the peers serve."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import START_SECONDS, Swarm, owned_once, run_id_of
from safetensors.torch import load, load_file
from shoal.node.learning.data import load_corpus
from shoal.node.learning.evaluate import HELDOUT_SEED, heldout_loss
from shoal.node.model.build import build_model
from shoal.node.model.cut import backbone_fragments
from shoal.node.run.invite import Invite
from shoal.node.run.kept_manifests import manifest_file
from shoal.node.run.manifest import Manifest, verify
from shoal.node.slots.slot_order import renamed
from shoal.node.storage.blobs import fragment_from_bytes
from shoal.protocol import messages, resources
from shoal.protocol.averaging.fragments import Fragment, unflatten
from shoal.protocol.averaging.merging import digest
from shoal.protocol.directory.dht import start_dht
from shoal.protocol.directory.directory import Directory
from shoal.protocol.experts.handles import Handles
from shoal.protocol.identity import Identity
from shoal.protocol.messages import SlotState, StandInSnapshot
from shoal.protocol.transport.client import Transport

SLOTS = 16
LAYERS = 3
STEPS = 48

pytestmark = pytest.mark.timeout(300)


@dataclass
class Fetched:
    """What the composers serve and say, by peer id."""

    voted: list[dict[str, bytes]]  # per fragment: digest by voter
    backbone: list[dict[str, bytes]]  # per fragment: the bytes by peer
    standins: list[dict[str, bytes]]  # per slot
    slots: list[dict[str, torch.Tensor]]  # per slot: its owner's tensors


def test_all_hold_the_same_and_the_checkpoint_is_that(swarm: Swarm, tmp_path: Path) -> None:
    swarm.found("--steps", str(STEPS), "--min-composers", "2")
    both = [swarm.join(name, "--data-shard", f"{index}/2") for index, name in enumerate("ab")]
    swarm.wait_for(
        "both are done and merged",
        lambda: all(p.phase == "finished" and p.last["unmerged_steps"] == 0 for p in both) and owned_once(both),
        2 * START_SECONDS,
    )
    manifest = verify(manifest_file(swarm.folder / "bootstrap", run_id_of(swarm.invite)).read_bytes())
    assert all(peer.last["step"] == STEPS for peer in both)

    out = tmp_path / "checkpoint"
    done = swarm.call("export", swarm.invite, str(out), "--data-dir", str(swarm.folder / "exporter"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)

    fragments = backbone_fragments(manifest)
    handles = Handles((swarm.folder / "bootstrap" / "handle.key").read_bytes())
    fetched = fetch_all(swarm, [peer.id for peer in both], fragments, handles)
    backbone: dict[str, torch.Tensor] = {}
    for fragment, held, voted in zip(fragments, fetched.backbone, fetched.voted, strict=True):
        assert len(held) == 2
        assert len(set(held.values())) == 1, f"fragment {fragment.index} differs"
        flat, momentum = fragment_from_bytes(next(iter(held.values())), fragment.numel)
        assert set(voted.values()) == {digest(flat, momentum)}
        assert set(voted) == {peer.id for peer in both}
        backbone |= unflatten(fragment, flat)
    assert all(len(held) == 2 and len(set(held.values())) == 1 for held in fetched.standins)

    exported = load_file(out / "model.safetensors")
    for name, flat in backbone.items():
        assert torch.equal(exported[name].flatten(), flat), name
    for layer in range(manifest.model.config["num_hidden_layers"]):
        for part, ours in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            fused = exported[f"model.layers.{layer}.mlp.experts.{part}"]
            for slot, tensors in enumerate(fetched.slots):
                assert torch.equal(fused[slot], tensors[f"{layer}.{ours}"]), (layer, part, slot)

    said = swarm.call("evaluate", str(out), "--windows", "8", "--json")
    assert said.returncode == 0, said.stderr
    ours = our_loss(manifest, backbone, fetched.slots, windows=8)
    assert json.loads(said.stdout)["nats_per_token"] == pytest.approx(ours, rel=1e-5)
    assert ours < 4.5  # 5.55 untrained


def our_loss(
    manifest: Manifest, backbone: dict[str, torch.Tensor], slots: list[dict[str, torch.Tensor]], *, windows: int
) -> float:
    """Held-out loss by the model that the swarm runs, with every expert in full."""
    model = build_model(manifest.model, owned=range(SLOTS), standin=manifest.standin)
    with torch.no_grad():
        for name, parameter in model.backbone.items():
            parameter.copy_(backbone[name].view_as(parameter))
        for slot, tensors in enumerate(slots):
            for layer, expert in enumerate(model.experts_of(slot)):
                expert.gate_up.copy_(tensors[f"{layer}.gate_up"])
                expert.down.copy_(tensors[f"{layer}.down"])
    corpus = load_corpus(manifest.data.corpus)
    return heldout_loss(model, corpus.heldout(windows, manifest.data.context_length, seed=HELDOUT_SEED))


def fetch_all(swarm: Swarm, composers: list[str], fragments: list[Fragment], handles: Handles) -> Fetched:
    """Ask every composer for everything, as another peer of the run."""
    invite = Invite.parse(swarm.invite)
    path = swarm.folder / "onlooker.key"
    identity = Identity.load_or_create(path)
    dht = start_dht(
        path,
        initial_peers=invite.multiaddrs(),
        host="127.0.0.1",
        port=0,
        announce=(),
        run_id=invite.run_id,
        client=True,
    )
    try:
        directory = Directory(dht, identity, invite.run_id)
        return asyncio.run(_fetch_all(directory, path, composers, fragments, handles))
    finally:
        dht.shutdown()


async def _fetch_all(
    directory: Directory, path: Path, composers: list[str], fragments: list[Fragment], handles: Handles
) -> Fetched:
    view = await directory.read()
    transport = await Transport.start(identity_path=path, run_id=directory.run_id)

    async def fetch(peer: str, resource: str) -> bytes:
        addrs = view.peers[peer].transport_addrs
        got = await transport.fetch(list(addrs), resource, deadline_seconds=30, max_bytes=1 << 26)
        return got.data

    async def from_all(resource: str) -> dict[str, bytes]:
        return {peer: await fetch(peer, resource) for peer in composers}

    async with transport:
        slots = []
        for slot in range(SLOTS):
            state = messages.decode(await fetch(view.leases[slot].owner, resources.snapshot(slot)), SlotState)
            slots.append(renamed(load(state.tensors), handles.order(slot, state.epoch, LAYERS)))
        return Fetched(
            voted=[{voter: vote.digest for voter, vote in view.votes[f.index].items()} for f in fragments],
            backbone=[await from_all(resources.backbone(f.index)) for f in fragments],
            standins=[await _same(from_all, resources.standin(slot)) for slot in range(SLOTS)],
            slots=slots,
        )


async def _same(from_all: Any, resource: str) -> dict[str, bytes]:
    """The stand-ins of a slot at all peers, once they are equal: the last delta may have been lost and be repaired."""
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        got = {peer: messages.decode(data, StandInSnapshot).digest for peer, data in (await from_all(resource)).items()}
        if len(set(got.values())) == 1 or asyncio.get_running_loop().time() > deadline:
            return got
        await asyncio.sleep(0.2)
