"""The run's handle key: kept by composers, given to those who may have it, and never believed without its digest."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from loopback import HANDLE_KEY, SECONDS, Loopback, loopback
from loopback_workers import LoopbackWorker
from shoal.node.errors import ConfigError
from shoal.node.peer.links import Links
from shoal.node.peer.membership import Membership
from shoal.node.run.manifest import PrivacySpec
from shoal.node.slots.handle_key import HandleKeyMissing, fetch_key, found_key, kept_key
from shoal.node.storage import whole_file
from shoal.node.storage.known_peers import KnownPeers
from shoal.node.watching.state import Phase
from shoal.protocol import resources
from shoal.protocol.directory.records import Role
from shoal.protocol.experts.handles import KEY_BYTES, key_digest, new_key
from shoal.protocol.transport.downloads import FetchEnded
from tiny import manifest_of

DIGEST = key_digest(HANDLE_KEY).hex()


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    manifest = msgspec.structs.replace(manifest_of(), privacy=PrivacySpec(handle_key_digest=DIGEST))
    with loopback(tmp_path_factory.mktemp("keys"), manifest, 2) as swarm:
        yield swarm


def give(swarm: Loopback, *keys: bytes | None) -> None:
    """What the composers have for a key."""
    for peer, key in zip(swarm.peers, keys, strict=True):
        assert peer.library is not None
        peer.library.handle_key = key


async def introduce(links: Links, role: Role) -> None:
    nowhere = KnownPeers(Path("/nowhere"), links.run_id)  # it only announces
    member = Membership(
        links, role=role, capacity=0, transport_addrs=links.transport.addrs, dht_addrs=[], metrics_url="",
        signed_manifest=b"", known=nowhere,
    )  # fmt: skip
    links.state.enter(Phase.JOINING)
    await member.announce()


def known(swarm: Loopback, links: Links, role: Role) -> None:
    """Until the composers see the newcomer in this role."""
    swarm.call(introduce(links, role))

    async def look() -> bool:
        for peer in swarm.peers:
            await peer.links.read_directory()
        return all(
            links.peer_id in p.links.view().peers and p.links.view().peers[links.peer_id].role == role
            for p in swarm.peers
        )

    swarm.until(lambda: swarm.call(look()), "the composers know it")


def test_a_founder_keeps_its_key_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "handle.key"
    key = found_key(path)
    assert len(key) == KEY_BYTES
    assert found_key(path) == path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["handle.key"]
    assert found_key(tmp_path / "other.key") != key


def test_a_new_key_is_on_the_disk_before_a_run_is_founded_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else has it yet, and the manifest commits to it."""
    synced: list[Path] = []
    monkeypatch.setattr(whole_file, "sync", synced.append)
    found_key(tmp_path / "handle.key")
    assert synced == [tmp_path / "handle.key.tmp", tmp_path]


@pytest.mark.parametrize("damaged", [b"", HANDLE_KEY[:-1], HANDLE_KEY + b"1"], ids=["empty", "short", "long"])
def test_nothing_is_founded_with_a_damaged_key(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "handle.key"
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="is damaged") as refused:
        found_key(path)
    assert "copy" in refused.value.fix
    assert path.read_bytes() == damaged


def test_only_the_key_that_the_manifest_means_is_kept(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.key", tmp_path / "wrong.key"
    right.write_bytes(HANDLE_KEY)
    wrong.write_bytes(new_key())
    assert kept_key([tmp_path / "none.key", wrong, right], DIGEST) == HANDLE_KEY
    assert kept_key([wrong], DIGEST) is None
    right.write_bytes(HANDLE_KEY[:-1])
    assert kept_key([right], DIGEST) is None


@pytest.mark.parametrize("role", ["composer", "observer", "bootstrap"])
def test_peers_with_a_backbone_are_given_it(swarm: Loopback, tmp_path: Path, role: Role) -> None:
    give(swarm, HANDLE_KEY, None)
    paths = [tmp_path / "handle.key", tmp_path / "handle-run.key"]
    with swarm.observer(tmp_path / role) as links:
        known(swarm, links, role)
        assert swarm.call(fetch_key(links, paths, seconds=SECONDS / 2)) == HANDLE_KEY
        give(swarm, None, None)
        assert swarm.call(fetch_key(links, paths, seconds=0.0)) == HANDLE_KEY  # from its own file
    assert not paths[0].exists()
    assert paths[1].read_bytes() == HANDLE_KEY
    assert stat.S_IMODE(paths[1].stat().st_mode) == 0o600


def test_a_wrong_key_is_not_believed(swarm: Loopback, tmp_path: Path) -> None:
    paths = [tmp_path / "handle.key"]
    with swarm.observer(tmp_path / "joiner") as links:
        known(swarm, links, "composer")
        for wrong in (new_key(), HANDLE_KEY[:-1], b""):
            give(swarm, wrong, wrong)
            with pytest.raises(HandleKeyMissing, match="no composer or founder"):
                swarm.call(fetch_key(links, paths, seconds=0.2))
            assert not paths[0].exists()
        give(swarm, new_key(), HANDLE_KEY)
        assert swarm.call(fetch_key(links, paths, seconds=SECONDS / 2)) == HANDLE_KEY


def test_workers_and_strangers_do_not_get_it(swarm: Loopback, tmp_path: Path) -> None:
    give(swarm, HANDLE_KEY, HANDLE_KEY)
    with swarm.observer(tmp_path / "stranger") as links:
        swarm.call(links.read_directory())
        for role in (None, "worker"):
            if role is not None:
                known(swarm, links, "worker")
            for peer in swarm.peers:
                with pytest.raises(FetchEnded):
                    swarm.call(
                        links.fetch(peer.peer_id, resources.handle_key(), max_bytes=KEY_BYTES, deadline_seconds=SECONDS)
                    )


def test_a_run_without_a_digest_hides_nothing(swarm: Loopback, tmp_path: Path) -> None:
    with swarm.observer(tmp_path / "joiner") as links:
        links.manifest = manifest_of()
        key = swarm.call(fetch_key(links, [tmp_path / "handle.key"], seconds=0.0))
    assert key == bytes(KEY_BYTES)
    assert not (tmp_path / "handle.key").exists()


def test_a_worker_peer_has_no_key_to_give(swarm: Loopback, tmp_path: Path) -> None:
    give(swarm, HANDLE_KEY, HANDLE_KEY)
    worker = LoopbackWorker(swarm, tmp_path / "worker", capacity=1)
    try:
        assert worker.library.handle_key is None
        with swarm.observer(tmp_path / "onlooker") as links:
            known(swarm, links, "observer")
            swarm.call(links.read_directory())
            swarm.until(lambda: worker.peer_id in links.view().peers, "it sees the worker")
            with pytest.raises(FetchEnded):
                swarm.call(
                    links.fetch(worker.peer_id, resources.handle_key(), max_bytes=KEY_BYTES, deadline_seconds=SECONDS)
                )
    finally:
        worker.close()
