"""Checks that need nobody else: versions, memory, disk, GPU, files, ports, the data directory, text."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ...protocol.errors import ShoalError
from ...protocol.identity import Identity
from ..config import PeerConfig
from ..errors import ConfigError, IdentityInUse, NoPeerHere, PeerDied
from ..storage.presence import find_peer, hold_data_dir
from .findings import Finding, fail, ok, warn

GIB = 1 << 30
LEAST_MEMORY, GOOD_MEMORY = 1 * GIB, 3 * GIB  # a peer's processes hold 1.5 GB before any model
LEAST_DISK, GOOD_DISK = 256 << 20, 4 * GIB
GOOD_FILES = 1024
GOOD_SHM = 256 << 20
WRITTEN = 32 << 20
SLOW_DISK = 20e6  # bytes per second
READ = 256 << 20  # bytes of a text: its documents are counted in memory
_FINE = (0, errno.EADDRINUSE)


def machine_checks(config: PeerConfig) -> Iterator[Finding]:
    """Every one of them, as it is done."""
    checks: tuple[Callable[[PeerConfig], Finding], ...] = (
        _versions, _memory, _disk, _shared_memory, _files, _gpu, _data_dir, _ports, _text,
    )  # fmt: skip
    for check in checks:
        yield check(config)


def _versions(_: PeerConfig) -> Finding:
    wrong = []
    for text in metadata.requires("shoal") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        return fail("versions", "; ".join(wrong), "install what constraints.txt names, or use the image")
    return ok(
        "versions", f"torch {metadata.version('torch')}, hivemind {metadata.version('hivemind')} and the rest fit"
    )


def _memory(config: PeerConfig) -> Finding:
    import torch

    from ..capacity import free_bytes

    free = free_bytes(torch.device("cpu"))
    said = f"{free / GIB:.1f} GiB are free"
    if free < LEAST_MEMORY:
        return fail("memory", said, "close other programs, or give the container more: a peer begins with 1.5 GB")
    if free < GOOD_MEMORY:
        return warn("memory", said, "enough for `tiny`; bigger models want more")
    if config.max_memory is not None and config.max_memory * GIB > free:
        return warn("memory", f"{said}, and --max-memory says {config.max_memory:g}", "give --max-memory less")
    return ok("memory", said)


def _disk(config: PeerConfig) -> Finding:
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(config.data_dir).free
        if free < LEAST_DISK + WRITTEN:
            return fail("disk", f"{free / GIB:.2f} GiB are free", "free some, or give another --data-dir")
        speed = _write_speed(config.data_dir)
    except OSError as error:
        return fail("disk", f"cannot write to {config.data_dir}: {error.strerror}", "give a --data-dir of your own")
    said = f"{free / GIB:.1f} GiB are free, written at {speed / 1e6:.0f} MB/s"
    if free < GOOD_DISK:
        return warn("disk", said, "two checkpoints lie there, each with 12 bytes a trained weight")
    if speed < SLOW_DISK:
        return warn("disk", said, "checkpoints take long; a data directory on a local disk is faster")
    return ok("disk", said)


def _write_speed(folder: Path) -> float:
    """Bytes per second, until they are on the disk."""
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.monotonic()
        for _ in range(WRITTEN // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return WRITTEN / max(1e-6, time.monotonic() - began)


def _shared_memory(_: PeerConfig) -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return warn("shared memory", "there is no /dev/shm", "in a container, mount one: averages lie there")
    free = shutil.disk_usage(path).free
    said = f"{free / (1 << 20):.0f} MiB are free"
    if free < GOOD_SHM:
        return warn("shared memory", said, "averages lie there: docker run --shm-size 1g")
    return ok("shared memory", said)


def _files(_: PeerConfig) -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    said = f"{limit} may be open at a time"
    if limit < GOOD_FILES:
        return warn("files", said, "raise it: ulimit -n 4096, or LimitNOFILE= in a unit")
    return ok("files", said)


def _gpu(config: PeerConfig) -> Finding:
    import torch

    from ..capacity import devices_of

    try:
        device = devices_of(config.device, config.island)[0]
    except ConfigError as error:
        return Finding.of("GPU", error)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        index = device.index or 0
        free, total = torch.cuda.mem_get_info(index)
        return ok("GPU", f"{', '.join(names)}; {free / GIB:.1f} of {total / GIB:.1f} GiB free on cuda:{index}")
    if shutil.which("nvidia-smi") is not None:
        return warn("GPU", "there is a driver, and torch can use no GPU", "install a CUDA build of torch")
    return ok("GPU", "none: trains on the CPU")


def _data_dir(config: PeerConfig) -> Finding:
    died: PeerDied | None = None
    try:
        url = find_peer(config.data_dir)
    except PeerDied as error:
        died = error
    except (NoPeerHere, OSError):
        pass
    else:
        return ok("data directory", f"a peer runs on {config.data_dir}; its status is at {url}/status")
    try:
        with hold_data_dir(config.data_dir):
            if not config.identity_path.exists():
                return ok("data directory", f"{config.data_dir} is free; the first start makes its key")
            identity = Identity.load(config.identity_path)
    except IdentityInUse as error:
        return warn("data directory", error.cause, error.fix)
    except ShoalError as error:
        return Finding.of("data directory", error)
    except OSError as error:
        return fail("data directory", f"{config.data_dir}: {error.strerror}", "give a --data-dir of your own")
    if died is not None:
        return warn("data directory", died.cause, died.fix)
    return ok("data directory", f"{config.data_dir} is free, its peer is {identity.peer_id}")


def _ports(config: PeerConfig) -> Finding:
    fixed = {
        "--dht-port": (config.host, config.dht_port),
        "--transport-port": (config.host, config.transport_port),
        "--http-port": (config.http_host, config.http_port),
    }
    problems = {name: _why_not(host, port) for name, (host, port) in fixed.items()}
    taken = [f"{name} {fixed[name][1]}" for name, why in problems.items() if why == errno.EADDRINUSE]
    barred = [f"{name} on {fixed[name][0]}: {os.strerror(why)}" for name, why in problems.items() if why not in _FINE]
    if barred:
        fix = "give ports from 1024 up, and --host and --http-host addresses of this machine"
        return fail("ports", f"cannot be listened on: {'; '.join(barred)}", fix)
    if taken:
        fix = "if the peer itself runs, that is why; else choose others"
        return warn("ports", f"in use: {', '.join(taken)}", fix)
    chosen = [f"{port}" for _, port in fixed.values() if port]
    return ok("ports", f"{', '.join(chosen)} free" if chosen else "none fixed: any free ones are taken at the start")


def _text(config: PeerConfig) -> Finding:
    from ..learning.token_file import check_text

    if config.data == "stdlib":
        return ok("text", "the sources of Python's own library, unless the run names another text")
    try:
        documents, read = check_text(config.data, READ)
    except ShoalError as error:
        return Finding.of("text", error)
    least = "at least " if read > READ else ""
    return ok("text", f"{least}{documents:,} documents in {config.data}, {read / 1e6:.1f} MB")


def _why_not(host: str, port: int) -> int:
    """0 if it can be listened on, else the error's number."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno or errno.EIO
    return 0
