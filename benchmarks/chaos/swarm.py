"""One run of real peers in namespaces, from founding to the merged model's held-out loss."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...node.learning.evaluate import evaluate_checkpoint
from ...node.run.kept_manifests import manifest_file
from ...node.run.manifest import verify
from .network import Network
from .peers import Peers
from .playing import POLL_SECONDS, Played, Player
from .quota import Quotas
from .relay import Relays
from .tape import LIARS, Tape

START_SECONDS = 300.0  # eight peers import torch on two cores
EXPORT_SECONDS = 300.0
SETTLE_LEASES = 4  # of the last killed peer, its heirs' turns, and what a busy machine adds
STEPS = 1_000_000  # the clock ends a run, not the schedule: so the learning rate stays where it is after the warm-up


class SwarmFailed(Exception):
    """The swarm did not get going, or a part of the measurement failed; the message has the ends of the logs."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all runs of one comparison share."""

    composers: Sequence[str]
    seconds: float
    preset: str = "tiny"
    settings: Sequence[str] = ()  # PART.FIELD=VALUE
    lease_seconds: float = 20.0
    latency_ms: float = 0.0
    jitter: float = 0.0
    rate_mbit: float | None = None
    cores: float | None = None  # that each peer has; None: all share the machine
    windows: int = 128
    keep: Path | None = None  # where to leave logs


@contextlib.contextmanager
def started(setup: Setup, tape: Tape) -> Iterator[tuple[Network, Peers, Relays | None]]:
    """A founder and all composers, in a network; everything is gone afterwards. They need not have joined yet."""
    lies = {peer: fault.fault for fault in tape if fault.fault in LIARS for peer in fault.peers}
    disks = {peer for fault in tape if fault.fault == "disk" for peer in fault.peers}
    clocks = {peer for fault in tape if fault.fault == "clock" for peer in fault.peers}
    relayed = setup.latency_ms > 0 or any(fault.fault == "latency" for fault in tape)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        network = stack.enter_context(Network())
        relays = Relays(network, setup.jitter) if relayed else None
        if relays is not None:
            stack.callback(relays.close)
        if setup.keep is not None:
            stack.callback(_keep_logs, folder, setup.keep)
        quotas = None if setup.cores is None else stack.enter_context(Quotas(setup.cores))
        peers = stack.enter_context(Peers(network, folder, relays, quotas))

        def add(name: str, command: Sequence[str]) -> None:
            peers.add(name, command, lie=lies.get(name, ""), small_disk=name in disks, own_clock=name in clocks)
            if relays is not None:
                relays.set_latency(name, setup.latency_ms)
            if setup.rate_mbit is not None:
                network.set_rate(name, setup.rate_mbit)

        found = ["found", "--preset", setup.preset, "--steps", str(STEPS), "--min-composers", str(len(setup.composers))]
        found += ["--lease-seconds", str(setup.lease_seconds)]
        for setting in setup.settings:
            found += ["--set", setting]
        add("founder", found)
        founder = peers.all["founder"]
        wait(peers, lambda: bool(founder.status.get("invite")), "founding")
        count = len(setup.composers)
        for index, name in enumerate(setup.composers):
            join = ["join", founder.status["invite"], "--data-shard", f"{index}/{count}", "--checkpoint-every", "20"]
            add(name, join)
        yield network, peers, relays


def wait(peers: Peers, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> float:
    """Poll until `condition()`. Returns the seconds that took; SwarmFailed after `seconds`, or if a peer gives up."""
    began, pause = time.monotonic(), threading.Event()
    while not condition():
        if time.monotonic() - began > seconds or any(peer.gave_up for peer in peers.all.values()):
            tails = [
                f"--- {p.name}: {p.phase}\n{p.log.read_text(errors='replace')[-1500:]}" for p in peers.all.values()
            ]
            raise SwarmFailed("\n".join([f"{what}: not within {time.monotonic() - began:.0f} s", *tails]))
        pause.wait(POLL_SECONDS)
        peers.poll()
    return time.monotonic() - began


def play(setup: Setup, tape: Tape, say: Callable[[str], None]) -> Played:
    """The whole run. The same tape and setup are the same faults at the same times."""
    with started(setup, tape) as (network, peers, relays):
        wait(peers, lambda: sum(p.commits > 0 for p in peers.composers) > len(peers.composers) / 2, "the first merges")
        signed = manifest_file(peers.folder / "founder", peers.all["founder"].status["run_id"]).read_bytes()
        manifest = verify(signed)
        player = Player(
            network, peers, relays,
            tokens_per_step=manifest.train.batch_size * manifest.data.context_length,
            latency_ms=setup.latency_ms, rate_mbit=setup.rate_mbit, say=say,
        )  # fmt: skip
        played = player.play(tape, setup.seconds)
        heirs = SETTLE_LEASES * setup.lease_seconds
        with contextlib.suppress(SwarmFailed):  # then the export says which slot nobody owns
            wait(peers, lambda: _all_owned(peers), "every slot is owned", heirs)
        invite, out = peers.all["founder"].status["invite"], peers.folder / "model"
        exported = peers.call("export", ["export", invite, str(out)], EXPORT_SECONDS)
        if exported.returncode:
            say(f"no export: {exported.stderr[-1000:]}")
        codes = peers.leave()
        if any(codes.values()) or None in codes.values():
            say(f"exit codes: {codes}")
        if not exported.returncode:
            context = manifest.data.context_length
            played.nats_per_token = evaluate_checkpoint(
                out, windows=setup.windows, context_length=context
            ).nats_per_token
        return played


def _all_owned(peers: Peers) -> bool:
    living = [peer for peer in peers.composers if peer.alive]
    owned = {slot for peer in living for slot in peer.leases}
    return len(owned) == max(int(peer.status.get("slots_total", 0)) for peer in living) > 0


def _keep_logs(folder: Path, keep: Path) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, keep / log.name)
