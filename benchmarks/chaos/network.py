"""A network for one machine's peers: a namespace each, joined by a bridge, with rates, losses and partitions.

    namespace A [eth0 10.77.0.1] -- veth --+
    namespace B [eth0 10.77.0.2] -- veth --+-- bridge          a partition moves veths to a bridge of their own

Bridges stand in a namespace too, so that nothing of this is seen by the machine's own network, and removing the
namespaces removes all of it. Rates are `tc tbf` at both ends of a cable; losses are an nftables rule where packets
arrive.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
SUBNET = "10.77.0"  # in namespaces only: it cannot meet the machine's own
MAIN = "main"
QUEUE_MS = 200  # a full queue holds packets for so long before it drops them, as home routers do
_libc = ctypes.CDLL(None, use_errno=True)


class NetworkMissing(Exception):
    """This machine cannot make the network; the message says what to install or allow."""


class Network:
    """A context manager: leaving it takes down every namespace, and with them all interfaces."""

    def __init__(self) -> None:
        self.mark = f"shoal-{secrets.token_hex(3)}"
        self._hub = f"{self.mark}-hub"
        self.hosts: dict[str, int] = {}  # by name, the last part of the address
        self._behind: dict[str, str] = {}  # by name, the address behind a router
        self._bridges: set[str] = set()

    def __enter__(self) -> Network:
        for tool, package in (("ip", "iproute2"), ("tc", "iproute2")):
            if shutil.which(tool) is None:
                raise NetworkMissing(f"{tool} is not there; on Debian: apt-get install {package}")
        if os.geteuid() != 0:
            raise NetworkMissing("only root may make network namespaces: run this as root")
        try:
            run("ip", "netns", "add", self._hub)
            self._bridge(MAIN)
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NetworkMissing(
                f"this kernel or container lets nobody make namespaces: {error.stderr.strip()}"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
        for name in [name for name in there if name.startswith(self.mark)]:
            run("ip", "netns", "delete", name)

    # -- hosts -----------------------------------------------------------------------------------------------------

    def add(self, host: str) -> str:
        """Make a namespace for `host` and plug it in. Returns its address."""
        number = self.hosts[host] = len(self.hosts) + 1
        namespace, cable = self.namespace(host), self._cable(host)
        run("ip", "netns", "add", namespace)
        run("ip", "-n", self._hub, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "-n", self._hub, "link", "set", cable, "master", MAIN, "up")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "-n", namespace, "address", "add", f"{SUBNET}.{number}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        return self.address(host)

    def add_behind_nat(self, host: str, *, silent: bool = False, symmetric: bool = False) -> str:
        """A router with an address like any other host's, and `host` behind it: it can dial, and nobody can dial it.

        Args:
            silent: who knocks at the router hears nothing; else it refuses.
            symmetric: the router takes another port for each connection, whatever port it comes from.
        """
        if shutil.which("nft") is None:
            raise NetworkMissing("nft is not there, which routers need; on Debian: apt-get install nftables")
        self.add(f"{host}-router")
        router = self.namespace(f"{host}-router")
        number = self.hosts[host] = len(self.hosts) + 1
        inside, gateway = f"192.168.{number}.2", f"192.168.{number}.1"
        self._behind[host] = inside
        namespace = self.namespace(host)
        run("ip", "netns", "add", namespace)
        run("ip", "-n", router, "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "-n", router, "address", "add", f"{gateway}/24", "dev", "eth1")
        run("ip", "-n", router, "link", "set", "eth1", "up")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "-n", namespace, "address", "add", f"{inside}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        run("ip", "-n", namespace, "route", "add", "default", "via", gateway)
        enter = ["ip", "netns", "exec", router]
        run(*enter, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run(*enter, "nft", "add table ip nat")
        run(*enter, "nft", "add chain ip nat leaving { type nat hook postrouting priority srcnat ; }")
        masquerade = "masquerade fully-random" if symmetric else "masquerade"
        run(*enter, "nft", f"add rule ip nat leaving oifname eth0 {masquerade}")
        if silent:
            run(*enter, "nft", "add chain ip nat knocking { type filter hook input priority filter ; }")
            run(*enter, "nft", "add rule ip nat knocking iifname eth0 ct state != established,related drop")
        run(*enter, "nft", "add chain ip nat passing { type filter hook forward priority filter ; }")
        run(*enter, "nft", "add rule ip nat passing iifname eth0 ct state new drop")
        return inside

    def namespace(self, host: str) -> str:
        return f"{self.mark}-{self.hosts[host]}"

    def address(self, host: str) -> str:
        return self._behind.get(host, f"{SUBNET}.{self.hosts[host]}")

    def is_behind_nat(self, host: str) -> bool:
        return host in self._behind

    def _cable(self, host: str) -> str:
        return f"veth{self.hosts[host]}"

    # -- faults ----------------------------------------------------------------------------------------------------

    def partition(self, hosts: Iterable[str], name: str) -> None:
        """Cut `hosts` off from all others; among themselves they still talk. Connections stall, as when a link dies."""
        if name not in self._bridges:
            self._bridge(name)
        for host in hosts:
            run("ip", "-n", self._hub, "link", "set", self._cable(host), "master", name)

    def heal(self, hosts: Iterable[str]) -> None:
        """Plug `hosts` into the main bridge again."""
        for host in hosts:
            run("ip", "-n", self._hub, "link", "set", self._cable(host), "master", MAIN)

    def unplug(self, host: str) -> None:
        """Take the cable out of `host`: its interface is down and it has no route, as when a laptop loses its WLAN."""
        run("ip", "-n", self.namespace(host), "link", "set", "eth0", "down")

    def plug(self, host: str) -> None:
        """Put it back: the same address, no connection told of anything."""
        run("ip", "-n", self.namespace(host), "link", "set", "eth0", "up")

    def set_rate(self, host: str, mbit: float | None) -> None:
        """Bound what `host` sends and receives, each way; None lifts the bound."""
        for namespace, device in ((self.namespace(host), "eth0"), (self._hub, self._cable(host))):
            subprocess.run(
                ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False
            )
            if mbit is not None:
                burst = max(
                    16_000, int(mbit * 1e6 / 8 / 100)
                )  # bytes; what the rate brings in 10 ms, at least a few packets
                run(
                    "tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf",
                    "rate", f"{mbit}mbit", "burst", str(burst), "latency", f"{QUEUE_MS}ms",
                )  # fmt: skip

    def set_loss(self, host: str, percent: int) -> None:
        """Drop so many of a hundred packets that arrive at `host`; 0 for none."""
        if shutil.which("nft") is None:
            raise NetworkMissing("nft is not there, which packet loss needs; on Debian: apt-get install nftables")
        nft = ["ip", "netns", "exec", self.namespace(host), "nft"]
        run(*nft, "add", "table", "inet", "loss")
        run(*nft, "delete", "table", "inet", "loss")
        if percent:
            run(*nft, "add", "table", "inet", "loss")
            run(*nft, "add chain inet loss arriving { type filter hook input priority 0 ; }")
            run(*nft, f"add rule inet loss arriving iifname eth0 numgen random mod 100 < {percent} drop")

    def _bridge(self, name: str) -> None:
        run("ip", "-n", self._hub, "link", "add", name, "type", "bridge")
        run("ip", "-n", self._hub, "link", "set", name, "up")
        self._bridges.add(name)

    # -- going in --------------------------------------------------------------------------------------------------

    def command(self, host: str, command: list[str]) -> list[str]:
        """`command`, to be run in the namespace of `host`; it keeps the process id."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """The calling thread is in the namespace of `host`: sockets that it makes stay there."""
        with open("/proc/thread-self/ns/net") as home, (NAMESPACES / self.namespace(host)).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def get(self, host: str, port: int, path: str, seconds: float) -> bytes:
        """An HTTP GET from 127.0.0.1 in the namespace of `host`. Raises OSError or HTTPException."""
        with self.inside(host):
            connection = socket.create_connection(("127.0.0.1", port), seconds)
        with connection:
            client = http.client.HTTPConnection("127.0.0.1", port)
            client.sock = connection
            client.request("GET", path)
            return client.getresponse().read()


def run(*command: str) -> None:
    """Run a command to its end. Raises CalledProcessError, with what it said."""
    subprocess.run(command, capture_output=True, text=True, check=True)


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the namespace")
