"""Averaging with peers: the trainer's side. It starts the averager process and talks to it.

    submit(round r, ...)  ->  fragment r mod P, signed facts  ->  averager process  ->  Future[Outcome]

`Averager` is what all kinds of averaging have in common, `OuterAverager` averages pseudo-gradients of the backbone.

See `averager_process` for the other side, `allreduce` for what an Outcome can be trusted with.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import wait

import msgspec
import torch
from hivemind.dht import DHT
from torch import Tensor

from ..errors import AveragerEnded, RoundFailed
from ..identity import Identity
from ..pacing import UNLIMITED, Pace
from .averager_process import AveragerProcess, RoundTimes
from .facts import RoundFacts, pack_norms, sign_facts
from .fragments import Fragment
from .merging import Weighting
from .outcome import Order, Outcome, Report, Status
from .parts import PART_BYTES, CodecName, PartCodec, sendable
from .rounds import fragment_of

log = logging.getLogger(__name__)

__all__ = ["Averager", "Outcome", "OuterAverager", "Status"]

START_SECONDS = 120.0
GRACE_SECONDS = 5.0  # past a round's own timeout, before the process counts as stuck
_TICK_SECONDS = 0.5


@dataclass
class _Pending:
    future: Future[Outcome]
    order: Order
    submitted: float  # monotonic seconds
    abandoned: bool = False  # told once: a process that hangs reads nothing, and a full pipe holds up who writes


class Averager:
    """One averager process for all fragments of one kind.

    Construct it on the main thread, after the DHT and before any other thread or CUDA context: it forks, and the child
    is tied to the life of the thread that forked it. The process dies with this one, even on SIGKILL.

    Args:
        dht: a running DHT whose peer id is `identity`'s. Matchmaking stores unsigned entries under keys that start with
            `<run_id>-<purpose>.0b`.
        fragments: vectors, numbered from 0, the same on all peers. Their names bind whatever else must be the same.
        codec: of vectors on the wire, both ways.
        robust: whether averages are robust ones (`robust.py`).
        matchmaking_seconds: how long a round waits for missing members.
        timeout_seconds: after which a round has failed, matchmaking included.
        part_bytes: encoded bytes in one message; the same on all peers.
        pace: what parts take from, both ways.

    Raises:
        ValueError: the identity is not the DHT's, or the times do not fit in each other.
        RoundFailed: the process did not start.
    """

    process_type: type[AveragerProcess] = AveragerProcess
    purpose = "outer"  # part of the DHT keys and of the names of remote calls
    weighting = Weighting.PROGRESS

    def __init__(
        self,
        *,
        dht: DHT,
        identity: Identity,
        run_id: str,
        fragments: Sequence[Fragment],
        codec: CodecName,
        matchmaking_seconds: float,
        timeout_seconds: float,
        part_bytes: int = PART_BYTES,
        robust: bool = False,
        pace: Pace = UNLIMITED,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("the averager forks: construct it on the main thread")
        if dht.peer_id.to_base58() != identity.peer_id:
            raise ValueError(f"the DHT runs as {dht.peer_id.to_base58()}, the identity is {identity.peer_id}")
        if [fragment.index for fragment in fragments] != list(range(len(fragments))) or not fragments:
            raise ValueError("fragments must be numbered from 0")
        self._identity, self._run_id = identity, run_id
        self._fragments = tuple(fragments)
        self._times = RoundTimes(matchmaking=matchmaking_seconds, round=timeout_seconds)
        PartCodec(codec).round_trip(torch.zeros(1))  # loads the codec here: in the child it would cost the first round
        self._reader, writer = multiprocessing.Pipe(duplex=False)
        self._process = self.process_type(
            dht=dht,
            run_id=run_id,
            fragments=fragments,
            codec=PartCodec(codec),
            times=self._times,
            part_bytes=part_bytes,
            reports=writer,
            purpose=self.purpose,
            weighting=self.weighting,
            robust=robust,
            pace=pace,
        )
        self._lock = threading.Lock()  # guards the five below, and the control pipe against interleaved writes
        self._pending: dict[int, _Pending] = {}
        self._busy: dict[int, int] = {}  # ticket to the fragment whose shared buffers it uses
        self._given_up: dict[int, float] = {}  # ticket to the monotonic seconds at which nobody waited for it any more
        self._next_ticket = 0
        self._dead: str | None = None
        self._process.start()
        writer.close()  # the child's copy is then the only one: its death shows as end of file
        try:
            self._process.wait_until_ready(timeout=START_SECONDS)
        except TimeoutError as error:
            self._process.kill()
            raise RoundFailed(f"the averager process did not start within {START_SECONDS} s") from error
        self._collector = threading.Thread(target=self._collect, name=f"{self.purpose}-averager", daemon=True)
        self._collector.start()

    @property
    def pid(self) -> int:
        """Of the averager process."""
        return int(self._process.pid)

    def require_alive(self) -> None:
        """Raise AveragerEnded, with the reason, if the process has ended: no round will ever succeed again."""
        with self._lock:
            if self._dead is not None:
                raise AveragerEnded(self._dead, fix="restart this peer")

    def _submit(
        self,
        round_: int,
        attempt: int,
        value: Tensor | None,
        *,
        tokens: int,
        steps: int,
        expected: int,
        quorum: int,
        grace: float,
        base: bytes,
        avoid: Collection[str],
        receiver: str = "",
        norms: Sequence[float] = (),
    ) -> Future[Outcome]:
        """As `OuterAverager.submit`. With `value` None and no tokens, this peer is the `receiver`."""
        fragment = self._fragments[fragment_of(round_, len(self._fragments))]
        if value is not None and value.shape != (fragment.numel,):
            raise ValueError(f"fragment {fragment.index} has {fragment.numel} elements, got {tuple(value.shape)}")
        if (value is None) != (tokens == 0) or (value is None) != (receiver == self._identity.peer_id):
            raise ValueError(f"{tokens} tokens, and the vector or the receiver {receiver!r} says otherwise")
        if quorum < 2 or expected < 1 or tokens < 0 or steps < 1:
            raise ValueError(f"quorum {quorum} < 2, negative tokens, or expected or steps below 1")
        own = RoundFacts(
            peer_id=self._identity.peer_id,
            round=round_,
            attempt=attempt,
            fragment=fragment.index,
            tokens=tokens,
            steps=steps,
            base=base,
            reduces=not self._process.client_mode,
            issued_at=time.time(),
            packed_norms=pack_norms(norms),
        )
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()  # an all-reduce cannot be cancelled: groupmates count on it
        with self._lock:
            if self._dead is not None:
                future.set_exception(AveragerEnded(self._dead, fix="restart this peer"))
                return future
            if fragment.index in self._busy.values():
                raise RoundFailed(f"fragment {fragment.index} is still being averaged")
            vector = self._process.vectors[fragment.index].tensor
            if value is None:
                vector.zero_()
            else:
                vector.copy_(value.detach())
            if not self._may_send(vector) or not all(map(math.isfinite, norms)):
                future.set_result(
                    Outcome(Status.REFUSED, round_, attempt, detail="the own vector is not finite, or absurdly large")
                )
                return future
            ticket = self._next_ticket
            self._next_ticket += 1
            order = Order(
                ticket=ticket,
                own=own,
                signed_facts=sign_facts(self._identity, self._run_id, own),
                expected=expected,
                quorum=quorum,
                grace=grace,
                avoid=frozenset(avoid),
                receiver=receiver,
            )
            self._pending[ticket] = _Pending(future, order, time.monotonic())
            self._busy[ticket] = fragment.index
            self._order("_round", msgspec.msgpack.encode(order))
        return future

    def abandon(self, round_: int) -> None:
        """Stop looking for members of a round, e.g. because others have committed it; its outcome is then NO_GROUP.

        Without effect once a group has met: its members count on each other.
        """
        with self._lock:
            for ticket, pending in self._pending.items():
                if pending.order.own.round == round_ and not pending.abandoned:
                    pending.abandoned = True
                    self._order("_abandon", ticket)

    def shutdown(self) -> None:
        """Stop the process, serving groupmates' last parts first. Pending futures get AveragerEnded. Idempotent."""
        with self._lock:
            self._dead = self._dead or "the averager was shut down"
            alive = self._process.is_alive()
        if alive:
            self._process.shutdown()
            self._process.join(GRACE_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        if threading.current_thread() is not self._collector:  # a future's callback may shut down
            self._collector.join(GRACE_SECONDS)

    def _order(self, method: str, argument: object) -> None:
        """Call a method of the process. The lock must be held."""
        try:
            self._process._outer_pipe.send((method, [argument], {}))
        except OSError as error:  # the collector sees the death too, and fails the futures
            log.warning("averager process is gone: %s", error)

    @staticmethod
    def _may_send(vector: Tensor) -> bool:
        return sendable(vector)

    def _collect(self) -> None:
        """Thread: turn reports into outcomes until the process ends."""
        while True:
            ready = wait([self._reader, self._process.sentinel], timeout=_TICK_SECONDS)
            if self._reader in ready:
                try:
                    data = self._reader.recv_bytes()
                except (EOFError, OSError):
                    break
                self._resolve(msgspec.msgpack.decode(data, type=Report))
            elif ready:
                break
            self._expire()
        with self._lock:
            self._dead = self._dead or f"the averager process ended (exit code {self._process.exitcode})"
            orphans = list(self._pending.values())
            self._pending.clear()
        self._reader.close()
        for pending in orphans:
            pending.future.set_exception(AveragerEnded(self._dead, fix="restart this peer"))

    def _resolve(self, report: Report) -> None:
        with self._lock:
            self._busy.pop(report.ticket)
            self._given_up.pop(report.ticket, None)
            pending = self._pending.pop(report.ticket, None)
            if pending is None:
                return  # it came after its time
            own = pending.order.own
            numel = self._fragments[own.fragment].numel
            complete = report.status is Status.COMPLETE
            average = self._process.vectors[own.fragment].tensor.clone() if complete else None
        outcome = Outcome(
            status=report.status,
            round=own.round,
            attempt=own.attempt,
            average=average,
            members=report.members,
            facts=report.facts,
            failed=report.failed,
            proven=report.proven,
            suspicion=report.suspicion,
            fraction=report.whole / numel,
            seconds=time.monotonic() - pending.submitted,
            matchmaking_seconds=report.matchmaking_seconds,
            quorum_seconds=report.quorum_seconds,
            bytes_sent=report.bytes_sent,
            bytes_received=report.bytes_received,
            detail=report.detail,
        )
        log.debug(
            "%s round=%d.%d %s members=%d %.2fs %s",
            self.purpose,
            own.round,
            own.attempt,
            report.status.value,
            len(report.members),
            outcome.seconds,
            report.detail,
        )
        pending.future.set_result(outcome)

    def _expire(self) -> None:
        """Give up on orders that a stuck process does not answer. Their fragments stay busy, as it may only have been
        paused, with this one or without; one that has not answered after as long again never will, and is ended."""
        limit = self._times.round + GRACE_SECONDS
        now = time.monotonic()
        with self._lock:
            late = [ticket for ticket, pending in self._pending.items() if now - pending.submitted > limit]
            expired = [self._pending.pop(ticket) for ticket in late]
            self._given_up.update(dict.fromkeys(late, now))
            if self._dead is None and any(now - since > limit for since in self._given_up.values()):
                self._dead = f"the averager process answered nothing for {2 * limit:.0f} s"
                self._process.kill()
        for pending in expired:
            own = pending.order.own
            pending.future.set_result(
                Outcome(Status.TIMED_OUT, own.round, own.attempt, seconds=limit, detail="the averager does not answer")
            )


class OuterAverager(Averager):
    """Averages pseudo-gradients: the fragments are `fragments.partition` of the backbone."""

    def submit(
        self,
        round_: int,
        attempt: int,
        pseudo_gradient: Tensor,
        *,
        tokens: int,
        steps: int,
        expected: int,
        quorum: int,
        grace: float = math.inf,
        base: bytes = bytes(32),
        avoid: Collection[str] = (),
        norms: Sequence[float] = (),
    ) -> Future[Outcome]:
        """Average fragment `round_ mod P` with whoever submits the same round, attempt and base. Does not block.

        Args:
            pseudo_gradient: shape (numel,) of the fragment, any float dtype and device; copied before this returns. In
                runs with radial merging, what `radial.split` made of it.
            tokens, steps: trained since the fragment's last common state, both at least 1; they set the weight.
            expected: members after which the round starts at once (this one included).
            quorum: members without which it does not start.
            grace: seconds that it waits for the others once a quorum is there; the window's end comes first.
            base: digest of the common state that the pseudo-gradient was measured from; others' must be equal.
            avoid: peer ids not to meet, e.g. an earlier attempt's `failed`.
            norms: `radial.split`'s other half, for everybody's facts; others must have as many.

        Returns a future that always resolves: to an Outcome within `timeout_seconds`, or to AveragerEnded if the
        process has ended. Raises ValueError on bad arguments and RoundFailed if the fragment's last round still runs.
        """
        return self._submit(
            round_,
            attempt,
            pseudo_gradient,
            tokens=tokens,
            steps=steps,
            expected=expected,
            quorum=quorum,
            grace=grace,
            base=base,
            avoid=avoid,
            norms=norms,
        )
