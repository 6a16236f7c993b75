"""The swarm's directory: signed records in the DHT, and the same records as they arrive by gossip.

The DHT is slow and complete, gossip is fast and lossy: both feed one cache, where of two records under one subkey the
later issued wins. Whatever comes is verified here again, even from one's own DHT process: a node of the DHT can return
anything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import hivemind

from ..envelope import Envelope
from ..errors import BadSignature, DirectoryError, Refused
from ..identity import Identity
from .clocks import Clocks
from .dht import RunDHT, require_alive
from .meeting_again import meet_again
from .records import (
    MANIFEST_SUBKEY,
    MAX_LIFETIME_SECONDS,
    RECORD_TYPES,
    LeaseRecord,
    PeerRecord,
    Record,
    VoteRecord,
    check_times,
    open_manifest,
    record_key,
    seal_record,
    verify_record,
)
from .routes import read_routes, reroute
from .view import LeaseClaim, View, claims_of, remember, resolve, wins

logger = logging.getLogger(__name__)

_MAX_REQUESTS = 6  # in flight
_MANIFEST_SECONDS = MAX_LIFETIME_SECONDS  # any peer may renew it
_FORGET_SECONDS = 900.0  # after expiry; until then a replay of a withdrawn record is recognised
_MEET_AT_ONCE = 4  # peers
_MAX_CACHED = 100_000  # records, so that invented identities cannot exhaust memory

T = TypeVar("T")


@dataclass(frozen=True)
class _Cached:
    record: Record
    sender: str
    sealed: bytes


class Directory:
    """Reads and writes of one peer. Use it from one asyncio loop; no method blocks that loop.

    Args:
        dht: a started DHT of this run.
        clock, monotonic: unix seconds, and those of a clock that nobody sets; injected in tests.
        timeout_seconds: how long one request to the DHT may take.

    Attributes:
        clocks: how far others' clocks are from ours.
        refusals: records that this peer did not believe, by reason. `forged`, `malformed`, `oversized`, `wrong-*`,
            `expired`, `future`, `too-long`, `replayed` (older than a known one, by gossip), `identity-in-use` (somebody
            else signs with our key), `full`.
        failures: own requests that went wrong: `timeout`, `not-stored` (a replica has a newer record, or refused ours).
    """

    def __init__(
        self,
        dht: hivemind.DHT,
        identity: Identity,
        run_id: str,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        timeout_seconds: float = 15.0,
    ) -> None:
        self.run_id = run_id
        self.clocks = Clocks(clock, monotonic)
        self.refusals: Counter[str] = Counter()
        self.distrusted: frozenset[str] = frozenset()  # peers whose leases are not in any view
        self.failures: Counter[str] = Counter()
        self.remembered: Mapping[str, Sequence[str]] = {}  # by peer id of an earlier life, its directory addresses
        self._dht = dht
        self._identity = identity
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._gate = asyncio.Semaphore(_MAX_REQUESTS)
        self._cache: dict[tuple[str, str], _Cached] = {}  # by kind and subkey
        self._issued: dict[tuple[str, str], float] = {}  # of ours in the same order, the latest time that one said
        self._strongest: dict[int, LeaseClaim] = {}  # by slot
        self._started_at = clock()

    async def put(self, record: Record) -> None:
        """Publish a record of this peer, in the place of its earlier one.

        The later replaces the earlier whole: a slot that a lease record leaves out is given up. Keep `expires_at`
        growing, or the DHT prefers the older record until that one expires (those who got the newer by gossip are not
        fooled).
        """
        sealed = seal_record(self._identity, self.run_id, record)
        subkey = record.subkey(self._identity.peer_id)
        self._keep(_Cached(record, self._identity.peer_id, sealed), subkey)
        await self._store(record.kind, subkey, sealed, record.expires_at)

    async def put_manifest(self, sealed: bytes) -> None:
        """Keep the signed manifest in the DHT for ten more minutes; any peer may. Raises as `open_manifest` does."""
        open_manifest(sealed, self.run_id)
        await self._store("manifest", MANIFEST_SUBKEY, sealed, self._clock() + _MANIFEST_SECONDS)

    async def manifest(self) -> bytes | None:
        """The signed manifest's bytes, checked as by `open_manifest`, or None if no peer keeps it now."""
        for _, value in await self._fetch("manifest"):
            if self._believe(partial(open_manifest, value, self.run_id)) is not None:
                return value
        return None

    async def read(self) -> View:
        """Everything the DHT and gossip have brought, resolved. Raises DirectoryError if the DHT process fails."""
        kinds = list(RECORD_TYPES)
        for kind, entries in zip(kinds, await asyncio.gather(*map(self._fetch, kinds)), strict=True):
            for subkey, value in entries:
                known = self._cache.get((kind, subkey))
                if known is None or known.sealed != value:  # a signature is checked once
                    self._accept(value, kind=kind, subkey=subkey)
        return self.view()

    def view(self) -> View:
        """The same without asking the DHT: what is known now."""
        now = self._clock()
        self._forget(now)
        return resolve(
            now,
            peers=(entry.record for entry in self._cache.values() if isinstance(entry.record, PeerRecord)),
            leases=self._leases(),
            votes=(
                (entry.sender, entry.record) for entry in self._cache.values() if isinstance(entry.record, VoteRecord)
            ),
            strongest=self._strongest,
            distrusted=self.distrusted,
        )

    def distrust(self, peers: Collection[str]) -> None:
        """Leave these peers' leases, past and to come, out of every view."""
        self.distrusted |= set(peers)
        self._strongest = {slot: c for slot, c in self._strongest.items() if c.owner not in self.distrusted}
        for slot, claim in claims_of(self._leases()):  # what they had hidden
            if slot not in self._strongest or wins(claim, self._strongest[slot]):
                self._strongest[slot] = claim

    def _leases(self) -> Iterator[LeaseRecord]:
        for entry in self._cache.values():
            if isinstance(entry.record, LeaseRecord) and entry.sender not in self.distrusted:
                yield entry.record

    def receive(self, data: bytes) -> bool:
        """Take a sealed record that came by gossip. Returns whether it was news; refusals are counted, never raised."""
        return self._accept(data) is not None

    def require_alive(self) -> None:
        """Raise DirectoryEnded if this node's DHT process has, which no waiting will mend."""
        require_alive(self._dht)

    async def meet_again(self) -> list[str]:
        """Look for some peers that are known here and that this node's DHT has lost sight of; who answered.

        Raises DirectoryError if the DHT process fails. Nobody is found by a foreign DHT.
        """
        others = dict(self.remembered)
        for entry in self._cache.values():
            if isinstance(entry.record, PeerRecord):
                others[entry.sender] = entry.record.dht_addrs
        others.pop(self._identity.peer_id, None)
        if not isinstance(self._dht, RunDHT) or not others:
            return []
        some = random.sample(sorted(others), min(_MEET_AT_ONCE, len(others)))
        look = partial(meet_again, peers={peer: others[peer] for peer in some})
        found: list[str] = await self._ask(lambda: self._dht.run_coroutine(look, return_future=True))
        return found

    async def routes(self) -> dict[str, list[str]]:
        """By peer id the far ends of this node's connections, multiaddrs without /p2p/. Empty for a foreign DHT."""
        if not isinstance(self._dht, RunDHT):
            return {}
        found: dict[str, list[str]] = await self._ask(lambda: self._dht.run_coroutine(read_routes, return_future=True))
        return found

    async def reroute(self, peer: str, address: str) -> bool:
        """Replace the connection to a peer by one to `address`, which ends in its /p2p/; whether that went well."""
        if not isinstance(self._dht, RunDHT):
            return False
        ask = partial(reroute, peer=peer, address=address)
        done: bool = await self._ask(lambda: self._dht.run_coroutine(ask, return_future=True))
        return done

    async def _store(self, kind: str, subkey: str, sealed: bytes, expires_at: float) -> None:
        stored = await self._ask(
            lambda: self._dht.store(
                record_key(self.run_id, kind), sealed, expires_at, subkey=subkey, return_future=True
            )
        )
        if not stored:
            # One replica's word: it may hold a newer record, have another clock, or lie. The others may well have it.
            self.failures["not-stored"] += 1
            logger.debug("a replica did not store our %s record", kind)

    async def _fetch(self, kind: str) -> list[tuple[str, bytes]]:
        found = await self._ask(lambda: self._dht.get(record_key(self.run_id, kind), latest=True, return_future=True))
        if found is None:
            return []
        if not isinstance(found.value, dict):
            self.refusals["malformed"] += 1
            return []
        entries = []
        for subkey, item in found.value.items():
            if isinstance(subkey, str) and isinstance(item.value, bytes):
                entries.append((subkey, item.value))
            else:
                self.refusals["malformed"] += 1
        return entries

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        async with self._gate:
            require_alive(self._dht)
            future = request()
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    return await future
            except TimeoutError:
                self.failures["timeout"] += 1
                require_alive(self._dht)
                raise DirectoryError(
                    f"the DHT did not answer within {self._timeout_seconds:.0f} s",
                    fix="check this machine's connection and load; the node keeps trying",
                ) from None

    def _accept(self, data: bytes, *, kind: str | None = None, subkey: str | None = None) -> _Cached | None:
        """Verify, and keep if newer. `kind` and `subkey` say where it was found; None for gossip."""

        def check() -> tuple[Envelope, Record]:
            envelope, record = verify_record(data, self.run_id, kind=kind, subkey=subkey)
            if kind is None and envelope.sender != self._identity.peer_id:
                self.clocks.heard(envelope.sender, record.issued_at)  # a time to be refused tells most
            check_times(record, self._clock())
            return envelope, record

        opened = self._believe(check)
        if opened is None:
            return None
        envelope, record = opened
        entry = _Cached(record, envelope.sender, data)
        place = record.subkey(envelope.sender)
        known = self._cache.get((record.kind, place))
        if envelope.sender == self._identity.peer_id and record.issued_at > self._started_at and known != entry:
            # Ours are noted before they leave. This one is newer than our start, and than all that we have issued,
            # also before this machine's clock was set back.
            if record.issued_at > self._issued.get((record.kind, place), -math.inf):
                self.refusals["identity-in-use"] += 1
            return None
        if known is not None and record.issued_at <= known.record.issued_at:
            if kind is None and record.issued_at < known.record.issued_at:
                self.refusals["replayed"] += 1
            return None
        return entry if self._keep(entry, place) else None

    def _keep(self, entry: _Cached, subkey: str) -> bool:
        key = (entry.record.kind, subkey)
        ours = entry.sender == self._identity.peer_id  # always kept: what comes back must be known as ours
        if not ours and key not in self._cache and len(self._cache) >= _MAX_CACHED:
            self.refusals["full"] += 1
            return False
        self._cache[key] = entry
        if ours:
            self._issued[key] = max(entry.record.issued_at, self._issued.get(key, -math.inf))
        if isinstance(entry.record, LeaseRecord) and entry.sender not in self.distrusted:
            remember(self._strongest, entry.record)
        return True

    def _forget(self, now: float) -> None:
        old = [key for key, entry in self._cache.items() if entry.record.expires_at + _FORGET_SECONDS < now]
        for key in old:
            del self._cache[key]

    def _believe(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except Refused as refused:
            self.refusals[refused.reason] += 1
        except BadSignature:
            self.refusals["forged"] += 1
        return None
