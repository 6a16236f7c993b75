"""One butterfly all-reduce that tells the truth about itself.

hivemind's runner cuts the vector into parts, gives each part to one member to reduce, and streams. Changed here:

    weights     a reducer uses the shares computed from everybody's signed facts; the number a sender states is ignored
    non-finite  a part with NaN or infinity, of a wrong shape or codec, bans its sender for the rest of the round
    identical   a part's average is encoded once; all members, the reducer too, decode those bytes and *set* them
    once        a member that opens a second stream of parts is banned: the reducer counts parts, not members
    partial     a reply says whose inputs the average holds (a bitmap) and their summed share; every member compares it
                with the whole group's, so a missing input or reducer is seen by all whom it concerns
    receivers   a member whose share is 0 sends empty parts, asks with them for the averages, and nobody needs it
    robust      if the run says so, a part's average is the robust one (`robust.py`)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException, BannedException, TensorPartReducer
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import aenumerate, aiter_with_timeout, amap_in_executor
from torch import Tensor

from ..errors import Refused
from ..pacing import UNLIMITED, Pace
from .merging import SHARE_TOTAL
from .parts import PartCodec
from .robust import robust_mean

log = logging.getLogger(__name__)


@dataclass
class Account:
    """What went wrong and how much was moved, as one member saw it.

    Attributes:
        failed: peer id (base58) to the first reason it was left out of a part or did not return one.
        proven: who sent this member what no honest peer sends.
        missing: peer id to the members that say, or have seen, that it did not give them what they were to have of it:
            its parts, or as a reducer their averages.
        whole: elements of the fragment that were averaged over every member.
    """

    failed: dict[str, str] = field(default_factory=dict)
    proven: set[str] = field(default_factory=set)
    missing: dict[str, set[str]] = field(default_factory=dict)
    settled: bool = False  # nobody else is accused
    whole: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def blame(self, peer_id: str, reason: str) -> None:
        self.failed.setdefault(peer_id, reason)

    def accuse(self, peer_id: str, accuser: str) -> None:
        if not self.settled:
            self.missing.setdefault(peer_id, set()).add(accuser)


class ShareReducer(TensorPartReducer):  # type: ignore[misc]  # hivemind is untyped
    """Averages with fixed shares and remembers, per part, which senders went in."""

    def __init__(
        self, part_shapes: Sequence[torch.Size], share_by_sender: Sequence[int], *, robust: bool = False
    ) -> None:
        self._shares = tuple(share_by_sender)
        self._robust = robust
        self._kept: dict[int, Tensor] = {}  # by sender, the current part, if robust
        self.denominator: float
        self.included: list[int] = [0] * len(part_shapes)  # bitmap of sender indices
        super().__init__(tuple(part_shapes), len(share_by_sender))

    async def accumulate_part(
        self, sender_index: int, part_index: int, tensor_part: Tensor, weight: float = 1.0
    ) -> Tensor:
        """Average of the part over all senders, shape of the part. `weight`, the sender's own number, is ignored."""
        if self.finished.is_set():
            raise AllreduceException("the all-reduce is over")
        self.num_parts_received[sender_index] += 1
        if self.sender_failed_after[sender_index] != float("inf"):
            raise BannedException(f"sender {sender_index} was banned in background")
        if part_index != self.current_part_index:  # nobody sends a part before it has the average of the last one
            raise AllreduceException(f"part {part_index} is not averaged now")
        self.included[part_index] |= 1 << sender_index
        share = self._shares[sender_index]
        if self._robust and share:
            self._kept[sender_index] = tensor_part.clone()  # its memory may be reused for the average
        self.accumulator.add_(tensor_part, alpha=share / SHARE_TOTAL)  # a power of two below: exact in float32
        self.denominator += share / SHARE_TOTAL
        self.current_part_accumulated_from += 1
        average: asyncio.Future[Tensor] = self.current_part_future
        self.check_current_part_finished()
        return await asyncio.shield(average)  # whose stream ends meanwhile must not cancel it for all

    def check_current_part_finished(self) -> None:
        if self.current_part_accumulated_from == self.num_current_senders:
            if not self.denominator:
                self.denominator = 1.0  # only receivers are left: their part is zero and reported as partial, not NaN
            elif self._robust:
                senders = sorted(self._kept)
                self.accumulator = robust_mean([self._kept[s] for s in senders], [self._shares[s] for s in senders])
                self.denominator = 1.0
            self._kept = {}
        super().check_current_part_finished()


class TruthfulRunner(AllReduceRunner):  # type: ignore[misc]  # hivemind is untyped
    """One member's side of one all-reduce of one flat float32 tensor. Iterating yields the averaged tensor itself.

    Args:
        share_by_peer: `merging.shares` by peer id (base58), of every member.
        reducers: the members that average parts, each an equal share; the others cannot be dialled.
        robust: whether parts are averaged robustly.
        pace: what parts take from, both ways.
    """

    def __init__(
        self,
        *,
        share_by_peer: Mapping[str, int],
        reducers: Collection[str],
        codec: PartCodec,
        robust: bool,
        tensors: Sequence[Tensor],
        ordered_peer_ids: Sequence[PeerID],
        part_size_bytes: int,
        pace: Pace = UNLIMITED,
        **kwargs: object,
    ) -> None:
        super().__init__(
            tensors=tensors,
            ordered_peer_ids=ordered_peer_ids,
            peer_fractions=tuple(float(peer.to_base58() in reducers) for peer in ordered_peer_ids),
            compression=codec.compression,
            part_size_bytes=part_size_bytes,
            **kwargs,
        )
        self.account = Account()
        self.tensor_part_reducer: ShareReducer
        self._codec, self._pace = codec, pace
        self._names = [peer.to_base58() for peer in ordered_peer_ids]
        self._shares = [share_by_peer[name] for name in self._names]
        self._full_share = sum(self._shares)
        self._encoded: dict[int, asyncio.Task[tuple[runtime_pb2.Tensor, Tensor]]] = {}
        self.tensor_part_container.return_deltas = False
        self.tensor_part_reducer.finished.set()  # the base class's own is replaced: it must not complain when collected
        self.tensor_part_reducer = ShareReducer(
            [part.shape for part in self.parts_for_local_averaging], self._shares, robust=robust
        )
        # Sizes are kept apart: the container drops its parts as soon as they are averaged.
        self._part_sizes = [
            [part.numel() for part, _ in parts] for parts in self.tensor_part_container._input_parts_by_peer
        ]

    # -- as a reducer ------------------------------------------------------------------------------------------------

    async def _accumulate_parts_streaming(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sender_index: int
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        sender = self._names[sender_index]
        sizes = self._part_sizes[self._own_index]
        part_index = 0
        try:
            async for part in self._decoded_parts(stream, sizes, sender):
                try:
                    average = await self.tensor_part_reducer.accumulate_part(sender_index, part_index, part)
                except BannedException:
                    break
                encoded, _ = await self._encode_once(part_index, average)
                included = self.tensor_part_reducer.included[part_index]
                part_index += 1
                self.account.bytes_sent += len(encoded.buffer)
                await asyncio.sleep(self._pace.up(len(encoded.buffer)))
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.AVERAGED_PART,
                    tensor_part=encoded,
                    weight=float(self._share_of(included)),
                    peer_id=included.to_bytes((len(self._names) + 7) // 8, "little"),
                )
        finally:
            if part_index != self.tensor_part_reducer.num_parts:
                await self._ban_sender(self.sender_peer_ids[sender_index])

    async def _decoded_parts(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], sizes: Sequence[int], sender: str
    ) -> AsyncIterator[Tensor]:
        """Decode a sender's parts in the background. Raises AllreduceException on one that is not right."""

        receives_only = self._shares[self._names.index(sender)] == 0

        def decode(numbered: tuple[int, averaging_pb2.AveragingData]) -> Tensor:
            part_index, message = numbered
            if part_index >= len(sizes):
                raise Refused("too_many_parts", f"sent more than {len(sizes)} parts")
            if receives_only:
                if message.tensor_part.buffer:
                    raise Refused("part_shape", "sent a part though it has no tokens")
                return torch.zeros(sizes[part_index])
            return self._codec.decode(message.tensor_part, sizes[part_index])

        try:
            async for part in amap_in_executor(decode, aenumerate(stream), max_prefetch=1):
                received = 0 if receives_only else self._codec.encoded_bytes(part.numel())
                self.account.bytes_received += received
                await asyncio.sleep(self._pace.down(received))
                yield part
        except Refused as error:
            self.account.blame(sender, error.cause)
            self.account.proven.add(sender)
            raise AllreduceException(f"{sender}: {error.cause}") from error

    async def _encode_once(self, part_index: int, average: Tensor) -> tuple[runtime_pb2.Tensor, Tensor]:
        """The part's bytes and what they decode to; computed by whoever asks first."""
        task = self._encoded.get(part_index)
        if task is None:
            task = asyncio.ensure_future(asyncio.to_thread(self._codec.round_trip, average))
            self._encoded[part_index] = task
        return await asyncio.shield(task)  # one receiver's disconnect must not cancel the others' part

    async def _ban_sender(self, peer_id: PeerID) -> None:
        received = self.tensor_part_reducer.num_parts_received[self.sender_peer_ids.index(peer_id)]
        if received == self.tensor_part_reducer.num_parts:
            return  # all its parts are in: it may hang up
        if peer_id not in self.banned_senders:
            self.account.blame(peer_id.to_base58(), "did not send all its parts")
        await super()._ban_sender(peer_id)

    # -- as a sender and receiver ------------------------------------------------------------------------------------

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        peer_index = self.ordered_peer_ids.index(peer_id)
        name = self._names[peer_index]
        try:
            if peer_id == self.peer_id:
                await self._reduce_own_parts(peer_index)
            else:
                await self._exchange_with(peer_id, peer_index)
        except Exception as error:  # noqa: BLE001 - messages that cannot be read end in whatever their parsers raise
            cause = error.cause if isinstance(error, Refused) else str(error) or type(error).__name__
            if isinstance(error, Refused) and peer_id != self.peer_id:
                self.account.proven.add(name)
            self.account.blame(name, f"did not return its parts: {cause}")
            self.account.accuse(name, self._names[self._own_index])
            log.warning("reducer failed peer=%s: %s", name, cause)
            self.tensor_part_container.register_failed_reducer(peer_index)  # keeps the output's length; never used

    async def _reduce_own_parts(self, peer_index: int) -> None:
        for part_index, part in enumerate(self.parts_for_local_averaging):
            average = await self.tensor_part_reducer.accumulate_part(peer_index, part_index, part)
            _, decoded = await self._encode_once(part_index, average)
            self._note_inputs(self.tensor_part_reducer.included[part_index], part.numel(), peer_index)
            self.tensor_part_container.register_processed_part(peer_index, part_index, decoded)

    async def _exchange_with(self, peer_id: PeerID, peer_index: int) -> None:
        sizes = self._part_sizes[peer_index]
        stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._generate_input_for_peer(peer_index))

        def decode(message: averaging_pb2.AveragingData, size: int) -> tuple[Tensor, int, int]:
            if message.code != averaging_pb2.AVERAGED_PART:
                raise AllreduceException(f"answered {averaging_pb2.MessageCode.Name(message.code)}")
            part = self._codec.decode(message.tensor_part, size)
            included = int.from_bytes(message.peer_id[:64], "little")
            if message.weight != self._share_of(included):
                raise Refused("share_mismatch", "weighs the members otherwise than their facts say")
            return part, included, len(message.tensor_part.buffer)

        async with aclosing(stream):  # also ends the sending, which reads what the average is about to replace
            answers = aiter_with_timeout(stream, self.reducer_timeout)
            for part_index, size in enumerate(sizes):
                try:
                    message = await anext(answers)
                except StopAsyncIteration:
                    raise AllreduceException(f"returned {part_index} of {len(sizes)} parts") from None
                part, included, received = await asyncio.to_thread(decode, message, size)
                self.account.bytes_received += received
                await asyncio.sleep(self._pace.down(received))
                self._note_inputs(included, size, peer_index)
                self.tensor_part_container.register_processed_part(peer_index, part_index, part)

    async def _generate_input_for_peer(self, peer_index: int) -> AsyncIterator[averaging_pb2.AveragingData]:
        if not self._shares[self._own_index]:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=self.group_id)
            for _ in self._part_sizes[peer_index][1:]:
                yield averaging_pb2.AveragingData()
            return
        async for message in super()._generate_input_for_peer(peer_index):
            self.account.bytes_sent += len(message.tensor_part.buffer)
            await asyncio.sleep(self._pace.up(len(message.tensor_part.buffer)))
            yield message

    # -- accounting --------------------------------------------------------------------------------------------------

    @property
    def _own_index(self) -> int:
        return int(self.ordered_peer_ids.index(self.peer_id))

    def _share_of(self, included: int) -> int:
        return sum(share for i, share in enumerate(self._shares) if included >> i & 1)

    def _note_inputs(self, included: int, elements: int, reducer: int) -> None:
        if self._share_of(included) == self._full_share:
            self.account.whole += elements
            return
        for i, name in enumerate(self._names):
            if not included >> i & 1:
                self.account.blame(name, "is missing from an average")
                self.account.accuse(name, self._names[reducer])

    def settle(self) -> None:
        """The time is nearly up: who holds up the round now, as seen from here, is to blame for that, and nobody later.

        Members whose time is up first break off all their streams, and would be blamed by those who began after them.
        """
        reducer, container = self.tensor_part_reducer, self.tensor_part_container
        slow = []
        if reducer.num_parts:
            included = reducer.included[reducer.current_part_index]
            slow = [n for i, n in enumerate(self._names) if not included >> i & 1]
            if not slow:  # all have been able to send here what they had to: the rest is up to reducers
                counts = zip(container._outputs_registered_by_peer, container.num_parts_by_peer, strict=True)
                slow = [n for n, (came, parts) in zip(self._names, counts, strict=True) if came < parts]
        for name in slow:
            self.account.blame(name, "is too slow for the round")
            self.account.accuse(name, self._names[self._own_index])
        self.account.settled = True

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        if context.remote_id not in self.sender_peer_ids:
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        if context.remote_id in self.active_senders:  # a part that came twice would count as somebody else's
            sender = context.remote_id.to_base58()
            self.account.blame(sender, "sends its parts twice")
            self.account.proven.add(sender)
            await self._ban_sender(context.remote_id)
            yield averaging_pb2.AveragingData(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for message in super().rpc_aggregate_part(stream, context):
            yield message
