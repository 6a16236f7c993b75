"""The ports of a peer's last life."""

import socket
from pathlib import Path

import pytest
from shoal.node.config import PeerConfig
from shoal.node.peer.way_in import free_port
from shoal.node.storage.last_ports import keep_ports, with_last_ports

HOST = "127.0.0.1"


def ports_of(config: PeerConfig) -> tuple[int, int, int]:
    return config.dht_port, config.transport_port, config.http_port


def test_a_later_life_has_the_same_ports(tmp_path: Path) -> None:
    config = PeerConfig(data_dir=tmp_path, host=HOST)
    assert with_last_ports(config) == config
    dht, transport, http = (free_port(HOST) for _ in range(3))
    keep_ports(tmp_path, dht_port=dht, transport_port=transport, http_port=http)
    assert ports_of(with_last_ports(config)) == (dht, transport, http)


def test_what_the_peer_is_told_wins(tmp_path: Path) -> None:
    dht, transport, http = (free_port(HOST) for _ in range(3))
    keep_ports(tmp_path, dht_port=dht, transport_port=transport, http_port=http)
    told = PeerConfig(data_dir=tmp_path, host=HOST, dht_port=transport)  # what another listener had
    assert ports_of(with_last_ports(told)) == (transport, 0, http)


def test_a_port_that_somebody_took_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as other:
        taken = other.getsockname()[1]
        keep_ports(tmp_path, dht_port=taken, transport_port=free_port(HOST), http_port=taken)
        found = with_last_ports(PeerConfig(data_dir=tmp_path, host=HOST))
    assert found.dht_port == found.http_port == 0
    assert found.transport_port


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", '{"dht_port": "4001"}', '{"dht_port": 70000}', '{"dht_port": true}', '{"dht_port": null}'],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "ports.json").write_text(content)
    config = PeerConfig(data_dir=tmp_path, host=HOST)
    assert with_last_ports(config) == config


def test_one_port_for_two_listeners_is_no_memory(tmp_path: Path) -> None:
    port = free_port(HOST)
    keep_ports(tmp_path, dht_port=port, transport_port=port, http_port=port)
    config = PeerConfig(data_dir=tmp_path, host=HOST)
    assert with_last_ports(config) == config


def test_a_disk_that_takes_nothing_ends_nothing(tmp_path: Path) -> None:
    keep_ports(tmp_path / "gone", dht_port=1, transport_port=2, http_port=3)
