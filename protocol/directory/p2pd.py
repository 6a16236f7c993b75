"""hivemind's Go daemon as a child on a leash: it reports why it failed, and it never outlives its parent.

hivemind's own starter leaves the daemon running when its parent is killed, puts it into the terminal's process group
(Ctrl-C ends it before the node could hand over), and knows one error: fifteen seconds of silence. So the daemon is
started here and hivemind attaches to its control socket.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import DirectoryError
from ..process_death import end_with_parent

logger = logging.getLogger(__name__)

EXIT_DAEMON_DIED = 70  # the DHT process ends with it when its daemon has gone

_MAX_UNIX_PATH = 100  # the kernel's 108, less what hivemind appends


@dataclass(frozen=True, kw_only=True)
class DaemonOptions:
    """What the daemon is told."""

    identity_path: Path
    listen: str  # multiaddr; port 0 takes a free one
    announce: Sequence[str]  # multiaddrs to tell others instead of what it finds on its interfaces
    bootstrap: Sequence[str]  # multiaddrs with /p2p/<peer id>; one of them must answer
    map_port: bool  # ask the home router to forward the port (UPnP, NAT-PMP), and probe reachability
    client: bool  # route through others, serve nobody


class Daemon:
    """A running p2pd. Start it in a process without other threads that holds the identity; `stop` it there.

    Raises DirectoryError with the daemon's own last words when it does not come up in `timeout_seconds`.
    """

    def __init__(self, options: DaemonOptions, *, timeout_seconds: float) -> None:
        # Named after the identity, which its holder has locked: what a killed predecessor left gets replaced.
        name = hashlib.sha256(str(options.identity_path.resolve()).encode()).hexdigest()[:16]
        self.socket = Path(tempfile.gettempdir()) / f"shoal-p2pd-{name}.sock"
        if len(str(self.socket)) > _MAX_UNIX_PATH:
            raise DirectoryError(
                f"the path of a socket in {self.socket.parent} is too long", fix="set TMPDIR to a shorter path"
            )
        self.socket.unlink(missing_ok=True)
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._stopping = False
        self._last_words: deque[str] = deque(maxlen=8)
        parent_pid = os.getpid()
        self._process = subprocess.Popen(
            _command(options, self.socket),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"GOLOG_LOG_LEVEL": "error"} | os.environ,
            process_group=0,
            preexec_fn=lambda: end_with_parent(parent_pid, signal.SIGKILL),  # safe: no other thread runs here
        )
        self._reader = threading.Thread(target=self._read, name="p2pd-output", daemon=True)
        self._reader.start()
        if not self._ready.wait(timeout_seconds) or self._ended.is_set():
            self.stop()
            raise _explain("\n".join(self._last_words), options, timeout_seconds)

    @property
    def control_multiaddr(self) -> str:
        return f"/unix{self.socket}"

    def stop(self) -> None:
        """End the daemon and remove its socket. Takes two seconds at most."""
        self._stopping = True
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.socket.unlink(missing_ok=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.rstrip()
            self._last_words.append(text)
            logger.debug("p2pd: %s", text)
            if text.startswith("Peer ID:"):
                self._ready.set()
        if self._ready.is_set() and not self._stopping:
            # Without its daemon the DHT process would only time out, request after request.
            logger.error("p2pd ended: %s", " | ".join(self._last_words))
            self.socket.unlink(missing_ok=True)
            os._exit(EXIT_DAEMON_DIED)
        self._ended.set()
        self._ready.set()


def _command(options: DaemonOptions, socket: Path) -> list[str]:
    flags = {
        "listen": f"/unix{socket}",
        "id": str(options.identity_path),
        "hostAddrs": options.listen,
        "announceAddrs": ",".join(options.announce),
        "bootstrapPeers": ",".join(options.bootstrap),
        "b": str(int(bool(options.bootstrap))),
        "dhtClient" if options.client else "dhtServer": "1",
        "natPortMap": str(int(options.map_port)),
        "autonat": str(int(options.map_port)),
        "connManager": "1",
        "relay": "1",
        "tls": "1",
        "idleTimeout": "3m",  # until somebody attaches
    }
    return [
        str(files("hivemind.hivemind_cli") / "p2pd"),
        *(f"-{name}={value}" for name, value in flags.items() if value),
    ]


def _explain(words: str, options: DaemonOptions, timeout_seconds: float) -> DirectoryError:
    if "failed to connect to bootstrap peers" in words:
        return BootstrapFailed(
            f"no peer with the expected identity answered at {', '.join(options.bootstrap)}",
            fix="ask for a fresh invite: the peer at that address is another one, or speaks another protocol",
        )
    if "failed to listen" in words:
        return DirectoryError(
            f"cannot listen at {options.listen}: {words}", fix="listen at an address that this machine has"
        )
    return DirectoryError(
        f"the p2p daemon did not start within {timeout_seconds:.0f} s: {words or 'it said nothing'}",
        fix="see whether the machine is overloaded, and report this message",
    )


class BootstrapFailed(DirectoryError):
    """Nobody to join was found; trying again may help."""
