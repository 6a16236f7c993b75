"""What this peer was told: one frozen object made from a TOML file, the environment and flags, the later ones winning.

Everything here is a peer's own choice. What all peers of a run share is in the manifest.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Group, Parameter

from ..protocol.addresses import Address
from ..protocol.pacing import UNLIMITED, Pace, Rates
from .errors import ConfigError, DataDirUnusable
from .logs import LogFormat, LogLevel
from .peer.hours import Hours

Role = Literal["composer", "worker", "bootstrap", "observer"]
Reach = Literal["auto", "direct", "relay"]
ExpertModeName = Literal["full", "lora", "frozen"]  # see `expert_mode.py`, which needs torch
IslandForm = Literal["data", "pipeline"]
PresetName = Literal["tiny", "small", "bench", "standard", "fine-grained"]  # of `model/presets.py`, which needs torch

ENV_PREFIX = "SHOAL_"
DEVICE = r"auto|cpu|cuda(:\d{1,3})?"
DATA = Group("Training", sort_key=1)
NETWORK = Group("Network", sort_key=2)
LOCAL = Group("This machine", sort_key=3)


def default_data_dir() -> Path:
    """$SHOAL_HOME, else ~/.shoal."""
    return Path(os.environ.get("SHOAL_HOME") or "~/.shoal")


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # a user whom the machine does not know, without $HOME
        raise DataDirUnusable(f"{path}: this user has no home folder", fix="give a --data-dir of your own") from None


def parse_gib(text: str) -> float:
    """`24GB` (powers of ten), `24GiB` or `24`, in GiB. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no amount of memory", fix="write it like 24GB, 24GiB or 24")
    return float(found[1]) * (1e9 / (1 << 30) if found[2].lower() == "gb" else 1)


def parse_shard(text: str) -> tuple[int, int]:
    """`"2/4"` as (2, 4).

    Raises:
        ConfigError: it is not INDEX/COUNT.
    """
    index, slash, count = text.partition("/")
    try:
        if not slash:
            raise ValueError
        return int(index), int(count)
    except ValueError:
        raise ConfigError(f"data shard {text!r} is not INDEX/COUNT", fix="write it like 0/4, 1/4, 2/4, 3/4") from None


def parse_ports(text: str) -> range:
    """`"31400-31463"` as a range of ports.

    Raises:
        ConfigError: it is not FIRST-LAST, or fewer than three ports.
    """
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) - 2 <= 65533:
        raise ConfigError(f"relay = {text!r} is no range of ports", fix="give at least three, like 31400-31463")
    return range(int(match[1]), int(match[2]) + 1)


def _shard_from_tokens(_: Any, tokens: Sequence[Any]) -> tuple[int, int]:
    return parse_shard(tokens[0].value)


@Parameter(name="*", negative=())
@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """A peer's own settings.

    Raises:
        ConfigError: a value makes no sense.
    """

    invite: Annotated[str | None, Parameter(parse=False)] = None
    """The run to join, as an invite string; None founds a new one."""

    role: Annotated[Role, Parameter(parse=False)] = "composer"
    """What this peer does: composers train on data, workers train experts for them, bootstrap peers only help others to
    find the run."""

    data: Annotated[str, Parameter(group=DATA)] = "stdlib"
    """Text to train on: a file, a folder, or `stdlib` for the sources of Python's own library. Each line of a `.jsonl`
    file, and each row of a `.parquet` one, has a document as its `text`."""

    data_shard: Annotated[
        tuple[int, int] | None, Parameter(group=DATA, n_tokens=1, metavar="INDEX/COUNT", converter=_shard_from_tokens)
    ] = None
    """Like 0/4: train only on that part of the data. By default on all of it, in an order of this peer's own."""

    max_slots: Annotated[int | None, Parameter(group=DATA)] = None
    """Experts to own at most, counted as slots (one expert in every layer). By default as many as the swarm asks."""

    own: Annotated[Literal["share", "none"], Parameter(group=DATA)] = "share"
    """Experts to own: this peer's `share`, or `none`, to leave all of them to workers and other composers."""

    expert_mode: Annotated[ExpertModeName, Parameter(group=DATA)] = "full"
    """How to train owned experts: all their weights; by `lora`, low-rank factors beside 4-bit weights, in an eighth of
    the memory; or not at all (`frozen`)."""

    lora_rank: Annotated[int, Parameter(group=DATA)] = 16
    """Rank of these factors."""

    lora_alpha: Annotated[float | None, Parameter(group=DATA)] = None
    """Their product counts alpha / rank times. By default twice."""

    max_memory: Annotated[float | None, Parameter(group=LOCAL, metavar="GIB")] = None
    """Memory for the model, in GiB; slots that do not fit are not claimed. By default four fifths of what is free."""

    device: Annotated[str, Parameter(group=LOCAL)] = "auto"
    """Where to train: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one."""

    island: Annotated[int, Parameter(group=LOCAL)] = 1
    """Processes that compute as one composer: one for each GPU, or for some cores."""

    island_form: Annotated[IslandForm, Parameter(group=LOCAL)] = "data"
    """What each of them computes: a batch of its own in every step (`data`), or some of the layers (`pipeline`)."""

    island_every: Annotated[int, Parameter(group=LOCAL)] = 1
    """Steps that processes with batches of their own take before they merge: with 1, gradients in every step; with
    more, each has an optimizer, and weights are averaged."""

    checkpoint_every: Annotated[int | None, Parameter(group=DATA)] = None
    """Steps between checkpoints on disk. By default 500. One is always written on leaving."""

    drain_seconds: Annotated[float, Parameter(group=DATA)] = 30.0
    """Time for a clean hand-over when the peer is told to stop; after that it leaves as it is."""

    join_seconds: Annotated[float, Parameter(group=NETWORK)] = 60.0
    """How long to look for a peer of the invite that answers, and then for the run, before giving up."""

    host: Annotated[str, Parameter(group=NETWORK)] = "0.0.0.0"
    """Address to take other peers' connections on. 0.0.0.0 is every interface; 127.0.0.1 keeps to this machine."""

    dht_port: Annotated[int, Parameter(group=NETWORK)] = 0
    """TCP port of the directory and of averaging. 0 takes a free one; fix it to open it in a firewall."""

    transport_port: Annotated[int, Parameter(group=NETWORK)] = 0
    """TCP port of experts' streams and gossip. 0 takes a free one; fix it to open it in a firewall."""

    announce: Annotated[tuple[str, ...], Parameter(group=NETWORK, metavar="HOST...", show_default=False)] = ()
    """Host names or addresses that others reach this peer at, where it cannot know them: behind NAT, in a container."""

    reach: Annotated[Reach, Parameter(group=NETWORK)] = "auto"
    """How others dial this peer: `direct`, or by ports of the invite's `relay`; `auto` asks the relay which."""

    relay: Annotated[str | None, Parameter(group=NETWORK, metavar="FIRST-LAST")] = None
    """Lend these TCP ports, all of them open, to peers that nobody can dial, two to each. They ask at the first."""

    max_upload: Annotated[float | None, Parameter(group=NETWORK, metavar="MBIT")] = None
    """Megabits per second to send at most, to all peers together. By default as many as there are."""

    max_download: Annotated[float | None, Parameter(group=NETWORK, metavar="MBIT")] = None
    """Megabits per second to take at most, from all peers together. By default as many as there are."""

    hours: Annotated[str | None, Parameter(group=LOCAL, metavar="HH:MM-HH:MM")] = None
    """Take part at these hours of the local day only. At their end the peer hands over; it comes back by itself."""

    http_host: Annotated[str, Parameter(group=NETWORK)] = "127.0.0.1"
    """Address of the status page, metrics and health checks. They are readable by whoever can reach them."""

    http_port: Annotated[int, Parameter(group=NETWORK)] = 0
    """Port of the status page, metrics and health checks. 0 takes a free one; `shoal status` finds it."""

    data_dir: Annotated[Path, Parameter(group=LOCAL)] = field(default_factory=default_data_dir)
    """Where this peer keeps its identity and checkpoints; one peer per directory. $SHOAL_HOME changes the default."""

    threads: Annotated[int | None, Parameter(group=LOCAL)] = None
    """CPU threads to compute with. By default as many as there are cores."""

    log_format: Annotated[LogFormat, Parameter(group=LOCAL)] = "auto"
    """`console` for people, `json` for machines; `auto` is console on a terminal."""

    log_level: Annotated[LogLevel, Parameter(group=LOCAL)] = "info"
    """The least important messages to log. `debug` also shows tracebacks of expected errors."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_dir", _at_home(Path(self.data_dir)).absolute())
        for name, choices in (
            ("role", Role), ("log_format", LogFormat), ("log_level", LogLevel), ("own", Literal["share", "none"]),
            ("reach", Reach), ("expert_mode", ExpertModeName), ("island_form", IslandForm),
        ):  # fmt: skip
            _require(
                getattr(self, name) in get_args(choices), name, self, f"choose from {', '.join(get_args(choices))}"
            )
        _require(self.island >= 1, "island", self, "give the number of processes, or leave it out")
        _require(
            self.island == 1 or self.role == "composer", "island", self, "leave it out: only composers have islands"
        )
        _require(self.island > 1 or self.island_form == "data", "island_form", self, "give --island 2 or more with it")
        _require(1 <= self.island_every <= 1000, "island_every", self, "give steps, from 1 to 1000")
        _require(
            self.island_every == 1 or (self.island > 1 and self.island_form == "data"),
            "island_every", self, "leave it out: only processes with batches of their own can merge less often",
        )  # fmt: skip
        if self.role == "worker":
            _require(self.own != "none", "own", self, "leave it out: a worker that owns no experts has nothing to do")
            _require(self.max_slots != 0, "max_slots", self, "give at least 1: a worker is there to own experts")
        for name in ("dht_port", "transport_port", "http_port"):
            _require(
                0 <= getattr(self, name) <= 65535, name, self, "choose a port from 1 to 65535, or 0 for any free one"
            )
        fixed = [port for port in (self.dht_port, self.transport_port, self.http_port) if port]
        if len(set(fixed)) < len(fixed):
            raise ConfigError("two of dht_port, transport_port and http_port are the same", fix="give each its own")
        for name in ("max_slots", "checkpoint_every", "threads"):
            value = getattr(self, name)
            least = 0 if name == "max_slots" else 1
            _require(value is None or value >= least, name, self, f"give a number of at least {least}, or leave it out")
        _require(self.max_memory is None or 0 < self.max_memory < 1e6, "max_memory", self, "give GiB, or leave it out")
        for name in ("max_upload", "max_download"):
            rate = getattr(self, name)
            _require(rate is None or 0.01 <= rate <= 1e6, name, self, "give megabits per second, from 0.01 up")
        _require(re.fullmatch(DEVICE, self.device) is not None, "device", self, "give cpu, cuda or auto")
        _require(1 <= self.lora_rank <= 1024, "lora_rank", self, "give a number from 1 to 1024")
        alpha = self.lora_alpha
        _require(alpha is None or 0 < alpha <= 1e4, "lora_alpha", self, "give a number above 0, or leave it out")
        _require(0 <= self.drain_seconds <= 3600, "drain_seconds", self, "give seconds from 0 to 3600")
        _require(0 < self.join_seconds <= 86400, "join_seconds", self, "give seconds, at most a day of them")
        if self.data_shard is not None:
            index, count = self.data_shard
            _require(0 <= index < count, "data_shard", self, "of COUNT parts, INDEX counts from 0 to COUNT - 1")
        _require(bool(self.data), "data", self, "name a file, a folder or `stdlib`")
        for name in ("host", "http_host"):
            _require(_is_address(getattr(self, name)), name, self, "give an IP address of this machine, like 0.0.0.0")
        for host in self.announce:
            try:
                Address.of_host(host, 1)
            except ValueError as error:
                raise ConfigError(
                    f"announce = {host!r} is not a host",
                    fix="give only a host name or an IP address, without port; for several, give it several times",
                ) from error
        if self.relay is not None:
            parse_ports(self.relay)
        if self.hours is not None:
            Hours.parse(self.hours)

    @property
    def relay_ports(self) -> range | None:
        """Ports to lend, with the one to ask at first."""
        return None if self.relay is None else parse_ports(self.relay)

    @functools.cached_property
    def pace(self) -> Pace:
        """The bandwidth that all of this peer's processes share; its state lies in the data directory."""
        rates = Rates(*(None if mbit is None else mbit * 1e6 / 8 for mbit in (self.max_upload, self.max_download)))
        return UNLIMITED if rates == Rates() else Pace(self.data_dir, rates)

    @property
    def identity_path(self) -> Path:
        """The file with the key that this peer's id follows from."""
        return self.data_dir / "identity.key"

    @property
    def handle_key_path(self) -> Path:
        """The file with the handle key of runs that were founded here."""
        return self.data_dir / "handle.key"

    def dialable_hosts(self) -> tuple[str, ...]:
        """Hosts to tell other peers, best first: what `announce` says, else the bound address, else the address of the
        interface that leads out of this machine, else 127.0.0.1 (nobody else can dial that; say so)."""
        if self.announce:
            return self.announce
        bound = ipaddress.ip_address(self.host)
        return (self.host,) if not bound.is_unspecified else (outward_address(bound.version),)


def outward_address(version: int = 4) -> str:
    """The address of this machine that it would speak to the internet from; loopback if it has no route out.

    Connecting a datagram socket sends nothing: it only makes the kernel choose a route. The target is of a block that
    is reserved for documentation.
    """
    family, target, loopback = (
        (socket.AF_INET, "192.0.2.1", "127.0.0.1") if version == 4 else (socket.AF_INET6, "2001:db8::1", "::1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return loopback
        return str(probe.getsockname()[0])


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _require(holds: bool, name: str, config: PeerConfig, fix: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {getattr(config, name)!r} is not possible", fix=fix)
