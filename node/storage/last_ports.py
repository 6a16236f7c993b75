"""The ports a peer had when it last ran, so that its invite and its addresses hold when it starts again.

`ports.json` in the data directory. They count only where the peer was not told which port to use, and only while they
are free: a peer that cannot have its old port takes another.
"""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import PeerConfig
from ..logs import get_logger

log = get_logger(__name__)

NAMES = ("dht_port", "transport_port", "http_port")


def with_last_ports(config: PeerConfig) -> PeerConfig:
    """`config` with the ports of last time in place of 0."""
    last = _read(config.data_dir / "ports.json")
    told = {getattr(config, name) for name in NAMES}
    ports: dict[str, Any] = {
        name: last[name]
        for name in NAMES
        if not getattr(config, name)
        and last.get(name)
        and last[name] not in told
        and _is_free(config.http_host if name == "http_port" else config.host, last[name])
    }
    return replace(config, **ports) if len(set(ports.values())) == len(ports) else config


def keep_ports(data_dir: Path, **ports: int) -> None:
    """Remember where this peer listens, by `NAMES`; of those left out, what was said before. Does not raise."""
    path = data_dir / "ports.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(_read(path) | ports))
        temporary.replace(path)
    except OSError as error:
        log.warning("last_ports.not_written", path=str(path), error=str(error))


def _read(path: Path) -> dict[str, int]:
    try:
        told = json.loads(path.read_text())
        return {name: told[name] for name in NAMES if type(told.get(name)) is int and 0 < told[name] < 1 << 16}
    except (FileNotFoundError, NotADirectoryError):  # a data directory that is none is refused when it is held
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("last_ports.damaged", path=str(path), error=str(error))
        return {}


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of last time may linger
        try:
            one.bind((host, port))
        except OSError:
            return False
    return True
