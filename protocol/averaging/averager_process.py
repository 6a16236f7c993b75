"""The process that averages: hivemind's DecentralizedAverager with rounds, facts and honest outcomes.

It serves every fragment. Orders come through hivemind's control pipe, reports go back through one of ours; vectors lie
in anonymous shared memory made before the fork, so that no file names them and nothing is left behind. A fragment has
one vector: the average takes the input's place once all of the input has been used.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mmap
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import AsyncIterator  # noqa: UP035  # hivemind does not see collections.abc's as a stream

import msgspec
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.matchmaking import Matchmaking, MatchmakingException
from hivemind.dht import DHT
from hivemind.p2p import P2PContext, P2PDaemonError, P2PHandlerError
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.asyncio import achain, as_aiter
from torch import Tensor

from ..directory.hanging_up import until_hung_up
from ..directory.records import MAX_MEMBERS
from ..errors import BadSignature, DirectoryError, Refused
from ..pacing import UNLIMITED, Pace
from ..process_death import end_with_parent
from .allreduce import Account, TruthfulRunner
from .facts import RoundFacts, open_facts
from .fragments import Fragment
from .matchmaking import RoundMatchmaking, Search, round_of_bucket
from .merging import Weighting, shares, weights
from .message_bounds import bound_messages
from .outcome import Order, Report, Status
from .parts import PartCodec
from .reputation import suspects
from .rounds import fragment_of

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5

_HIVEMIND_ERRORS = (
    AllreduceException,
    MatchmakingException,
    P2PDaemonError,
    P2PHandlerError,
    AssertionError,  # hivemind's checks of what a leader sends are asserts
    asyncio.InvalidStateError,
    DirectoryError,
    OSError,
)


@dataclass(frozen=True)
class RoundTimes:
    """Every wait of a round, in seconds: request < matchmaking; sender < reducer < settle < allreduce < round."""

    matchmaking: float
    round: float

    def __post_init__(self) -> None:
        if self.matchmaking <= 0 or self.allreduce <= 0:
            raise ValueError(
                f"a round of {self.round} s leaves no time for the all-reduce after {self.search:.1f} s of matchmaking"
            )

    @property
    def request(self) -> float:
        return min(2.0, self.matchmaking / 2)

    @property
    def search(self) -> float:
        return self.matchmaking + self.request

    @property
    def allreduce(self) -> float:
        return self.round - self.search - REPORT_SECONDS

    @property
    def settle(self) -> float:
        """Into the all-reduce, when it is asked who holds it up."""
        return 0.9 * self.allreduce

    @property
    def reducer(self) -> float:
        return 0.8 * self.allreduce

    @property
    def sender(self) -> float:
        return 0.35 * self.allreduce


class SharedVector:
    """One float32 vector that this process and its forks see, backed by no file."""

    def __init__(self, numel: int) -> None:
        self._memory = mmap.mmap(-1, 4 * numel)  # pages appear on first use
        self.tensor: Tensor = torch.frombuffer(self._memory, dtype=torch.float32)


class AveragerProcess(DecentralizedAverager):  # type: ignore[misc]  # hivemind is untyped
    """Runs orders, one per fragment at a time; those of different fragments do not wait for each other."""

    runner_type: type[TruthfulRunner] = TruthfulRunner

    def __init__(
        self,
        *,
        dht: DHT,
        run_id: str,
        fragments: Sequence[Fragment],
        codec: PartCodec,
        times: RoundTimes,
        part_bytes: int,
        reports: Connection,
        purpose: str = "outer",
        weighting: Weighting = Weighting.PROGRESS,
        robust: bool = False,
        pace: Pace = UNLIMITED,
    ) -> None:
        self._pace = pace
        self._run_id, self._codec, self._times, self._part_bytes = run_id, codec, times, part_bytes
        self._reports, self._weighting, self._robust = reports, weighting, robust
        self._matchmakings: list[RoundMatchmaking] = []  # by fragment
        self._forming: set[int] = set()  # tickets of orders whose group may be known to groupmates before it is here
        self._formed = asyncio.Event()  # set, and replaced, when a ticket leaves the above
        self._searches: dict[int, asyncio.Task[GroupInfo | None]] = {}  # by ticket, while it looks for members
        self._serving = 0
        self._idle = asyncio.Event()  # set while no groupmate waits for our parts
        self._idle.set()
        self.vectors = [SharedVector(fragment.numel) for fragment in fragments]
        super().__init__(
            averaged_tensors=(),
            dht=dht,
            start=False,
            prefix=f"{run_id}-{purpose}",
            min_matchmaking_time=times.matchmaking,
            request_timeout=times.request,
            allow_state_sharing=False,
            shutdown_timeout=times.request + 3.0,
        )
        # Peers that would cut or encode the vector otherwise are turned away when they ask to join.
        layout = repr((run_id, codec.name, part_bytes, weighting.value, [(f.names, f.sizes) for f in fragments]))
        self.schema_hash = hashlib.sha256(layout.encode()).digest()

    # hivemind builds its Matchmaking inside `_run_internal`; this is where ours take its place.
    @property
    def _matchmaking(self) -> RoundMatchmaking:
        return self._matchmakings[0]

    @_matchmaking.setter
    def _matchmaking(self, built: Matchmaking) -> None:
        self._matchmakings = [
            RoundMatchmaking(
                self._p2p,
                self.schema_hash,
                dht=self.dht,
                client_mode=self.client_mode,
                searches=lambda: len(self._searches),
                **self.matchmaking_kwargs,
            )
            for _ in self.vectors
        ]

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        round_ = round_of_bucket(self.prefix, request.group_key)
        if round_ is None:
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.BAD_GROUP_KEY)
            return
        matchmaking = self._matchmakings[fragment_of(round_, len(self._matchmakings))]
        async for message in until_hung_up(matchmaking.rpc_join_group(request, context), self._times.request):
            yield message

    def run(self) -> None:
        signal.set_wakeup_fd(-1)  # inherited: a signal to this process would wake the parent's event loop
        for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C, or a terminal that is closed: the parent's to handle
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        end_with_parent(self._parent_pid)
        bound_messages()
        torch.set_num_threads(1)  # the cores are the trainer's
        super().run()

    def _on_sigterm(self, _signal: int, _frame: object) -> None:
        p2p = getattr(self, "_p2p", None)
        if p2p is not None:
            with suppress(FileNotFoundError):
                os.unlink(p2p._client_listen_maddr["unix"])
        os._exit(1)

    async def _shutdown(self, timeout: float | None) -> None:
        """Serve groupmates that still wait for our parts, then close. hivemind's own would fail on a running group."""
        await self.remove_p2p_handlers(self._p2p, namespace=self.prefix)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self._times.request)
        await self._p2p.shutdown()

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        self._serving += 1
        self._idle.clear()
        try:
            opening = await anext(stream)
            await self._until_formed(opening.group_id)
            answers = super().rpc_aggregate_part(achain(as_aiter(opening), stream), context)
            async for message in until_hung_up(answers, self._times.reducer):
                yield message
        finally:
            self._serving -= 1
            if not self._serving:
                self._idle.set()

    async def _until_formed(self, group_id: bytes) -> None:
        """Wait while a group may be one that this peer is just about to hear of from its leader. Then hivemind refuses.

        hivemind has one flag for this, which only works with one search at a time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._times.sender):
                while group_id not in self._running_groups and self._forming:
                    await self._formed.wait()

    def _note_formed(self, ticket: int) -> None:
        self._forming.discard(ticket)
        self._formed.set()
        self._formed = asyncio.Event()

    # -- one order ---------------------------------------------------------------------------------------------------

    async def _round(self, data: bytes) -> None:
        """Called through the control pipe. Always reports, also if it fails in a way that nobody foresaw."""
        order = msgspec.msgpack.decode(data, type=Order)
        report = Report(order.ticket, Status.TIMED_OUT, "the averager failed inside; see the log")
        try:
            report = await self._run_order(order)
        finally:
            self._reports.send_bytes(msgspec.msgpack.encode(report))

    async def _abandon(self, ticket: int) -> None:
        """Called through the control pipe: stop looking for members. Without effect once there is a group."""
        search = self._searches.get(ticket)
        if search is not None:
            search.cancel()

    async def _find_group(self, order: Order) -> GroupInfo | None:
        search = self._searches[order.ticket] = asyncio.ensure_future(
            self._matchmakings[order.own.fragment].find_group(self._search_for(order))
        )
        try:
            return await search
        finally:
            del self._searches[order.ticket]

    async def _run_order(self, order: Order) -> Report:
        started = time.monotonic()
        self._forming.add(order.ticket)
        try:
            group = await self._find_group(order)
            if group is None:
                return Report(
                    order.ticket,
                    Status.NO_GROUP,
                    f"fewer than {order.quorum} members met within {self._times.matchmaking} s",
                    failed=self._matchmakings[order.own.fragment].refusals,
                )
            members = tuple(peer.to_base58() for peer in group.peer_ids)
            facts, failed = self._check_group(group, members, order)
            if failed:
                detail = "the group's facts were refused: " + "; ".join(failed.values())
                return Report(order.ticket, Status.REFUSED, detail, members, failed=failed)
            matched = time.monotonic() - started
            status, detail, account = await self._average(group, order, facts)
            return Report(
                order.ticket,
                status,
                detail,
                members,
                facts,
                failed={} if status is Status.COMPLETE else account.failed,
                proven=tuple(sorted(account.proven)),
                suspicion={}
                if status is Status.COMPLETE
                else suspects(account.missing, {fact.peer_id for fact in facts if fact.reduces}),
                whole=account.whole,
                matchmaking_seconds=matched,
                quorum_seconds=min(matched, self._matchmakings[order.own.fragment].quorum_seconds),
                bytes_sent=account.bytes_sent,
                bytes_received=account.bytes_received,
            )
        except asyncio.CancelledError:
            return Report(order.ticket, Status.NO_GROUP, "abandoned")
        except _HIVEMIND_ERRORS as error:
            log.warning("search failed round=%d", order.own.round, exc_info=True)
            return Report(order.ticket, Status.NO_GROUP, f"the search failed: {error!r}")
        finally:
            self._note_formed(order.ticket)  # groupmates that came early get an answer, if only a refusal

    def _search_for(self, order: Order) -> Search:
        now = float(get_dht_time())
        return Search(
            scheduled_time=now + self._times.matchmaking,
            deadline=now + self._times.search,
            data_for_gather=order.signed_facts,
            admit=partial(self._open_facts, order),
            round=order.own.round,
            attempt=order.own.attempt,
            expected=min(max(order.expected, order.quorum), MAX_MEMBERS),  # the rest come to another round
            quorum=order.quorum,
            grace=order.grace,
            avoid=order.avoid,
        )

    def _open_facts(self, order: Order, peer_id: str, data: bytes) -> RoundFacts:
        receivers = self._weighting.receivers
        facts = open_facts(data, self._run_id, peer_id, like=order.own, now=time.time(), receivers=receivers)
        if (facts.tokens == 0) != (peer_id == order.receiver):
            raise Refused("not_the_receiver", f"{peer_id} brings {facts.tokens} tokens")
        return facts

    def _check_group(
        self, group: GroupInfo, members: tuple[str, ...], order: Order
    ) -> tuple[tuple[RoundFacts, ...], dict[str, str]]:
        """The members' facts, or who is to blame. The leader made the list: nothing in it is believed."""
        if len(set(members)) != len(members) or not order.quorum <= len(members) <= MAX_MEMBERS:
            return (), {"": f"the leader made a group of {len(members)}"}
        facts, failed = [], {}
        for member, data in zip(members, group.gathered, strict=True):
            try:
                if member in order.avoid:
                    raise Refused("avoided", f"{member} failed an earlier attempt")
                facts.append(self._open_facts(order, member, data))
            except (BadSignature, Refused) as error:
                failed[member] = error.cause
        if not failed and not any(fact.reduces for fact in facts):
            failed[""] = "no member can be dialled"
        elif not failed and order.receiver and order.receiver not in members:
            failed[""] = f"{order.receiver}, who is to receive the average, did not come"
        elif not failed and not any(fact.tokens for fact in facts):
            failed[""] = "no member brings tokens"
        return tuple(facts), failed

    async def _average(
        self, group: GroupInfo, order: Order, facts: tuple[RoundFacts, ...]
    ) -> tuple[Status, str, Account]:
        vector = self.vectors[order.own.fragment].tensor
        with self._register_allreduce_group(group):
            self._note_formed(order.ticket)
            runner = self.runner_type(
                p2p=self._p2p,
                servicer_type=type(self),
                prefix=self.prefix,
                group_id=group.group_id,
                tensors=[vector],
                ordered_peer_ids=group.peer_ids,
                share_by_peer=shares(weights(facts, weighting=self._weighting)),
                reducers={fact.peer_id for fact in facts if fact.reduces},
                codec=self._codec,
                robust=self._robust,
                part_size_bytes=self._part_bytes,
                pace=self._pace,
                sender_timeout=self._times.sender,
                reducer_timeout=self._times.reducer,
            )
            self._running_groups[group.group_id].set_result(runner)
            collecting = asyncio.ensure_future(self._collect(runner, vector))
            try:
                if not (await asyncio.wait({collecting}, timeout=self._times.settle))[0]:
                    runner.settle()
                await asyncio.wait_for(collecting, self._times.allreduce - self._times.settle)
            except TimeoutError:
                return Status.TIMED_OUT, f"no result within {self._times.allreduce:.1f} s", runner.account
            except _HIVEMIND_ERRORS as error:
                return Status.PARTIAL, f"the all-reduce broke off: {error!r}", runner.account
        if runner.account.whole == vector.numel():
            return Status.COMPLETE, "", runner.account
        share = runner.account.whole / vector.numel()
        return Status.PARTIAL, f"{share:.1%} of the fragment averages every member", runner.account

    @staticmethod
    async def _collect(runner: TruthfulRunner, vector: Tensor) -> None:
        async for average in runner:  # one, when all parts are back
            vector.copy_(average)
