"""Finding the members of one round: hivemind's matchmaking, told which round, how many, and whom not.

    bucket = prefix.0b<48 bits of round><16 bits of attempt>      peers of different rounds never meet
    the earliest declared expiration leads; others ask to join    hivemind's protocol, unchanged
    full at `expected` members: start at once; else `grace` after a quorum is there; else, with one, as the window ends

hivemind would have let anybody join with any metadata. Here a leader checks a follower's signed facts at the door, so
that a peer with bad facts costs nobody a round; followers check the leader's and everybody's once the group is made.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.dht import DHT
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.asyncio import cancel_and_wait

from ..errors import BadSignature, Refused
from .facts import MAX_ATTEMPT, MAX_ROUND

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # hivemind's search asks the DHT again as soon as it has answered
LONGEST_POLL_SECONDS = 1.0
BUCKET_BITS = 48 + 16
JOIN_RETRIES = 3  # requests to one leader that got no answer, before the search gives up on it


@dataclass(frozen=True)
class Search:
    """One search for a group. The first four are what hivemind reads of its StepControl.

    Attributes:
        scheduled_time: DHT time (seconds) at which a group starts even if members are missing.
        deadline: DHT time at which the search gives up.
        data_for_gather: signed facts, shown to every member.
        grace: seconds that a leader with a quorum waits for the others.
        admit: raises BadSignature or Refused unless a peer id (base58) may join with this gathered data.
    """

    scheduled_time: float
    deadline: float
    data_for_gather: bytes
    admit: Callable[[str, bytes], object]
    round: int
    attempt: int
    expected: int
    quorum: int
    grace: float
    avoid: frozenset[str]

    def get_timeout(self) -> float:
        return max(0.0, self.deadline - float(get_dht_time()))


def round_of_bucket(prefix: str, group_key: str) -> int | None:
    """The round that a bucket is named after; None if that is no bucket of ours."""
    start, bits = group_key[: -BUCKET_BITS or None], group_key[-BUCKET_BITS:]
    if start != f"{prefix}.0b" or set(bits) - {"0", "1"}:
        return None
    return int(bits[:48], 2)


class RoundKeyManager(GroupKeyManager):  # type: ignore[misc]  # hivemind is untyped
    """Names the bucket after the round; hivemind would move to a random bucket after each group."""

    def __init__(self, dht: DHT, prefix: str, searches: Callable[[], int]) -> None:
        super().__init__(dht, prefix, "", None)
        self.avoid: frozenset[str] = frozenset()
        self._searches = searches

    def enter(self, round_: int, attempt: int) -> None:
        """Look in this round's bucket from now on."""
        if not (0 <= round_ <= MAX_ROUND and 0 <= attempt <= MAX_ATTEMPT):
            raise ValueError(f"round {round_}, attempt {attempt} do not fit the bucket's name")
        self.group_bits = f"{round_:048b}{attempt:016b}"

    async def get_averagers(self, group_key: str, only_active: bool) -> list[tuple[PeerID, float]]:
        await asyncio.sleep(min(LONGEST_POLL_SECONDS, POLL_SECONDS * self._searches()))
        found = await super().get_averagers(group_key, only_active)
        return [(peer, expiration) for peer, expiration in found if peer.to_base58() not in self.avoid]

    async def declare_averager(
        self, group_key: str, peer_id: PeerID, expiration_time: float, looking_for_group: bool = True
    ) -> bool:
        if not looking_for_group:
            return True  # the bucket is never used again: taking the name off would only delay the all-reduce
        return bool(await super().declare_averager(group_key, peer_id, expiration_time, looking_for_group))

    async def update_key_on_group_assembled(self, group_info: GroupInfo) -> None:
        """The caller names the next round."""


class RoundMatchmaking(Matchmaking):  # type: ignore[misc]  # hivemind is untyped
    """Matchmaking of one `Search` at a time.

    `searches`: how many run in this process now; together they ask the DHT as often as one would.
    """

    def __init__(
        self, *args: object, prefix: str, dht: DHT, searches: Callable[[], int] = lambda: 1, **kwargs: object
    ) -> None:
        super().__init__(*args, prefix=prefix, dht=dht, **kwargs)
        self.group_key_manager: RoundKeyManager = RoundKeyManager(dht, prefix, searches)
        self.refusals: dict[str, str] = {}  # peer id: why it was not let in, in the current search
        self._one_search = asyncio.Lock()
        self._unanswered: dict[PeerID, int] = {}
        self._joined = asyncio.Event()  # somebody is about to be this peer's follower
        self.quorum_seconds = math.inf  # of the last search, until this peer led a quorum

    async def find_group(self, search: Search) -> GroupInfo | None:
        """Members in the order that the all-reduce uses, or None if no group of `search.quorum` met in time."""
        async with self._one_search:
            self.group_key_manager.enter(search.round, search.attempt)
            self.group_key_manager.avoid = search.avoid
            self.target_group_size, self.min_group_size = search.expected, search.quorum
            self.refusals, self._unanswered = {}, {}
            self._joined.clear()
            self.quorum_seconds = math.inf
            grace = asyncio.create_task(self._start_after_grace(search))
            try:
                return await self.look_for_group(search)
            finally:
                await cancel_and_wait(grace)
                # For each follower hivemind has left a task that waits to be one itself, as who always leads never is.
                self.was_accepted_to_group.set()
                self.was_accepted_to_group.clear()

    async def _start_after_grace(self, search: Search) -> None:
        """Start the group that this peer leads, if it does, without those for whom hivemind would wait on."""
        began = time.monotonic()
        while True:
            await self._joined.wait()
            self._joined.clear()
            if len(self.current_followers) + 1 < search.quorum:
                continue
            self.quorum_seconds = min(self.quorum_seconds, time.monotonic() - began)
            await asyncio.sleep(min(search.grace, search.get_timeout()))
            async with self.lock_request_join_group:
                enough = len(self.current_followers) + 1 >= search.quorum
                if enough and self.is_looking_for_group and not self.assembled_group.done():
                    await self.leader_assemble_group()
                    return

    def _check_reasons_to_reject(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> averaging_pb2.MessageFromLeader | None:
        reason = super()._check_reasons_to_reject(request, context)
        if reason is not None:
            return reason
        peer_id = context.remote_id.to_base58()
        search: Search = self.step_control
        try:
            if peer_id in search.avoid:
                raise Refused("avoided", f"{peer_id} failed an earlier attempt")
            search.admit(peer_id, request.gather)
        except (BadSignature, Refused) as error:
            self.refusals[peer_id] = error.cause
            log.warning("join refused round=%d peer=%s: %s", search.round, peer_id, error.cause)
            return averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
        self._joined.set()
        return None

    async def _request_join_group(self, leader: PeerID) -> GroupInfo | None:
        group = await super()._request_join_group(leader)
        if group is None and not self.assembled_group.done():
            # hivemind never asks the same declaration twice, so one lost request would cost a whole window.
            tried = self._unanswered[leader] = self._unanswered.get(leader, 0) + 1
            if tried < JOIN_RETRIES:
                self.potential_leaders.past_attempts = {
                    (peer, expiration) for peer, expiration in self.potential_leaders.past_attempts if peer != leader
                }
        return group
