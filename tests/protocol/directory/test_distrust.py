"""What a peer's distrust costs an owner: its slots are taken at once, and no epoch that it names fences others out."""

from __future__ import annotations

import random

import pytest
from fake_standins import FakeStandIn, load, seeded, snapshot_of
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.directory.records import MAX_EPOCH, Lease, LeaseRecord, PeerRecord
from shoal.protocol.directory.standing import situation_of
from shoal.protocol.directory.view import LeaseClaim, View, resolve, wins
from shoal.protocol.errors import Refused
from shoal.protocol.experts.ownership import (
    COPY_RAISE,
    DEPOSED_OWNER,
    ClaimFree,
    Copy,
    Reclaim,
    RequestHandover,
    Rules,
    Situation,
    TakeOver,
    Watch,
    Yield,
    decide,
    grants_handover,
)
from shoal.protocol.experts.surrogates import Patience, Point, SlotPublisher, SlotSubscriber, state_digest
from shoal.protocol.messages import SurrogateDelta

RULES = Rules(lease=16.0)
NOW = 1000.0
LIAR, HEIR, OTHER = ("12D3KooW" + letter * 44 for letter in "LHP")


def claim(owner: str, epoch: int, expires_at: float = NOW + 10) -> LeaseClaim:
    return LeaseClaim(owner=owner, epoch=epoch, version=0, expires_at=expires_at)


def peer(name: str, capacity: int = 4) -> PeerRecord:
    return PeerRecord(
        peer_id=name, role="worker", phase="training", capacity=capacity, transport_addrs=[], dht_addrs=[],
        metrics_url="", version="", protocol_version=1, step=1, tokens=0, tokens_per_second=0.0, loss=0.0, slots=[],
        round=0, fidelity=0.0, issued_at=NOW, expires_at=NOW + 100,
    )  # fmt: skip


def view_of(*claims: tuple[int, LeaseClaim], distrusted: frozenset[str] = frozenset()) -> View:
    """As a directory resolves it that has heard these claims, of three live peers."""
    records = [
        LeaseRecord(owner=c.owner, leases=[Lease(slot, c.epoch, c.version)], issued_at=NOW, expires_at=c.expires_at)
        for slot, c in claims
        if c.owner not in distrusted
    ]
    strongest: dict[int, LeaseClaim] = {}
    for slot, c in claims:
        if c.owner not in distrusted and (slot not in strongest or wins(c, strongest[slot])):
            strongest[slot] = c
    peers = [peer(name) for name in (LIAR, HEIR, OTHER)]
    return resolve(NOW, peers=peers, leases=records, votes=[], strongest=strongest, distrusted=distrusted)


def look(watch: Watch, view: View, held: dict[int, int] | None = None, copy: Copy | None = None) -> Situation:
    return situation_of(
        view, watch, now=NOW, capacity=4, num_slots=1, replication=2, held=held or {},
        copies={} if copy is None else {0: copy}, busy=(),
    )  # fmt: skip


def taken_over(watch: Watch, view: View) -> int:
    """At which epoch a standby takes slot 0 over, now."""
    [action] = decide(watch, look(watch, view, copy=Copy(3, 0)), RULES)
    assert isinstance(action, TakeOver)
    return action.epoch


def heir_of(view: View) -> str:
    """Who comes first among those who are left."""
    return look(Watch(OTHER), view).desired[0][0]


def test_a_liars_slot_is_taken_at_once_by_who_has_a_copy() -> None:
    held = (0, claim(LIAR, 3))
    after = view_of(held, distrusted=frozenset({LIAR}))
    watch = Watch(heir_of(after))
    assert not any(isinstance(a, TakeOver) for a in decide(watch, look(watch, view_of(held), copy=Copy(3, 0)), RULES))
    assert taken_over(watch, after) == 3 + COPY_RAISE
    assert watch.claims[0].owner == DEPOSED_OWNER


@pytest.mark.parametrize("jump", [4, 5, 1000, MAX_EPOCH])
def test_no_epoch_that_it_jumps_to_before_it_is_found_out_leaves_others_no_room(jump: int) -> None:
    """It held the slot at 3, after an honest owner's 2."""
    after = view_of(distrusted=frozenset({LIAR}))
    watch = Watch(heir_of(after))
    for view in (view_of((0, claim(OTHER, 2))), view_of((0, claim(LIAR, 3))), view_of((0, claim(LIAR, jump)))):
        look(watch, view)
    assert watch.claims[0].epoch == jump
    assert taken_over(watch, after) == 3 + COPY_RAISE


def test_it_cannot_take_the_slot_from_its_heir() -> None:
    """Those who trust it still follow the jump; as soon as they do not, they are back with the honest claim."""
    honest, jumped = (0, claim(HEIR, 4)), (0, claim(LIAR, 99))
    watch = Watch(OTHER)
    look(watch, view_of((0, claim(LIAR, 3))))
    look(watch, view_of(honest))
    assert view_of(honest, jumped).leases[0].owner == LIAR
    look(watch, view_of(honest, jumped))
    assert watch.claims[0].owner == LIAR
    after = view_of(honest, jumped, distrusted=frozenset({LIAR}))
    assert after.leases[0].owner == HEIR
    assert after.leases[0].epoch == 4
    assert not after.last_holders
    situation = look(watch, after)
    assert (watch.claims[0].owner, watch.claims[0].epoch) == (HEIR, 4)
    assert LIAR not in situation.live
    assert all(LIAR not in listed for listed in situation.desired)


def test_the_heir_neither_yields_nor_hands_over() -> None:
    watch = Watch(HEIR)
    after = view_of((0, claim(HEIR, 4)), (0, claim(LIAR, 99)), distrusted=frozenset({LIAR}))
    situation = look(watch, after, held={0: 4})
    assert not any(isinstance(action, Yield) for action in decide(watch, situation, RULES))
    assert not grants_handover(watch, situation, 0, LIAR, 5)
    trusting = Watch(HEIR)
    situation = look(trusting, view_of((0, claim(HEIR, 4)), (0, claim(LIAR, 99))), held={0: 4})
    assert any(isinstance(action, Yield) for action in decide(trusting, situation, RULES))


def test_who_is_distrusted_lets_go_like_anybody_who_is_deposed() -> None:
    watch = Watch(LIAR)
    situation = look(watch, view_of((0, claim(LIAR, 3)), (0, claim(HEIR, 5))), held={0: 3})
    assert Yield(0, HEIR, 5) in decide(watch, situation, RULES)


@given(st.integers(0, 1 << 30))
def test_whatever_a_liar_claims_and_whenever_it_is_found_out_all_agree_in_the_end(seed: int) -> None:
    """Three honest peers; each comes to its verdict at some time, and the liar goes on claiming."""
    rng = random.Random(seed)
    names = [HEIR, OTHER, "12D3KooW" + "Q" * 44]
    watches = {name: Watch(name) for name in names}
    found_out = {name: rng.randrange(6) for name in names}
    claims: dict[str, LeaseClaim] = {LIAR: claim(LIAR, rng.choice((1, 3)), 2e9)}
    held: dict[str, int] = {}
    seen: dict[str, dict[int, LeaseClaim]] = {name: {} for name in names}
    for turn in range(40):
        now = NOW + 10.0 * turn
        if turn and rng.random() < 0.5:
            claims[LIAR] = claim(LIAR, rng.choice((claims[LIAR].epoch + 1, 50, MAX_EPOCH)), 2e9)
        for name in rng.sample(names, 3):
            distrusted = frozenset({LIAR}) if turn >= found_out[name] else frozenset()
            believed = [(0, c) for c in claims.values() if c.owner not in distrusted]
            memory = seen[name]
            if memory.get(0) is not None and memory[0].owner in distrusted:
                del memory[0]
            for slot, c in believed:
                if slot not in memory or wins(c, memory[slot]):
                    memory[slot] = c
            records = [
                LeaseRecord(owner=c.owner, leases=[Lease(0, c.epoch, 0)], issued_at=now, expires_at=c.expires_at)
                for _, c in believed
            ]
            view = resolve(
                now, peers=[peer(each) for each in (LIAR, *names)], leases=records, votes=[],
                strongest=memory, distrusted=distrusted,
            )  # fmt: skip
            mine = {0: held[name]} if name in held else {}
            situation = situation_of(
                view, watches[name], now=now, capacity=4, num_slots=1, replication=1, held=mine, copies={}, busy=()
            )
            for action in decide(watches[name], situation, RULES):
                if isinstance(action, Yield):
                    del held[name], claims[name]
                elif (isinstance(action, ClaimFree | TakeOver | Reclaim) and action.epoch <= MAX_EPOCH) or (
                    isinstance(action, RequestHandover) and held.get(action.from_peer) == action.epoch - COPY_RAISE
                ):
                    held[name] = action.epoch
                    claims[name] = claim(name, action.epoch, 2e9)
    assert len(held) == 1
    [owner] = held
    assert {watch.claims[0].owner for watch in watches.values()} == {owner}
    assert held[owner] < 20


# Stand-ins ------------------------------------------------------------------------------------------------------------


def publish(publisher: SlotPublisher, standins: list[FakeStandIn], text: bytes) -> SurrogateDelta:
    for standin in standins:
        standin.apply(text)
    return publisher.publish(1, [text] * len(standins), standins)


def test_stand_ins_follow_the_heir_from_an_epoch_far_above_its_own() -> None:
    """A liar's lease at a high epoch would make the deltas of every later owner stale."""
    subscriber = SlotSubscriber(0, seeded(), load=load, patience=Patience(gap=3.0))
    theirs, ours = seeded(), seeded()
    liar = SlotPublisher(0, 99, 0)
    subscriber.lease(LIAR, 99, 0.0)
    subscriber.receive(LIAR, publish(liar, theirs, b"good"), 0.0)
    assert subscriber.point == Point(99, 1)
    heir = SlotPublisher(0, 4, 1)
    for standin in ours:
        standin.apply(b"good")
    delta = publish(heir, ours, b"better")
    subscriber.lease(HEIR, 4, 1.0)  # as long as it trusts the liar
    with pytest.raises(Refused, match="is over"):
        subscriber.receive(HEIR, delta, 1.0)

    subscriber.disown()
    assert subscriber.owner == ""
    assert subscriber.need(100.0) is None
    with pytest.raises(Refused):
        subscriber.receive(LIAR, publish(liar, theirs, b"more"), 2.0)
    subscriber.lease(HEIR, 4, 2.0)
    subscriber.receive(HEIR, delta, 2.0)
    assert subscriber.point == Point(4, 2)
    assert state_digest(subscriber.layers) == state_digest(ours)


def test_an_heir_that_goes_on_from_another_state_is_fetched_from() -> None:
    subscriber = SlotSubscriber(0, seeded(), load=load, patience=Patience(gap=3.0))
    theirs, ours = seeded(), seeded()
    liar = SlotPublisher(0, 99, 0)
    subscriber.lease(LIAR, 99, 0.0)
    subscriber.receive(LIAR, publish(liar, theirs, b"bits that nobody else has"), 0.0)
    subscriber.disown()
    subscriber.lease(HEIR, 4, 1.0)
    heir = SlotPublisher(0, 4, 0)
    subscriber.receive(HEIR, heir.announce(1, ours), 1.0)
    need = subscriber.need(1.0)
    assert need is not None
    assert need.from_peer == HEIR
    subscriber.install(HEIR, snapshot_of(heir, ours), 2.0)
    assert state_digest(subscriber.layers) == state_digest(ours)
    assert subscriber.need(100.0) is None
