"""What a DHT node takes of others is bounded, in number and in memory."""

import time
import tracemalloc

import msgspec
import pytest
from directory_nodes import RUN, leases
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from shoal.protocol.directory import validator
from shoal.protocol.directory.records import record_key, seal_record
from shoal.protocol.directory.validator import RecordValidator
from shoal.protocol.identity import Identity


def test_checked_records_are_not_kept_in_memory() -> None:
    """One identity may sign a large record again and again."""
    identity, now = Identity.generate(), time.time()
    key, subkey = DHTID.generate(source=record_key(RUN, "lease")).to_bytes(), msgspec.msgpack.encode(identity.peer_id)
    checked = RecordValidator(RUN)
    claims = [(slot, 1 << 40) for slot in range(4000)]

    def renewed(number: int) -> DHTRecord:
        record = leases(identity, *claims, issued=now + number / 1000)
        value = msgspec.msgpack.encode(seal_record(identity, RUN, record))
        return DHTRecord(key, subkey, value, record.expires_at)

    assert checked.validate(renewed(0))
    tracemalloc.start()
    try:
        for number in range(1, 100):
            assert checked.validate(renewed(number))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not checked.refusals
    assert kept < 500_000


def test_records_that_are_not_the_runs_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validator, "MAX_FOREIGN_RECORDS", 10)
    now = 1000.0
    checked = RecordValidator(RUN, clock=lambda: now)

    def foreign(number: int, until: float) -> DHTRecord:
        return DHTRecord(DHTID.generate(source="group").to_bytes(), b"member %d" % number, b"yes", until)

    assert all(checked.validate(foreign(number, now + 10 + number)) for number in range(10))
    assert checked.validate(foreign(3, now + 12)), "one that is known already"
    assert not checked.validate(foreign(10, now + 500))
    assert checked.refusals == {"full": 1}
    now += 13  # four have expired
    assert sum(checked.validate(foreign(number, now + 500)) for number in range(10, 20)) == 4


def test_of_records_that_are_not_the_runs_few_expired_ones_are_kept() -> None:
    """Averagers look for each other under a new key in every round, for weeks."""
    now = 1000.0
    checked = RecordValidator(RUN, clock=lambda: now)
    most = 0
    for number in range(20_000):
        now += 0.1
        key = DHTID.generate(source=f"group {number}").to_bytes()
        assert checked.validate(DHTRecord(key, b"member", b"yes", now + 30))
        most = max(most, len(checked._foreign))
    assert most <= 1100
