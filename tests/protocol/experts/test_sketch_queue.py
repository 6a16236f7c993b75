"""What waits at an owner for its next step, and how senders follow what the owner says of it."""

from __future__ import annotations

import math
import random
import threading

import pytest
from shoal.protocol.experts.sketches import (
    ACTIVE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    MIN_SHARE,
    MOST_STEPS,
    SenderRate,
    SketchQueue,
)
from shoal.protocol.messages import SketchReply

# Queue ----------------------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_and_says_how_full_it_is() -> None:
    queue: SketchQueue[int] = SketchQueue(100)
    assert queue.rate() == 1.0
    assert queue.offer("ann", 1, 50, 0.0)
    assert queue.rate() == 1.0
    assert queue.offer("ann", 2, 30, 0.0)
    assert queue.rate() == pytest.approx(0.4)
    assert not queue.offer("ann", 3, 21, 0.0)
    assert queue.offer("ann", 4, 20, 0.0)
    assert queue.rate() == 0.0
    assert not queue.offer("bob", 5, 1, 0.0)
    assert (len(queue), queue.nbytes) == (3, 100)
    assert queue.take(10) == [1]
    assert queue.take() == [2, 4]
    assert queue.take() == []
    assert (len(queue), queue.nbytes, queue.rate()) == (0, 0, 1.0)


def test_above_half_nobody_gets_more_than_a_fair_share() -> None:
    queue: SketchQueue[str] = SketchQueue(100)
    assert not queue.offer("bob", "too much", 101, 0.0)  # but bob is there
    assert all(queue.offer("ann", "a", 10, 1.0) for _ in range(5))
    assert not queue.offer("ann", "a", 10, 1.0)
    assert queue.offer("bob", "b", 40, 1.0)
    assert not queue.offer("bob", "b", 11, 1.0)
    assert queue.offer("eve", "e", 10, 1.0)  # the first of a third one
    queue.take()
    # who has not offered for long does not count any more
    later = 1.0 + ACTIVE_SECONDS
    assert all(queue.offer("ann", "a", 10, later) for _ in range(10))


def test_what_waits_for_many_of_its_senders_steps_is_not_added_to() -> None:
    queue: SketchQueue[int] = SketchQueue(1 << 20)
    for step in range(MOST_STEPS):
        assert queue.rate("ann") == pytest.approx(min(1.0, max(0.0, (8 - step) / 6)))
        assert queue.offer("ann", step, 10, 0.0, step)
        assert queue.offer("ann", step, 10, 0.0, step)  # another slot of the same step
    assert queue.rate("ann") == 0.0
    assert not queue.has_room("ann", 10, 0.0, MOST_STEPS)
    assert not queue.offer("ann", 99, 10, 0.0, MOST_STEPS)
    assert queue.offer("ann", 99, 10, 0.0, MOST_STEPS - 1)  # the rest of what waits already
    assert queue.rate("bob") == 1.0
    assert queue.offer("bob", 99, 10, 0.0, MOST_STEPS)
    queue.take(20)
    assert queue.offer("ann", 99, 10, 0.0, MOST_STEPS)
    queue.take()
    assert queue.rate("ann") == 1.0


def test_any_sequence_keeps_the_bounds(rng: random.Random) -> None:
    queue: SketchQueue[tuple[str, int]] = SketchQueue(1000)
    waiting: list[tuple[str, int]] = []
    for turn in range(3000):
        item = (rng.choice("abcd"), rng.choice([1, 40, 300, 900]))
        if queue.offer(item[0], item, item[1], turn * 0.1, rng.randrange(20)):
            waiting.append(item)
        if rng.random() < 0.2:
            taken = queue.take(rng.choice([None, 1, 500]))
            assert taken == waiting[: len(taken)]
            del waiting[: len(taken)]
        assert queue.nbytes == sum(size for _, size in waiting) <= 1000
        assert len(queue) == len(waiting)
        assert 0.0 <= queue.rate() <= 1.0


def test_two_threads_lose_nothing() -> None:
    queue: SketchQueue[int] = SketchQueue(1 << 30)
    got: list[int] = []
    done = threading.Event()

    def drain() -> None:
        while not done.is_set() or len(queue):
            got.extend(queue.take(64))

    taker = threading.Thread(target=drain)
    taker.start()
    try:
        assert all(queue.offer(str(n % 3), n, n % 7, 0.0) for n in range(5000))
    finally:
        done.set()
        taker.join(30)
    assert not taker.is_alive()
    assert got == list(range(5000))
    assert queue.nbytes == 0


# Senders --------------------------------------------------------------------------------------------------------------


def test_a_sender_follows_what_the_owner_says(rng: random.Random) -> None:
    rate = SenderRate(rng)
    assert rate.share == pytest.approx(1)
    rate.replied(SketchReply(0.8, 1), 0.0)
    assert rate.share == pytest.approx(0.8)
    rate.replied(SketchReply(0.0, 1), 0.0)
    assert rate.share == pytest.approx(0.4)  # by half at most
    rate.replied(SketchReply(0.42, 1), 0.0)
    assert rate.share == pytest.approx(0.42)  # not beyond it
    rate.replied(SketchReply(1.0, 1, ((3, "stale-epoch"),)), 0.0)
    assert rate.share == pytest.approx(0.42 + 1 / 16)
    rate.replied(SketchReply(1.0, 1, ((3, "busy"),)), 0.0)
    assert rate.share < 0.25
    for _ in range(100):
        rate.replied(SketchReply(0.0, 1), 0.0)
    assert rate.share == MIN_SHARE
    for _ in range(16):
        rate.replied(SketchReply(1.0, 1), 0.0)
    assert rate.share == 1.0


def test_a_sender_leaves_an_owner_alone_that_does_not_answer(rng: random.Random) -> None:
    rate = SenderRate(rng)
    now = 100.0
    assert rate.ready(now)
    for n in range(40):
        rate.failed(now) if n % 2 else rate.replied(SketchReply(0.0, 0, ((3, "busy"),)), now)
        pause = min(LONGEST_PAUSE_SECONDS, 2.0**n)
        assert not rate.ready(now + 0.49 * pause)
        assert rate.ready(now + pause)
        now += pause
    assert rate.share == MIN_SHARE
    rate.replied(SketchReply(1.0, 1), now)
    assert rate.ready(now)
    rate.failed(now)
    assert rate.ready(now + 1.0)  # patience starts anew


def test_senders_share_a_slow_owner_fairly_and_use_it(rng: random.Random) -> None:
    """Six composers, an owner that can do a third of their rows, then all: bounded, used, fair, and back to all."""
    names = [f"composer {n}" for n in range(6)]
    rates = {name: SenderRate(rng) for name in names}
    wanted, capacity = 200, 400  # rows per composer and turn; rows per turn
    queue: SketchQueue[tuple[str, int]] = SketchQueue(4 * capacity)
    served = dict.fromkeys(names, 0)
    for turn in range(1000):
        now = float(turn)
        for name in rng.sample(names, len(names)):
            if not rates[name].ready(now):
                continue
            count = math.ceil(wanted * rates[name].share)
            taken = queue.offer(name, (name, count), count, now)
            rates[name].replied(SketchReply(queue.rate(), int(taken), () if taken else ((3, "busy"),)), now)
        for name, count in queue.take(capacity):
            if turn >= 100:
                served[name] += count
    total = sum(served.values())
    assert total > 0.8 * 900 * capacity
    fairness = total**2 / (len(names) * sum(count**2 for count in served.values()))  # Jain's index, 1 is equal
    assert fairness > 0.98
    queue.take()
    for turn in range(1000, 1100):
        for name in names:
            if rates[name].ready(float(turn)):
                queue.offer(name, (name, 1), math.ceil(wanted * rates[name].share), float(turn))
                rates[name].replied(SketchReply(queue.rate(), 1), float(turn))
                queue.take()
    assert all(rate.share == 1.0 for rate in rates.values())
