"""Stand-ins over bad gossip: whatever is lost, repeated or reordered, all copies end equal to the bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from fake_standins import LAYERS, FakeStandIn, load, seeded, snapshot_of, states
from shoal.kernels.experts import DenseExpert
from shoal.kernels.standin import initial_standin, make_publisher, standin_from_bytes
from shoal.protocol.errors import Refused
from shoal.protocol.experts.surrogate_book import SurrogateBook
from shoal.protocol.experts.surrogates import (
    MAX_EARLY,
    SEED,
    Need,
    Patience,
    Point,
    SlotPublisher,
    SlotSubscriber,
    state_digest,
)
from shoal.protocol.messages import DeltaBatch, StandInSnapshot, SurrogateDelta

PATIENCE = Patience(gap=3.0, retry=10.0, max_waiting=4)


@dataclass
class Owner:
    name: str = "owner"
    layers: list[FakeStandIn] = field(default_factory=seeded)
    publisher: SlotPublisher = field(default_factory=lambda: SlotPublisher(0, 1, 0))

    def publish(self) -> SurrogateDelta:
        deltas = [random.randbytes(5) for _ in self.layers]
        for layer, delta in zip(self.layers, deltas, strict=True):
            layer.apply(delta)
        return self.publisher.publish(self.publisher.seq * 8, deltas, self.layers, [0.9] * LAYERS)


def subscribed(owner: str = "owner", epoch: int = 1) -> SlotSubscriber[FakeStandIn]:
    subscriber = SlotSubscriber(0, seeded(), load=load, patience=PATIENCE)
    subscriber.lease(owner, epoch, 0.0)
    return subscriber


def refused(reason: str, subscriber: SlotSubscriber[FakeStandIn], sender: str, delta: SurrogateDelta) -> None:
    with pytest.raises(Refused) as refusal:
        subscriber.receive(sender, delta, 0.0)
    assert refusal.value.reason == reason


def test_in_order() -> None:
    owner, subscriber = Owner(), subscribed()
    for _ in range(3):
        subscriber.receive("owner", owner.publish(), 0.0)
    assert states(subscriber.layers) == states(owner.layers)
    assert subscriber.point == Point(1, 3)
    assert subscriber.fidelity == (0.9, 0.9)
    assert subscriber.need(1e9) is None


def test_reordered_and_repeated() -> None:
    owner, subscriber = Owner(), subscribed()
    deltas = [owner.publish() for _ in range(4)]
    for i in (2, 0, 2, 1, 0, 3, 3):
        subscriber.receive("owner", deltas[i], 0.0)
    assert states(subscriber.layers) == states(owner.layers)
    assert not subscriber.behind


def test_a_gap_is_fetched_after_patience_and_again_after_retry() -> None:
    owner, subscriber = Owner(), subscribed()
    owner.publish()
    subscriber.receive("owner", owner.publish(), 100.0)
    assert subscriber.behind
    assert subscriber.need(102.9) is None
    assert subscriber.need(103.0) == Need(0, "owner")
    assert subscriber.need(112.9) is None
    assert subscriber.need(113.0) == Need(0, "owner")
    subscriber.install("owner", snapshot_of(owner.publisher, owner.layers), 114.0)
    assert states(subscriber.layers) == states(owner.layers)
    assert subscriber.need(1e9) is None


def test_a_snapshot_is_followed_by_the_deltas_that_wait() -> None:
    owner, subscriber = Owner(), subscribed()
    owner.publish()
    snapshot = snapshot_of(owner.publisher, owner.layers)
    for _ in range(2):
        subscriber.receive("owner", owner.publish(), 0.0)
    subscriber.install("owner", snapshot, 1.0)
    assert subscriber.point == Point(1, 3)
    assert states(subscriber.layers) == states(owner.layers)


def test_a_lost_last_delta_shows_in_the_next_announcement() -> None:
    owner, subscriber = Owner(), subscribed()
    delta = owner.publish()
    subscriber.receive("owner", owner.publisher.announce(8, owner.layers), 0.0)
    assert subscriber.need(2.9) is None  # it may only be late
    assert subscriber.need(3.0) == Need(0, "owner")
    subscriber.receive("owner", delta, 4.0)
    assert not subscriber.behind


def test_an_announcement_of_the_same_point_with_another_state() -> None:
    owner, subscriber = Owner(), subscribed()
    subscriber.receive("owner", owner.publish(), 0.0)
    owner.layers[1].state = bytes(32)
    subscriber.receive("owner", owner.publisher.announce(8, owner.layers), 0.0)
    assert subscriber.need(0.0) == Need(0, "owner")


@pytest.mark.parametrize("wrong", ["layer", "digest"])
def test_all_layers_or_none(wrong: str) -> None:
    owner, subscriber = Owner(), subscribed()
    before = states(subscriber.layers)
    delta = owner.publish()
    layers = (delta.layers[0], b"bad") if wrong == "layer" else delta.layers
    digest = bytes(16) if wrong == "digest" else delta.digest
    subscriber.receive("owner", SurrogateDelta(0, 1, 1, 8, layers, digest), 0.0)
    assert states(subscriber.layers) == before
    assert subscriber.point == SEED
    assert subscriber.need(0.0) == Need(0, "owner")  # at once: waiting does not help
    subscriber.install("owner", snapshot_of(owner.publisher, owner.layers), 0.0)
    assert states(subscriber.layers) == states(owner.layers)


def test_refusals_leave_the_state_alone() -> None:
    owner, subscriber = Owner(), subscribed(epoch=1)
    before = states(subscriber.layers)
    delta = owner.publish()
    refused("not-owner", subscriber, "mallory", delta)
    refused("wrong-layers", subscriber, "owner", SurrogateDelta(0, 1, 1, 8, (b"x",), bytes(16)))
    subscriber.lease("heir", 2, 0.0)
    refused("stale-epoch", subscriber, "owner", delta)
    subscriber.lease("owner", 1, 0.0)  # an old record
    assert (subscriber.owner, subscriber.epoch) == ("heir", 2)
    assert states(subscriber.layers) == before
    assert not subscriber.behind


def test_too_many_waiting_deltas() -> None:
    owner, subscriber = Owner(), subscribed()
    deltas = [owner.publish() for _ in range(6)]
    for delta in deltas[1:5]:
        subscriber.receive("owner", delta, 0.0)
    refused("overflow", subscriber, "owner", deltas[5])
    assert subscriber.need(0.0) == Need(0, "owner")


def bad_snapshots(owner: Owner) -> list[tuple[str, str, StandInSnapshot]]:
    good = snapshot_of(owner.publisher, owner.layers)
    one, two = good.layers
    return [
        ("not-owner", "mallory", good),
        ("wrong-slot", "owner", StandInSnapshot(1, 1, 2, good.layers, good.digest)),
        ("wrong-epoch", "owner", StandInSnapshot(0, 2, 2, good.layers, good.digest)),
        ("old-snapshot", "owner", StandInSnapshot(0, 1, 0, good.layers, good.digest)),
        ("wrong-layers", "owner", StandInSnapshot(0, 1, 2, (one,), good.digest)),
        ("malformed", "owner", StandInSnapshot(0, 1, 2, (one, b"short"), good.digest)),
        ("wrong-digest", "owner", StandInSnapshot(0, 1, 2, (two, two), good.digest)),
    ]


def test_bad_snapshots_are_refused() -> None:
    owner = Owner()
    book = SurrogateBook(load, PATIENCE)
    subscriber = book.follow(0, seeded())
    book.lease(0, "owner", 1, 0.0)
    book.receive("owner", DeltaBatch((owner.publish(),)), 0.0)
    before = states(subscriber.layers)
    owner.publish()
    for reason, sender, snapshot in bad_snapshots(owner):
        book.refusals.clear()
        assert not book.install(sender, snapshot, 0.0)
        assert book.refusals == {"unknown-slot" if reason == "wrong-slot" else reason: 1}
        assert states(subscriber.layers) == before
    with pytest.raises(Refused, match="slot 1 instead of 0"):
        subscriber.install("owner", bad_snapshots(owner)[1][2], 0.0)


def test_a_new_owner_goes_on_from_what_it_holds() -> None:
    """The first owner dies; its last delta reached some, not the heir."""
    owner = Owner()
    heir, informed, late = (subscribed() for _ in range(3))
    for delta, to in [(owner.publish(), (heir, informed)), (owner.publish(), (informed,))]:
        for subscriber in to:
            subscriber.receive("owner", delta, 0.0)
    successor = Owner("heir", heir.layers, SlotPublisher(0, 2, heir.point.seq))
    first = successor.publish()
    assert (first.epoch, first.seq) == (2, 2)
    for subscriber in (informed, late):
        refused("early-epoch", subscriber, "heir", first)  # gossip was faster than the directory
        subscriber.lease("heir", 2, 0.0)
    assert informed.need(0.0) == Need(0, "heir")  # it is on the dead owner's branch
    assert late.need(3.0) == Need(0, "heir")
    for subscriber in (informed, late):
        subscriber.install("heir", snapshot_of(successor.publisher, successor.layers), 4.0)
        assert states(subscriber.layers) == states(successor.layers)
        subscriber.receive("heir", successor.publish(), 5.0)
        assert states(subscriber.layers) == states(successor.layers)


def test_of_deltas_under_leases_that_nobody_has_little_is_kept() -> None:
    """Anybody may send them, a megabyte for each slot."""
    subscriber, strangers = subscribed(), [Owner(f"stranger {number}") for number in range(20)]
    for number, stranger in enumerate(strangers):
        stranger.publisher.epoch = 50 + number
        refused("early-epoch", subscriber, stranger.name, stranger.publish())
    assert len(subscriber._early) == MAX_EARLY
    assert not any(delta.layers or delta.fidelity for delta in subscriber._early.values())
    subscriber.lease("stranger 1", 51, 0.0)
    assert subscriber.need(3.0) == Need(0, "stranger 1"), "it is known where the new owner stands"


def test_a_change_of_owner_costs_those_in_step_no_fetch() -> None:
    owner, heir, other = Owner(), subscribed(), subscribed()
    delta = owner.publish()
    heir.receive("owner", delta, 0.0)
    other.receive("owner", delta, 0.0)
    successor = Owner("heir", heir.layers, SlotPublisher(0, 2, heir.point.seq))
    other.lease("heir", 2, 0.0)
    other.receive("heir", successor.publisher.announce(8, successor.layers), 0.0)
    assert other.point == Point(2, 1)
    other.receive("heir", successor.publish(), 0.0)
    assert states(other.layers) == states(successor.layers)
    assert not other.behind


def test_the_next_number_on_another_branch_is_not_applied() -> None:
    owner, heir, informed = Owner(), subscribed(), subscribed()
    informed.receive("owner", owner.publish(), 0.0)
    successor = Owner("heir", heir.layers, SlotPublisher(0, 2, heir.point.seq))
    informed.lease("heir", 2, 0.0)
    successor.publish()  # lost; the next has the number that follows the dead owner's last
    informed.receive("heir", successor.publish(), 0.0)
    assert states(informed.layers) == states(owner.layers)
    assert informed.point == Point(1, 1)
    assert informed.need(0.0) == Need(0, "heir")


def test_the_book_routes_counts_and_lists() -> None:
    book = SurrogateBook(load, PATIENCE)
    owner = Owner()
    first, second, lost = owner.publish(), owner.publish(), owner.publish()
    for slot in (0, 1, 2):
        book.follow(slot, seeded())
        book.lease(slot, "owner", 1, 0.0)
    mine = book.own(1, 5)
    assert mine.point == Point(5, 0)

    def to(slot: int, delta: SurrogateDelta) -> SurrogateDelta:
        return SurrogateDelta(slot, delta.epoch, delta.seq, delta.step, delta.layers, delta.digest)

    book.receive("owner", DeltaBatch((first, to(1, first), to(2, lost), to(9, first), second, lost)), 0.0)
    assert states(book.subscribers[0].layers) == states(owner.layers)
    assert book.refusals == {"own-slot": 1, "unknown-slot": 1}
    assert [slot for slot, subscriber in book.subscribers.items() if subscriber.behind] == [2]
    assert book.needs(3.0, limit=0) == []
    assert book.needs(3.0) == [Need(2, "owner")]
    assert book.needs(3.0) == []
    assert book.epochs() == {0: 1, 1: 5, 2: 1}
    again = book.follow(1, seeded(), mine.point)
    assert (again.epoch, book.publishers) == (5, {})


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_real_stand_ins_with_a_lost_delta(kind: str) -> None:
    seed = random.getrandbits(32)
    generator = torch.Generator().manual_seed(seed)
    hidden, width = 32, 64
    experts = [
        DenseExpert(
            torch.randn(2 * width, hidden, generator=generator) / 6, torch.randn(hidden, width, generator=generator) / 8
        )
        for _ in range(LAYERS)
    ]
    seeds = [initial_standin(kind, e.gate_up, e.down, 16) for e in experts]
    publishers = [make_publisher(seed, replay_rows=64, generator=generator) for seed in seeds]
    assert [p.published.digest() for p in publishers] == [s.digest() for s in seeds]
    slot = SlotPublisher(0, 1, 0)
    subscriber = SlotSubscriber(0, seeds, load=standin_from_bytes, patience=PATIENCE)
    subscriber.lease("owner", 1, 0.0)
    for round_number in range(4):
        deltas = []
        for expert, publisher in zip(experts, publishers, strict=True):
            expert.gate_up.add_(torch.randn(expert.gate_up.shape, generator=generator) * 0.02)
            publisher.observe(torch.randn(48, hidden, generator=generator), torch.rand(48, generator=generator))
            publisher.refit(expert)
            deltas.append(publisher.delta(expert))
        published = [p.published for p in publishers]
        delta = slot.publish(round_number, deltas, published)
        if round_number == 2:
            continue  # lost
        subscriber.receive("owner", delta, float(round_number))
        if round_number < 2:
            assert state_digest(subscriber.layers) == state_digest(published), f"seed {seed}"
    assert subscriber.need(100.0) == Need(0, "owner")
    subscriber.install("owner", snapshot_of(slot, published), 100.0)
    assert subscriber.point == Point(1, 4)
    assert state_digest(subscriber.layers) == state_digest(published), f"seed {seed}"
    copies = zip(subscriber.layers, published, strict=True)
    assert all(torch.equal(a, b) for mine, theirs in copies for a, b in zip(mine.dense(), theirs.dense(), strict=True))
