"""Runs as a script: a warm template that forks peers for averaging_swarm.py; importing torch and hivemind is slow.

argv[1]  address of the test's Unix socket. The template connects first and then receives one dict per peer to fork;
         each peer connects to the same address, says who it is, and obeys ("submit", vector, kwargs),
         ("sketch", vector or None, kwargs), ("abandon", round, times) and ("stop",).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from contextlib import aclosing, suppress
from multiprocessing.connection import Client
from pathlib import Path

import msgspec
import numpy as np
import torch
from hivemind.p2p import P2P
from hivemind.proto import averaging_pb2
from hivemind.utils.asyncio import as_aiter
from shoal.protocol.averaging.allreduce import TruthfulRunner
from shoal.protocol.averaging.averager_process import AveragerProcess
from shoal.protocol.averaging.averaging import OuterAverager
from shoal.protocol.averaging.fragments import Fragment
from shoal.protocol.averaging.sketch_averaging import SketchAverager, credited_tokens
from shoal.protocol.directory.dht import start_dht, visible_addresses
from shoal.protocol.identity import Identity
from shoal.protocol.pacing import UNLIMITED, Pace, Rates
from shoal.protocol.process_death import end_with_parent


class WeightLiar(TruthfulRunner):
    """States weight 1e9 with each part."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = 1e9


class LiarProcess(AveragerProcess):
    runner_type = WeightLiar


class Lingers(TruthfulRunner):
    """Gives what it sent time to arrive before it trips over its own NaN and hangs up."""

    async def _reduce_own_parts(self, peer_index):
        await asyncio.sleep(3)
        await super()._reduce_own_parts(peer_index)


class NanProcess(AveragerProcess):
    runner_type = Lingers


class Repeats(TruthfulRunner):
    """Sends every reducer its first part twice, so that one of them is taken for somebody else's."""

    async def _exchange_with(self, peer_id, peer_index):
        part, _ = self.tensor_part_container._input_parts_by_peer[peer_index][0]
        again = averaging_pb2.AveragingData(
            code=averaging_pb2.PART_FOR_AVERAGING, group_id=self.group_id, tensor_part=self._codec.encode(part)
        )
        async with aclosing(await self._get_peer_stub(peer_id).rpc_aggregate_part(as_aiter(again))):
            await super()._exchange_with(peer_id, peer_index)


class Late(TruthfulRunner):
    """Sends its parts after all others."""

    async def _exchange_with(self, peer_id, peer_index):
        await asyncio.sleep(1.5)
        await super()._exchange_with(peer_id, peer_index)


class Dies(TruthfulRunner):
    """Ends as by SIGKILL when it has sent its first parts, and waits for their averages."""

    async def _exchange_with(self, peer_id, peer_index):
        asyncio.get_running_loop().call_later(0.7, os.kill, os.getpid(), signal.SIGKILL)
        await super()._exchange_with(peer_id, peer_index)


class Floods(TruthfulRunner):
    """Announces a message of a terabyte, and sends as much of it as is taken."""

    async def _exchange_with(self, peer_id, peer_index):
        name = AveragerProcess._get_handle_name(self._prefix, "rpc_join_group")
        _, _, writer = await self._p2p.call_binary_stream_handler(peer_id, name)
        writer.write(P2P.MESSAGE_MARKER + (1 << 40).to_bytes(P2P.HEADER_LEN, P2P.BYTEORDER))
        with suppress(OSError):
            for _ in range(200):
                writer.write(bytes(1 << 20))
                await writer.drain()
        writer.close()
        await super()._exchange_with(peer_id, peer_index)


class Mute(TruthfulRunner):
    """Takes parts, and never says what they average to."""

    async def rpc_aggregate_part(self, stream, context):
        await asyncio.Event().wait()
        yield averaging_pb2.AveragingData()


class Babbles(TruthfulRunner):
    """Answers with what no message says."""

    async def rpc_aggregate_part(self, stream, context):
        yield averaging_pb2.AveragingData(code=99)


def process_with(runner):
    """An averager's process that runs its groups in another way."""
    return type(AveragerProcess.__name__, (AveragerProcess,), {"runner_type": runner})


class FrozenProcess(AveragerProcess):
    """Finds its group and then does nothing, so that the test can kill it exactly there."""

    async def _average(self, group, fragment, facts):
        os.write(self.frozen_fd, b"!")
        await asyncio.Event().wait()


class CountingProcess(AveragerProcess):
    """Says how many tasks wait, after a search, for what can only come in one."""

    async def _run_order(self, order):
        report = await super()._run_order(order)
        waiting = len(self._matchmakings[0].was_accepted_to_group._waiters)
        return msgspec.structs.replace(report, detail=str(waiting))


class SendsNan:
    """Sends what the real one refuses to send."""

    @staticmethod
    def _may_send(vector):
        return True


class Freeloads:
    """Wants to receive what another one owns."""

    def _submit(self, *args, receiver, **kwargs):
        return super()._submit(*args, receiver=self._identity.peer_id, **kwargs)


RUNNERS = {"repeats": Repeats, "late": Late, "floods": Floods, "dies": Dies, "mute": Mute, "babbles": Babbles}


def faulty(kind, fault):
    """`kind`, or what a peer with this fault has in its place."""
    bases = {"nan": (SendsNan,), "freeloader": (Freeloads,)}.get(fault, ())
    processes = {
        "liar": LiarProcess,
        "nan": NanProcess,
        "frozen": FrozenProcess,
        "frozen client": FrozenProcess,
        "counting": CountingProcess,
        **{name: process_with(runner) for name, runner in RUNNERS.items()},
    }
    process = processes.get(fault, AveragerProcess)
    return type(kind.__name__, (*bases, kind), {"process_type": process})


# The group's RPCs are named after the class.
for process_type in (LiarProcess, NanProcess, FrozenProcess, CountingProcess):
    process_type.__name__ = AveragerProcess.__name__


def serve(address: str, spec: dict) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    identity = Identity.load_or_create(Path(spec["identity"]))
    dht = start_dht(
        Path(spec["identity"]),
        initial_peers=spec["initial_peers"],
        host="127.0.0.1",
        port=0,
        announce=[],
        run_id=spec["run_id"],
        client=spec["fault"].endswith("client"),
    )
    frozen, frozen_fd = os.pipe()
    FrozenProcess.frozen_fd = frozen_fd
    common = {
        "dht": dht,
        "identity": identity,
        "run_id": spec["run_id"],
        "codec": spec["codec"],
        "matchmaking_seconds": spec["matchmaking_seconds"],
        "timeout_seconds": spec["timeout_seconds"],
        "part_bytes": spec["part_bytes"],
        "pace": UNLIMITED if spec["pace"] is None else Pace(Path(spec["pace"][0]), Rates(*spec["pace"][1:])),
    }
    averager = faulty(OuterAverager, spec["fault"])(
        fragments=[Fragment(i, tuple(t), tuple(t.values()), sum(t.values())) for i, t in enumerate(spec["sizes"])],
        robust=spec["robust"],
        **common,
    )
    sketcher = None
    if spec["sketches"]:
        num_slots, numel = spec["sketches"]
        sketcher = faulty(SketchAverager, spec["fault"])(
            num_slots=num_slots, numel=numel, sketcher=spec["sketcher"], **common
        )
    if spec["fault"] == "forged":
        averager._run_id = "another-run"
    connection, writing = Client(address), threading.Lock()

    def send(kind, value):
        with writing:
            connection.send((kind, value))

    def report(future):
        error = future.exception()
        if error is not None:
            return send("error", (type(error).__name__, str(error)))
        outcome = future.result()
        return send(
            "outcome",
            {
                **{name: getattr(outcome, name) for name in outcome.__dataclass_fields__},
                "status": outcome.status.value,
                "average": None if outcome.average is None else outcome.average.numpy(),
                "tokens": [fact.tokens for fact in outcome.facts],
                "credited": credited_tokens(outcome) if outcome.status.value == "complete" else None,
            },
        )

    def watch_frozen():
        os.read(frozen, 1)
        send("frozen", None)

    addrs = visible_addresses(dht)
    send(
        "ready",
        {
            "name": spec["name"],
            "pid": os.getpid(),
            "averager": averager.pid,
            "peer_id": identity.peer_id,
            "addrs": addrs,
        },
    )
    if spec["fault"].startswith("frozen"):
        threading.Thread(target=watch_frozen, daemon=True).start()
    while True:
        command, *rest = connection.recv()
        if command == "stop":
            break
        if command == "abandon":
            round_, times = rest
            for _ in range(times):
                averager.abandon(round_)
            continue
        vector, kwargs = rest
        if command == "sketch":
            vector = None if vector is None else torch.from_numpy(np.array(vector))
            sketcher.submit(kwargs.pop("slot"), kwargs.pop("interval"), vector, **kwargs).add_done_callback(report)
            continue
        averager.submit(
            kwargs.pop("round"), kwargs.pop("attempt"), torch.from_numpy(np.array(vector)), **kwargs
        ).add_done_callback(report)
    averager.shutdown()
    if sketcher is not None:
        sketcher.shutdown()
    dht.shutdown()
    send("stopped", None)


def main() -> None:
    end_with_parent(os.getppid(), signal.SIGKILL)
    if "bitsandbytes" in sys.argv[2:]:
        from shoal.kernels.bnb import bitsandbytes  # noqa: F401  # at a third of the time
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the peers: the test watches their pids
    control = Client(sys.argv[1])
    control.send(("template", None))
    while (spec := control.recv()) is not None:
        if os.fork() == 0:
            control.close()
            try:
                serve(sys.argv[1], spec)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
