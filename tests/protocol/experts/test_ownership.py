"""Ownership: the desired assignment, and a whole swarm of deciding peers on a virtual clock."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.directory.records import MAX_EPOCH
from shoal.protocol.directory.view import LeaseClaim, wins
from shoal.protocol.experts.ownership import (
    ClaimFree,
    Copy,
    DropStandby,
    KeepStandby,
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
from shoal.protocol.experts.rendezvous import _match, _Ranking, desired_owners, draws_of

RULES = Rules(lease=16.0)
capacities = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=6), st.integers(0, 40), max_size=8)


def peers_of(count: int, capacity: int) -> dict[str, int]:
    return {f"12D3KooW{random.getrandbits(64):016x}": capacity for _ in range(count)}


# The desired assignment -----------------------------------------------------------------------------------------------


@given(st.integers(0, 64), capacities, st.integers(1, 4))
def test_every_slot_has_an_owner_and_nobody_is_above_its_bound(
    num_slots: int, capacity: dict[str, int], replication: int
) -> None:
    lists = desired_owners(num_slots, capacity, replication)
    weights = {p: min(c, num_slots) for p, c in capacity.items() if c > 0}
    owned = Counter(peers[0] for peers in lists if peers)
    assert owned.total() == min(num_slots, sum(weights.values()))
    for peer, count in owned.items():
        fair = num_slots * weights[peer] / sum(weights.values())
        assert count <= capacity[peer]
        if fair < weights[peer]:
            assert count <= max(math.ceil(fair), 1.25 * fair)
    for peers in lists:
        assert len(set(peers)) == len(peers)
        assert len(peers) == (min(replication, len(weights)) if peers else 0)


def sorted_first(num_slots: int, capacity: dict[str, int]) -> list[list[str]]:
    """Owners as the formula has them: all pairs by score, from the highest down."""
    weights = {p: min(c, num_slots) for p, c in capacity.items() if c > 0}
    total = sum(weights.values())
    pairs = sorted(
        (-math.log(draws_of(p, num_slots)[s]) / w, p, s) for p, w in weights.items() for s in range(num_slots)
    )
    fair = {p: num_slots * w / total for p, w in weights.items()}
    lists: list[list[str]] = [[] for _ in range(num_slots)]
    load = Counter[str]()
    for _, peer, slot in pairs:
        bound = min(weights[peer], max(math.ceil(fair[peer]), int(1.25 * fair[peer])))
        if not lists[slot] and load[peer] < (weights[peer] if total <= num_slots else bound):
            lists[slot].append(peer)
            load[peer] += 1
    return lists


@given(st.integers(1, 64), capacities)
def test_owners_are_those_of_the_highest_scores(num_slots: int, capacity: dict[str, int]) -> None:
    assert desired_owners(num_slots, capacity, 1) == sorted_first(num_slots, capacity)


def test_with_many_peers_few_pairs_are_looked_at() -> None:
    """Every peer computes this on every piece of news: all pairs of a large swarm would be too many."""
    peers = peers_of(1000, 8)
    ranked = _Ranking(peers, 64)
    lists: list[list[str]] = [[] for _ in range(64)]
    _match(lists, ranked, 1, dict.fromkeys(peers, 1))
    assert all(lists)
    assert len(ranked.read) < 64_000 / 20


def test_few_slots_split_evenly() -> None:
    for _ in range(50):
        owned = Counter(peers[0] for peers in desired_owners(16, peers_of(3, 16), 2))
        assert max(owned.values()) <= 6
        assert min(owned.values()) >= 4


def test_capacity_is_weight() -> None:
    strong, weak = peers_of(5, 60), peers_of(5, 20)
    owned = Counter(peers[0] for peers in desired_owners(120, strong | weak, 1))
    assert sum(owned[p] for p in strong) > 2 * sum(owned[p] for p in weak)


def test_assignment_ignores_the_order_of_the_peers() -> None:
    peers = list(peers_of(9, 8).items())
    assert desired_owners(40, dict(peers), 3) == desired_owners(40, dict(random.sample(peers, 9)), 3)


@pytest.mark.parametrize(("num_slots", "num_peers"), [(16, 3), (64, 5), (256, 24)])
def test_joining_and_leaving_move_about_a_share(num_slots: int, num_peers: int) -> None:
    moved, shares = 0, 0  # the same pair read backwards is a leaving
    for _ in range(40):
        peers = peers_of(num_peers + 1, num_slots)
        joiner = next(iter(peers))
        before = desired_owners(num_slots, {p: c for p, c in peers.items() if p != joiner}, 2)
        after = desired_owners(num_slots, peers, 2)
        moved += sum(a[0] != b[0] for a, b in zip(before, after, strict=True))
        shares += sum(peers[0] == joiner for peers in after)
    assert shares <= moved < 2 * shares


def test_a_standby_usually_becomes_the_owner() -> None:
    hits, total = 0, 0
    for _ in range(30):
        peers = peers_of(6, 32)
        before = desired_owners(32, peers, 2)
        gone = random.choice(list(peers))
        after = desired_owners(32, {p: c for p, c in peers.items() if p != gone}, 2)
        for old, new in zip(before, after, strict=True):
            if old[0] == gone:
                hits += old[1] == new[0]
                total += 1
    assert hits / total > 0.5


# Single decisions -----------------------------------------------------------------------------------------------------


def situation(now: float, desired: list[list[str]], **changes: object) -> Situation:
    values = {"capacity": 4, "live": ["a", "b", "c"], "leaving": [], "held": {}, "copies": {}, **changes}
    return Situation(now, desired=desired, **values)  # type: ignore[arg-type]


Claims = dict[int, LeaseClaim]


def claimed(owner: str, epoch: int, version: int, expires_at: float) -> LeaseClaim:
    return LeaseClaim(owner=owner, epoch=epoch, version=version, expires_at=expires_at)


def watching(me: str, now: float, claims: Claims, desired: list[list[str]]) -> Watch:
    watch = Watch(me)
    watch.observe(now, claims, desired)
    return watch


def test_a_free_slot_is_claimed_once_the_directory_has_settled() -> None:
    desired = [["a", "b"]]
    watch = watching("a", 100.0, {}, desired)
    assert decide(watch, situation(101.9, desired), RULES) == []
    assert decide(watch, situation(102.0, desired), RULES) == [ClaimFree(0, 1)]
    assert decide(watch, situation(102.0, desired, capacity=0), RULES) == []
    assert decide(watch, situation(102.0, desired, busy=[0]), RULES) == []
    other = watching("b", 100.0, {}, desired)
    assert decide(other, situation(110.0, desired), RULES) == []
    assert decide(other, situation(118.0, desired), RULES) == [ClaimFree(0, 1)]


def test_a_flapping_directory_restarts_the_wait() -> None:
    watch = watching("a", 100.0, {0: claimed("b", 3, 9, 200.0)}, [["a"]])
    watch.observe(101.5, {}, [["b"]])
    watch.observe(101.8, {}, [["a"]])
    assert decide(watch, situation(103.0, [["a"]]), RULES) == []
    assert decide(watch, situation(103.8, [["a"]]), RULES) == [RequestHandover(0, "b", 5)]


def test_a_clock_that_is_set_back_does_not_make_it_wait_for_the_old_time() -> None:
    watch = watching("a", 700.0, {0: claimed("b", 3, 9, 800.0)}, [["a"]])
    watch.observe(100.0, {}, [["a", "b"]])
    assert decide(watch, situation(101.9, [["a", "b"]]), RULES) == []
    assert decide(watch, situation(102.0, [["a", "b"]]), RULES) == [RequestHandover(0, "b", 5)]


def test_a_leaving_owner_is_relieved_at_once() -> None:
    watch = watching("a", 100.0, {0: claimed("b", 3, 9, 200.0)}, [["a"]])
    assert decide(watch, situation(100.0, [["a"]], live=["a"], leaving=["b"]), RULES) == [RequestHandover(0, "b", 5)]
    assert decide(watch, situation(100.0, [["a"]], live=["a"]), RULES) == []  # gone: the lease must run out


def test_the_deposed_owner_yields() -> None:
    desired = [["a"]] * 3
    claims = {0: claimed("b", 5, 0, 1.0), 1: claimed("b", 3, 0, 200.0), 2: claimed("A", 3, 0, 200.0)}
    watch = watching("a", 100.0, claims, desired)
    held = {0: 3, 1: 3, 2: 3}
    assert decide(watch, situation(100.0, desired, held=held), RULES) == [Yield(0, "b", 5), Yield(2, "A", 3)]


def test_who_was_cut_off_goes_on_above_a_restart_unless_it_leaves() -> None:
    desired = [["a"]]
    watch = watching("a", 100.0, {0: claimed("b", 4, 0, 200.0)}, desired)
    cut_off = situation(100.0, desired, held={0: 3})
    [back] = decide(watch, cut_off, RULES)
    assert back == Reclaim(0, "b", 6)
    restarter = watching("b", 100.0, {0: claimed("a", back.epoch, 0, 200.0)}, desired)
    assert decide(restarter, situation(100.0, desired, held={0: 4}), RULES) == [Yield(0, "a", 6)]
    assert decide(watch, replace(cut_off, capacity=0), RULES) == [Yield(0, "b", 4)]
    last = watching("a", 100.0, {0: claimed("b", MAX_EPOCH, 0, 200.0)}, desired)
    assert decide(last, situation(100.0, desired, held={0: MAX_EPOCH - 1}), RULES) == [Yield(0, "b", MAX_EPOCH)]


def test_orphans_go_to_copies_in_order_and_are_lost_only_then() -> None:
    desired = [["c", "a", "b"]]
    claim = claimed("dead", 5, 40, 100.0)

    def first(me: str, copies: dict[int, Copy]) -> tuple[float, TakeOver]:
        watch = watching(me, 90.0, {0: claim}, desired)
        for now in range(90, 300):
            actions = decide(watch, situation(float(now), desired, copies=copies), RULES)
            for action in actions:
                if isinstance(action, TakeOver):
                    return float(now), action
        raise AssertionError("never")

    copy = Copy(5, 40)
    assert first("c", {0: copy}) == (100.0, TakeOver(0, 7, copy, ("a", "b")))
    assert first("a", {0: copy}) == (108.0, TakeOver(0, 7, copy, ("c", "b")))
    assert first("b", {0: copy})[0] == 116.0
    assert first("b", {0: Copy(4, 90)})[0] == 124.0  # from before the last change of owner
    assert first("z", {0: copy})[0] == 124.0  # not listed any more
    at, takeover = first("c", {})
    assert at == 132.0
    assert takeover.lost
    assert first("a", {})[0] == 140.0


def test_on_two_sides_of_a_split_a_copy_beats_a_restart() -> None:
    """Whoever was cut off from all copies restarts the slot; when both sides meet, what was learned must win."""
    claims = {0: claimed("owner", 5, 40, 100.0)}
    for heir, alone in (("a", "z"), ("z", "a")):
        taken = []
        for me, copies in ((heir, {0: Copy(5, 40)}), (alone, {})):
            watch = watching(me, 90.0, claims, [[me]])
            [action] = decide(watch, situation(1000.0, [[me]], copies=copies), RULES)
            assert isinstance(action, TakeOver)
            taken.append(claimed(me, action.epoch, 0, 2000.0))
        assert wins(*taken)


def test_a_restarted_owner_takes_its_own_slot_back_at_once() -> None:
    watch = watching("a", 100.0, {0: claimed("a", 5, 40, 110.0)}, [["a"]])
    assert decide(watch, situation(100.0, [["a"]]), RULES) == []
    copy = Copy(5, 38)
    assert decide(watch, situation(100.0, [["a"]], copies={0: copy}), RULES) == [TakeOver(0, 7, copy, (), outdone=True)]


def test_a_restarted_standby_takes_over_from_its_copy_if_no_owner_shows_up() -> None:
    watch, copy, desired = Watch("a"), Copy(3, 50), [["a", "b"]]
    watch.remember(100.0, {0: copy}, RULES)
    watch.observe(100.0, {}, desired)
    end = 100.0 + RULES.lease
    assert decide(watch, situation(end - 1, desired, copies={0: copy}), RULES) == []
    [taken] = decide(watch, situation(end, desired, copies={0: copy}), RULES)
    assert isinstance(taken, TakeOver)
    assert (taken.epoch, taken.copy) == (5, copy)

    watch.observe(end - 2, {0: claimed("b", 3, 100, end + 9)}, desired)
    [asked] = decide(watch, situation(end, desired, copies={0: copy}), RULES)
    assert isinstance(asked, RequestHandover)


@pytest.mark.parametrize("epoch", [5, 6])  # of whoever had never heard of it, or had but found no copy
def test_an_owner_that_was_down_goes_on_above_a_restart_that_is_not_as_far(epoch: int) -> None:
    desired = [["b", "z"]]
    back = watching("z", 100.0, {0: claimed("b", epoch, 30, 200.0)}, desired)
    mine = Copy(5, 40, mine=True)
    now = situation(100.0, desired, copies={0: mine})
    assert decide(back, now, RULES) == [TakeOver(0, epoch + 2, mine, ())]
    follow = [] if epoch == 5 else [KeepStandby(0, "b", 6, 30)]
    assert decide(back, replace(now, copies={0: Copy(5, 40)}), RULES) == follow  # a standby's: its owner goes on
    assert decide(back, replace(now, capacity=0), RULES) == follow
    further = watching("z", 100.0, {0: claimed("b", epoch, 40, 200.0)}, desired)
    assert not any(isinstance(action, TakeOver) for action in decide(further, now, RULES))
    from_a_copy = watching("z", 100.0, {0: claimed("b", 7, 30, 200.0)}, desired)
    assert decide(from_a_copy, now, RULES) == [KeepStandby(0, "b", 7, 30)]


@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("epoch", [1, 3, 5])  # of whoever went on from an older state, or from none
def test_what_went_on_without_this_peer_is_followed_once_it_is_further(mine: bool, epoch: int) -> None:
    """Whatever its epoch: all peers had stopped, and those who came back first did not know of the last changes."""
    desired, copy = [["c", "b"]], Copy(5, 40, mine=mine)

    def back(version: int) -> tuple[Watch, Situation]:
        watch = Watch("b")
        watch.remember(100.0, {0: copy}, RULES)
        watch.recall(101.0, {0: copy.epoch})
        watch.observe(101.0, {0: claimed("c", epoch, version, 999.0)}, desired)
        return watch, situation(200.0, desired, copies={0: copy})

    assert decide(*back(41), RULES) == [KeepStandby(0, "c", epoch, 41)]
    not_as_far = decide(*back(39), RULES)
    if (mine, epoch) == (False, 5):
        assert not_as_far == []  # that is the very owner
    else:
        assert not_as_far == [TakeOver(0, 7, copy, ("c",))]


@pytest.mark.parametrize(("announced", "outdone"), [(90, True), (40, False), (30, False)])
def test_who_comes_back_in_time_asks_whether_a_standby_has_more_than_its_checkpoint(
    announced: int, outdone: bool
) -> None:
    desired, mine = [["b", "c"]], Copy(5, 40, mine=True)
    watch = Watch("b")
    watch.remember(100.0, {0: mine}, RULES)
    watch.observe(100.0, {0: claimed("b", 5, announced, 110.0)}, desired)  # its own, from before
    taken = decide(watch, situation(101.0, desired, copies={0: mine}), RULES)
    assert taken == [TakeOver(0, 7, mine, ("c",), outdone)]


def test_who_has_given_way_once_is_an_owner_as_any_other_afterwards() -> None:
    watch, desired = Watch("b"), [["b", "c"]]
    watch.remember(100.0, {0: Copy(5, 40, mine=True)}, RULES)
    theirs = {0: claimed("c", 3, 50, 999.0)}
    watch.observe(101.0, theirs, desired)
    assert watch.claims == theirs
    mine = {0: claimed("b", 5, 50, 999.0)}  # handed over: the epoch is the one on disk again
    watch.observe(102.0, mine, desired)
    watch.observe(103.0, theirs, desired)
    assert watch.claims == mine


def test_standbys_follow_and_forget() -> None:
    claim = claimed("a", 2, 50, 1e9)
    watch = watching("b", 100.0, {0: claim}, [["a", "b"]])
    assert decide(watch, situation(100.0, [["a", "b"]]), RULES) == [KeepStandby(0, "a", 2, 50)]
    assert decide(watch, situation(100.0, [["a", "b"]], copies={0: Copy(2, 50)}), RULES) == []
    assert decide(watch, situation(100.0, [["a", "b"]], copies={0: Copy(1, 90)}), RULES) == [KeepStandby(0, "a", 2, 50)]
    watch.observe(100.0, {}, [["a", "c"]])
    held = {0: Copy(2, 50)}
    assert decide(watch, situation(140.0, [["a", "c"]], copies=held), RULES) == []
    assert decide(watch, situation(148.0, [["a", "c"]], copies=held), RULES) == [DropStandby(0)]


def test_room_goes_to_orphans_first() -> None:
    desired = [["a"]] * 3
    claims = {0: claimed("b", 1, 0, 1e9), 1: claimed("dead", 1, 0, 50.0)}
    watch = watching("a", 50.0, claims, desired)
    actions = decide(watch, situation(200.0, desired, capacity=2), RULES)
    assert [type(a) for a in actions] == [TakeOver, ClaimFree]


def test_handover_is_granted_to_the_desired_owner_only() -> None:
    watch = watching("b", 100.0, {}, [["a"]])
    now = situation(100.0, [["a"], ["b"]], held={0: 3, 1: 7})
    assert grants_handover(watch, now, 0, "a", 5)
    assert not grants_handover(watch, now, 0, "c", 5)
    assert not grants_handover(watch, now, 0, "a", 6)
    assert not grants_handover(watch, now, 1, "a", 9)
    assert not grants_handover(watch, now, 1, "b", 9)
