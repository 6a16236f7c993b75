"""How often one address may ask a relay, and that those who have asked once are forgotten."""

from __future__ import annotations

import pytest
from shoal.protocol.errors import Refused
from shoal.protocol.relay import lender
from shoal.protocol.relay.lender import QUOTA_SECONDS, _Quota


def test_an_address_may_ask_so_often_in_a_minute_and_is_forgotten_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(lender.time, "monotonic", lambda: now[0])
    quota = _Quota("questions", 3)
    for _ in range(3):
        quota.take("192.0.2.1")
    with pytest.raises(Refused, match="3 questions a minute"):
        quota.take("192.0.2.1")
    now[0] += QUOTA_SECONDS + 1
    quota.take("192.0.2.1")
    for number in range(10_000):
        now[0] += 0.1
        quota.take(f"2001:db8::{number:x}")
    assert len(quota._times) <= 2 * QUOTA_SECONDS / 0.1 + 2
