"""The node's own process of the DHT: started with our identity and our rules, ended with the node.

    trainer (main thread) --fork--> DHT process (hivemind, asyncio) --exec--> p2pd (Go)

Both children hold the kernel's promise to be killed when their parent goes, even by SIGKILL (Linux). Start the DHT
before other threads and before CUDA: it forks.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import multiprocessing
import os
import re
import signal
import socket
import struct
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import hivemind
from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P
from hivemind.utils import MPFuture
from hivemind.utils.multiaddr import Multiaddr

from ..addresses import Address, farthest_first
from ..errors import ClockOff, DirectoryEnded, DirectoryError
from ..identity import Identity
from ..process_death import end_with_parent
from ..torch_sharing import start_sharing
from .bootstrap import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, answering
from .p2pd import EXIT_DAEMON_DIED, BootstrapFailed, Daemon, DaemonOptions
from .validator import RecordValidator

logger = logging.getLogger(__name__)

_DAEMON_START_SECONDS = 180.0  # it takes less than one, and much longer where others have most of the machine
_MAX_BOOTSTRAP = 8  # peers to join by: more make the start slower, not surer
_REQUEST_PIPE_BYTES = 1 << 20  # the most that Linux grants without privileges
_LOCK_SECONDS = 2.0
_CLOCKS_APART = re.compile(r"local time must be within .*\(local: (?P<local>[\d.]+), peer: (?P<peer>[\d.]+)\)")
# Caches would answer with old records, and push copies of whole dictionaries to neighbours with every read. Who shares
# what searches find keeps a note of every key that was ever searched for, and each round of averagers has a key.
_NODE_OPTIONS = {
    "reuse_get_requests": False,
    "cache_locally": False,
    "cache_on_store": False,
    "cache_nearest": 0,
    "cache_refresh_before_expiry": 0,
}


class RunDHT(hivemind.DHT):  # type: ignore[misc]  # hivemind has no type information
    """hivemind's DHT with a validator of one run's records and a daemon that cannot be orphaned. See `start_dht`."""

    def __init__(self, options: DaemonOptions, run_id: str) -> None:
        self._options = options
        self._daemon: Daemon | None = None
        self._validator = RecordValidator(run_id)
        initial = list(options.bootstrap)
        super().__init__(
            initial or None,
            start=False,
            record_validators=[self._validator],
            client_mode=options.client,
            **_NODE_OPTIONS,
        )
        self._outer_pipe: Any = _RequestPipe(self._outer_pipe)

    def run(self) -> None:
        """The DHT process."""
        _forget_signal_handlers()
        end_with_parent(self._parent_pid, signal.SIGKILL)
        lock = None
        try:
            lock = _lock_identity(self._options.identity_path)
            self._daemon = Daemon(self._options, timeout_seconds=_DAEMON_START_SECONDS)
        except DirectoryError as error:
            self._ready.set_exception(error)
            if lock is not None:
                os.close(lock)
            return
        self._daemon_listen_maddr = Multiaddr(self._daemon.control_multiaddr)
        try:
            super().run()
        finally:
            self._daemon.stop()
            os.close(lock)

    def shutdown(self) -> None:
        """Stop the DHT process and its daemon, in whatever state they are; takes some seconds at most."""
        try:
            super().shutdown()
        except (DirectoryError, OSError) as error:  # it no longer takes requests, or has just gone
            logger.warning("dht ends the hard way: %s", error)
        self.join(2)  # if it did not heed the request, hivemind has sent SIGTERM
        if self.is_alive():
            self.kill()
            self.join()

    async def _shutdown(self) -> None:
        # Requests that nobody waits for any more end with the loop; asyncio would report each as a mistake.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        await super()._shutdown()
        await self._node.p2p.shutdown()  # hivemind leaves a daemon that it attached to, and its own socket


class _RequestPipe:
    """hivemind's pipe into the DHT process, made safe for large requests and for writers in several processes.

    `Connection.send` writes a message of more than 16 kB in two pieces. hivemind reads without waiting (uvloop makes
    the descriptor non-blocking): a reader that comes between the pieces fails, and the DHT process ends. Averagers,
    which inherit the pipe by fork, could write there too. So each message is one write, into a pipe with room for it.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = multiprocessing.get_context("fork").Lock()
        self._room = fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _REQUEST_PIPE_BYTES)

    def send(self, request: Any) -> None:
        """Raises DirectoryError if the DHT process has stopped taking requests; never waits for it."""
        body = ForkingPickler.dumps(request)
        frame = struct.pack("!i", len(body)) + bytes(body)  # as Connection.recv expects it
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            raise DirectoryError("another process of this node died while it used the DHT", fix="restart the node")
        try:
            unread = struct.unpack("i", fcntl.ioctl(self._pipe.fileno(), termios.FIONREAD, bytes(4)))[0]
            if unread + len(frame) > self._room // 2:  # pages may be half full
                raise DirectoryError(
                    f"the DHT process has left {unread} bytes of requests unread",
                    fix="see whether the machine is overloaded, or restart the node",
                )
            os.write(self._pipe.fileno(), frame)
        finally:
            self._lock.release()

    def close(self) -> None:
        self._pipe.close()


def start_dht(
    identity_path: Path,
    *,
    initial_peers: Sequence[str],
    host: str,
    port: int,
    announce: Sequence[str],
    run_id: str,
    client: bool = False,
    deadline_seconds: float = 60.0,
    founder: bool = False,
) -> RunDHT:
    """Join the run's DHT, or found it where `initial_peers` names nobody else. Blocks; call it from the main thread.

    Args:
        identity_path: made if it does not exist. One process at a time may use it.
        initial_peers: multiaddrs ending in /p2p/<peer id>; own ones are skipped; one must answer before the deadline.
        host: IP address to listen at; 0.0.0.0 or :: for all interfaces.
        port: TCP port to listen at; 0 takes a free one.
        announce: multiaddrs that others should dial instead of those found on the interfaces; may be empty.
        client: take part without storing for others, for peers that nobody can dial.
        deadline_seconds: how long to keep trying, with growing pauses, while nobody answers.
        founder: start alone when the deadline has passed.

    Raises:
        IdentityError: the identity file cannot be used.
        DirectoryError: every cause with its fix: nobody answers (with the reason for each address), port in use,
            identity in use, clocks apart. Nothing is left running.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("start_dht forks a child that dies with the calling thread: call it from the main thread")
    _claim_no_event_loop()
    _free_future_lock()
    _keep_sockets_together()
    own_id = Identity.load_or_create(identity_path).peer_id
    peers = [peer for peer in initial_peers if not peer.endswith(f"/p2p/{own_id}")]
    listen = f"/ip{6 if ':' in host else 4}/{host}/tcp/{port}"
    at_home = Address.of_host(host, 1).reach == 0 and host not in ("0.0.0.0", "::")
    _require_free(host, port)
    deadline = time.monotonic() + deadline_seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            options = DaemonOptions(
                identity_path=identity_path,
                listen=listen,
                announce=announce,
                bootstrap=answering(peers, deadline)[:_MAX_BOOTSTRAP] if peers else [],
                map_port=not at_home,
                client=client,
            )
            return _start_once(options, run_id, deadline)
        except BootstrapFailed as error:
            if time.monotonic() + pause > deadline:
                if not founder:
                    raise
                logger.warning("nobody of this run answers, starting alone: %s", error.cause)
                peers = []
                continue
            logger.warning("dht bootstrap failed, trying again in %.1f s: %s", pause, error.cause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def visible_addresses(dht: hivemind.DHT, *, timeout_seconds: float = 60.0) -> list[str]:
    """Multiaddrs with /p2p/ at which others may dial this node: farthest reaching first, loopback only if nothing else.

    Blocks. Raises DirectoryError if there are none, or if the DHT process does not answer.
    """
    addresses = []
    try:
        told = _ask(dht, _read_addresses, timeout_seconds)
    except ValueError as error:  # hivemind's: IPv6 alone was to be listened at, and is switched off
        raise DirectoryError(
            "the node listens where nobody can dial it: this machine has no address of that kind",
            fix="listen at an address that this machine has",
        ) from error
    for multiaddr in told:
        try:
            addresses.append(Address.parse(multiaddr))
        except ValueError:
            logger.debug("not a TCP address, left out: %s", multiaddr)
    return [str(address) for address in farthest_first(addresses)]


def refusals(dht: RunDHT, *, timeout_seconds: float = 10.0) -> Counter[str]:
    """How many records of others this node's DHT process has refused to store or believe, by reason. Blocks."""
    counted: Counter[str] = _ask(dht, _read_refusals, timeout_seconds)
    return counted


async def _read_refusals(dht: RunDHT, _node: DHTNode) -> Counter[str]:
    return dht._validator.refusals


async def _read_addresses(_dht: hivemind.DHT, node: DHTNode) -> list[str]:
    return [str(address) for address in await node.get_visible_maddrs(latest=True)]


def _ask(dht: hivemind.DHT, question: Any, timeout_seconds: float) -> Any:
    require_alive(dht)
    try:
        return dht.run_coroutine(question, return_future=True).result(timeout_seconds)
    except FutureTimeout:
        raise DirectoryError(
            f"the DHT process did not answer within {timeout_seconds:.0f} s",
            fix="see whether the machine is overloaded, or restart the node",
        ) from None


def require_alive(dht: hivemind.DHT) -> None:
    """Raise DirectoryEnded if the DHT process has: requests to it would wait for ever."""
    if not dht.is_alive():
        why = " after its p2p daemon died" if dht.exitcode == EXIT_DAEMON_DIED else ""
        raise DirectoryEnded(f"the DHT process has ended{why} (exit code {dht.exitcode})", fix="restart this peer")


def _start_once(options: DaemonOptions, run_id: str, deadline: float) -> RunDHT:
    start_sharing()  # a future is in shared memory
    dht = RunDHT(options, run_id)
    dht.start()
    # The deadline is for finding somebody; a start under way gets its time.
    give_up = max(deadline, time.monotonic() + _DAEMON_START_SECONDS + 10)
    while True:
        try:
            dht.wait_until_ready(timeout=0.1)
            return dht
        except FutureTimeout:
            ended = not dht.is_alive()
            if ended or time.monotonic() > give_up:
                _discard(dht)
                raise DirectoryError(
                    f"the DHT process ended at its start (exit code {dht.exitcode})"
                    if ended
                    else "the DHT process did not become ready in time",
                    fix="see its log above, and whether the machine is overloaded",
                ) from None
        except DirectoryError:
            _discard(dht)
            raise
        except Exception as error:
            _discard(dht)
            raise _explain(error, options) from error


def _discard(dht: RunDHT) -> None:
    dht.join(3)
    if dht.is_alive():
        dht.kill()
        dht.join()


def _explain(error: Exception, options: DaemonOptions) -> DirectoryError:
    text = str(error) or type(error).__name__
    asked = ", ".join(options.bootstrap)
    if clocks := _CLOCKS_APART.search(text):
        ahead = float(clocks["local"]) - float(clocks["peer"])
        return ClockOff(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {asked}",
            fix="synchronise the clock (NTP; `timedatectl set-ntp true`), then start again",
        )
    if "can't access this node" in text:
        return DirectoryError(
            f"the peer at {asked} cannot dial back to {options.listen}",
            fix="open that TCP port in the firewall and router, or join as a client",
        )
    if "none of the initial_peers responded" in text:
        return BootstrapFailed(
            f"the peer at {asked} is up, but its DHT does not answer", fix="ask its operator; it may be starting"
        )
    return DirectoryError(f"the DHT did not start: {text}", fix="report this message")


def _claim_no_event_loop() -> None:
    """Outside of coroutines, every future of hivemind's would make asyncio create a loop that nobody ever closes."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.set_event_loop(None)


def _keep_sockets_together() -> None:
    """hivemind puts its own into /tmp, whatever TMPDIR says. For this process and its forks, averagers among them."""
    P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"


def _free_future_lock() -> None:
    """hivemind's processes share one lock for sending results; one that was killed at that moment keeps it for ever."""
    if MPFuture._update_lock.acquire(timeout=_LOCK_SECONDS):
        MPFuture._update_lock.release()
    else:
        logger.warning("a killed process has taken hivemind's result lock with it: making a new one")
        MPFuture.reset_backend()


def _require_free(host: str, port: int) -> None:
    """Raise DirectoryError if the port is taken. The daemon would not notice: it lets others listen at its port too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise DirectoryError(
                f"cannot listen at {host} port {port}: {error.strerror}",
                fix="choose another DHT port, or stop the program that uses it"
                if error.errno == errno.EADDRINUSE
                else "listen at an address that this machine has"
                if error.errno == errno.EADDRNOTAVAIL
                else "listen at an address and port that this user may use",
            ) from None


def _lock_identity(identity_path: Path) -> int:
    """Hold the identity until this process ends; a second holder would steal the first one's connections."""
    descriptor = os.open(identity_path.with_name(identity_path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a POSIX lock: children do not inherit it
    except OSError:
        os.close(descriptor)
        raise DirectoryError(
            f"the identity {identity_path} is in use by another node on this machine",
            fix="stop that node, or give this one a data directory of its own",
        ) from None
    return descriptor


def _forget_signal_handlers() -> None:
    # Inherited ones would run the trainer's shutdown here, or wake its event loop through the shared wake-up socket.
    signal.set_wakeup_fd(-1)
    for name in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, and a terminal that is closed, are the node's to handle
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # through `finally`, which removes the sockets
    for name in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_DFL)
