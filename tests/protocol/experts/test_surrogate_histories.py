"""Any history of loss, repetition, reordering and changes of owner ends with copies equal to the bit."""

from __future__ import annotations

import random

from fake_standins import LAYERS, FakeStandIn, load, seeded, snapshot_of, states
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from shoal.protocol.experts.surrogate_book import SurrogateBook
from shoal.protocol.experts.surrogates import SEED, Patience, Point
from shoal.protocol.messages import DeltaBatch, SurrogateDelta

PATIENCE = Patience(gap=3.0, retry=10.0, max_waiting=4)


PEERS = ["a", "b", "c"]


class Swarm:
    """Peers with a book each, one slot, and a network that hypothesis misuses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.books = {name: SurrogateBook(load, PATIENCE) for name in PEERS}
        self.layers: dict[str, list[FakeStandIn]] = {}  # of those that publish, or believe they may
        self.truth = ("a", 1)
        self.flying: list[tuple[str, str, SurrogateDelta]] = []  # (to, sender, delta)
        self.published = {SEED: states(seeded()), Point(1, 0): states(seeded())}
        for name in PEERS[1:]:
            self.books[name].follow(0, seeded())
        self.layers["a"] = seeded()
        self.books["a"].own(0, 1)
        for name in PEERS[1:]:
            self.tell(name)

    def tell(self, name: str) -> None:
        """The directory's record reaches a peer; one that is deposed yields."""
        owner, epoch = self.truth
        book = self.books[name]
        if name != owner and 0 in book.publishers:
            book.follow(0, self.layers.pop(name), book.publishers[0].point)
        book.lease(0, owner, epoch, self.now)

    def send(self, sender: str, delta: SurrogateDelta) -> None:
        self.flying += [(name, sender, delta) for name in PEERS if name != sender]

    def publish(self, name: str) -> None:
        deltas = [random.randbytes(4) for _ in range(LAYERS)]
        for layer, delta in zip(self.layers[name], deltas, strict=True):
            layer.apply(delta)
        publisher = self.books[name].publishers[0]
        self.send(name, publisher.publish(0, deltas, self.layers[name]))
        self.published[publisher.point] = states(self.layers[name])

    def deliver(self, index: int) -> None:
        to, sender, delta = self.flying[index]
        self.books[to].receive(sender, DeltaBatch((delta,)), self.now)

    def flush(self, name: str) -> None:
        """Everything on its way to a peer arrives, the latest first or last."""
        for to, sender, delta in random.choice([self.flying, self.flying[::-1]]):
            if to == name:
                self.books[to].receive(sender, DeltaBatch((delta,)), self.now)
        self.flying = [message for message in self.flying if message[0] != name]

    def take_over(self, name: str) -> None:
        book = self.books[name]
        if 0 in book.subscribers:
            self.truth = (name, self.truth[1] + 1)
            self.layers[name] = book.subscribers[0].layers
            self.published[book.own(0, self.truth[1]).point] = states(self.layers[name])

    def repair(self, name: str) -> None:
        """Fetches, from owners that are still there."""
        for need in self.books[name].needs(self.now):
            publisher = self.books[need.from_peer].publishers.get(need.slot)
            if publisher is not None:
                self.books[name].install(need.from_peer, snapshot_of(publisher, self.layers[need.from_peer]), self.now)

    def check(self) -> None:
        """Nobody ever holds a state that was not published under the name it has there."""
        for name, book in self.books.items():
            for subscriber in book.subscribers.values():
                assert states(subscriber.layers) == self.published[subscriber.point], name


operations = st.lists(
    st.tuples(
        st.sampled_from(
            ["publish"] * 4
            + ["deliver"] * 4
            + ["flush", "tell", "take over"] * 2
            + ["drop", "repeat", "repair", "wait", "announce"]
        ),
        st.integers(0, 63),
    ),
    max_size=60,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_all_copies_end_equal_whatever_the_network_does(history: list[tuple[str, int]]) -> None:
    swarm = Swarm()
    for operation, number in history:
        name = PEERS[number % len(PEERS)]
        owners = sorted(swarm.layers)
        index = number % len(swarm.flying) if swarm.flying else 0
        if operation == "publish":
            swarm.publish(owners[number % len(owners)])
        elif operation == "announce":
            owner = owners[number % len(owners)]
            swarm.send(owner, swarm.books[owner].publishers[0].announce(0, swarm.layers[owner]))
        elif operation == "wait":
            swarm.now += number / 4
        elif operation == "tell":
            swarm.tell(name)
        elif operation == "take over":
            swarm.take_over(name)
        elif operation == "repair":
            swarm.repair(name)
        elif operation == "flush":
            swarm.flush(name)
        elif swarm.flying:
            if operation != "drop":
                swarm.deliver(index)
            if operation != "repeat":
                swarm.flying.pop(index)
        swarm.check()
    for name in PEERS:
        swarm.tell(name)
    while swarm.flying:  # in any order, or never
        index = random.randrange(len(swarm.flying))
        if random.random() < 0.5:
            swarm.deliver(index)
        swarm.flying.pop(index)
    owner, epoch = swarm.truth
    swarm.send(owner, swarm.books[owner].publishers[0].announce(0, swarm.layers[owner]))
    while swarm.flying:
        swarm.deliver(0)
        swarm.flying.pop(0)
    for _ in range(2):
        swarm.now += PATIENCE.retry
        for name in PEERS:
            swarm.repair(name)
    note(f"{[(name, dict(book.refusals)) for name, book in swarm.books.items()]}")
    for name in PEERS:
        if name != owner:
            subscriber = swarm.books[name].subscribers[0]
            assert states(subscriber.layers) == states(swarm.layers[owner]), name
            assert subscriber.point == swarm.books[owner].publishers[0].point
            assert subscriber.point.epoch == epoch
            assert not subscriber.behind
    assert sorted(swarm.layers) == [owner]
