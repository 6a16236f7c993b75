"""What a DHT node agrees to store or to believe.

hivemind asks a validator about every record that others want stored here and about every one found elsewhere, giving
the sha1 of the key only. The run's keys are few and known, so their hashes are too. Under them, only valid sealed
records pass. All other keys belong to hivemind (groups of averagers looking for each other): small, short-lived,
opaque.

Refusals are counted in the process that refuses, which is the DHT's: `dht.refusals` fetches them.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import msgspec
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from ..envelope import decode_payload
from ..errors import BadSignature, Refused
from .records import (
    EXPIRED_GRACE_SECONDS,
    MANIFEST_SUBKEY,
    MAX_CLOCK_AHEAD_SECONDS,
    MAX_LIFETIME_SECONDS,
    RECORD_TYPES,
    open_manifest,
    open_record,
    record_key,
)

MAX_FOREIGN_BYTES = 1024  # value and subkey; hivemind stores a flag under a peer id
MAX_FOREIGN_RECORDS = 1 << 17  # at a time: hivemind's storage has no bound of its own
_FOREIGN_LOOK_SECONDS = 1.0  # between looks for expired ones, while there are as many
_FEW_FOREIGN = 1024  # beyond it, expired ones are looked for whenever there are twice as many as after the last look
_REMEMBERED_RECORDS = 8192  # by digest: a few MB, whatever the records weigh

_bytes_decoder = msgspec.msgpack.Decoder(bytes)
_str_decoder = msgspec.msgpack.Decoder(str)


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no type information
    """Checks records of one run; counts refusals by reason in `refusals`."""

    def __init__(self, run_id: str, *, clock: Callable[[], float] = time.time) -> None:
        self.run_id = run_id
        self.refusals: Counter[str] = Counter()
        self._clock = clock
        # hivemind's search for the nodes that should store a record brings along all records under its key, each time.
        self._opened: OrderedDict[bytes, float | None] = OrderedDict()
        self._foreign: dict[bytes, float] = {}  # by digest of key and subkey, when each expires
        self._looked_at = 0.0
        self._look_beyond = _FEW_FOREIGN
        self._kinds = {
            DHTID.generate(source=record_key(run_id, kind)).to_bytes(): kind for kind in (*RECORD_TYPES, "manifest")
        }

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored or believed. Never raises."""
        try:
            self._check(record)
        except Refused as refused:
            self.refusals[refused.reason] += 1
            return False
        except BadSignature:
            self.refusals["forged"] += 1
            return False
        return True

    def _check(self, record: DHTRecord) -> None:
        now = self._clock()
        if not record.expiration_time <= now + MAX_LIFETIME_SECONDS + MAX_CLOCK_AHEAD_SECONDS:  # false for NaN too
            raise Refused("too-long", f"the DHT is asked to keep a record until {record.expiration_time}")
        kind = self._kinds.get(record.key)
        if kind is None:
            if len(record.value) + len(record.subkey) > MAX_FOREIGN_BYTES:
                raise Refused("oversized", f"{len(record.value)} bytes under a key that is not the run's")
            self._count_foreign(record, now)
            return
        expires_at = self._open(kind, record.subkey, record.value)
        if expires_at is None:
            return
        # Else an old record could be kept alive, and win over its successor, under a later expiration time.
        if expires_at != record.expiration_time:
            raise Refused("wrong-expiration", f"expires {expires_at}, but stored until {record.expiration_time}")
        if expires_at < now - EXPIRED_GRACE_SECONDS:
            raise Refused("expired", f"expired {now - expires_at:.1f} s ago")

    def _count_foreign(self, record: DHTRecord, now: float) -> None:
        """Raises Refused(`full`) for one too many."""
        place = _digest(record.key, record.subkey)
        if place not in self._foreign and len(self._foreign) >= min(self._look_beyond, MAX_FOREIGN_RECORDS):
            if abs(now - self._looked_at) >= _FOREIGN_LOOK_SECONDS:
                self._looked_at = now
                self._foreign = {known: until for known, until in self._foreign.items() if until > now}
                self._look_beyond = max(_FEW_FOREIGN, 2 * len(self._foreign))
            if len(self._foreign) >= MAX_FOREIGN_RECORDS:
                raise Refused("full", f"{len(self._foreign)} records are under keys that are not the run's")
        self._foreign[place] = max(record.expiration_time, self._foreign.get(place, 0.0))

    def _open(self, kind: str, subkey: bytes, value: bytes) -> float | None:
        """As `_open_once`, done once for the same bytes."""
        name = _digest(kind.encode(), subkey, value)
        if name in self._opened:
            self._opened.move_to_end(name)
        else:
            self._opened[name] = self._open_once(kind, subkey, value)
            while len(self._opened) > _REMEMBERED_RECORDS:
                self._opened.popitem(last=False)
        return self._opened[name]

    def _open_once(self, kind: str, subkey_bytes: bytes, value: bytes) -> float | None:
        """Check what does not change with time; return when the record expires, None for a manifest."""
        sealed = decode_payload(_bytes_decoder, value, "sealed record")
        subkey = decode_payload(_str_decoder, subkey_bytes, "subkey")
        if kind == "manifest":
            if subkey != MANIFEST_SUBKEY:
                raise Refused("wrong-subkey", f"a manifest under {subkey[:64]!r}")
            open_manifest(sealed, self.run_id)
            return None
        return open_record(sealed, self.run_id, now=self._clock(), kind=kind, subkey=subkey)[1].expires_at


def _digest(*parts: bytes) -> bytes:
    joined = hashlib.sha256()
    for part in parts:
        joined.update(len(part).to_bytes(4))
        joined.update(part)
    return joined.digest()
