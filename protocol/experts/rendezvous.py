"""Who should own which slot: a pure function of who is there, so that nobody coordinates.

Weighted rendezvous hashing with bounded load. Every (slot, peer) pair draws u in (0, 1) by hash and
scores -w / ln(u), where w is the peer's capacity (at most the number of slots, so that a giant is not a hub). Pairs are
taken from the highest score down; a peer is full at its *bound*: a quarter above its fair share (slots * w / sum of w),
rounded down, but at least the fair share rounded up, and never above its capacity. Few slots split evenly that way
(16 over three peers: 6 at most), and a joiner moves 1.2 to 1.5 times its own share on average (more where shares are
of one or two slots and everybody's bound steps down at once). If all capacities together are too small, every peer is
filled to its capacity and the slots of lowest score have no owner. Standbys are drawn in the same way among the peers
a slot does not have yet.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from heapq import merge

SLACK = 1.25  # of the fair share, see above


def desired_owners(num_slots: int, capacities: Mapping[str, int], replication: int) -> list[list[str]]:
    """Per slot the peers that should hold it: the owner, then `replication - 1` standbys, fewer if there are not
    enough peers.

    Args:
        num_slots: slots of the run.
        capacities: slots each live peer can own, by peer id; 0 for peers that own nothing or are leaving.
        replication: copies of a slot, at least 1.
    """
    weights = {peer: min(capacity, num_slots) for peer, capacity in capacities.items() if capacity > 0}
    lists: list[list[str]] = [[] for _ in range(num_slots)]
    if not num_slots or not weights:
        return lists
    total = sum(weights.values())
    ranked = _Ranking(weights, num_slots)
    fair = {peer: num_slots * weight / total for peer, weight in weights.items()}
    bounds = {peer: max(math.ceil(share), int(share * SLACK)) for peer, share in fair.items()}
    scarce = total <= num_slots
    hard = {peer: weight if scarce else min(weight, bounds[peer]) for peer, weight in weights.items()}
    _match(lists, ranked, 1, hard)
    for copies in range(2, min(replication, len(weights)) + 1):
        _match(lists, ranked, copies, bounds)
        _match(lists, ranked, copies, dict.fromkeys(weights, num_slots))  # bounds are soft: better crowded than alone
    return lists


def _match(
    lists: list[list[str]], ranked: Iterable[tuple[float, str, int]], copies: int, bounds: Mapping[str, int]
) -> None:
    """Adds the best peer with room to every owned slot with fewer than `copies` peers."""
    load = dict.fromkeys(bounds, 0)
    wanting = sum(len(peers) == copies - 1 for peers in lists)
    if not wanting:
        return
    for _, peer, slot in ranked:
        if len(lists[slot]) == copies - 1 and load[peer] < bounds[peer] and peer not in lists[slot]:
            lists[slot].append(peer)
            load[peer] += 1
            wanting -= 1
            if not wanting:
                return


class _Ranking:
    """(1 / score, peer, slot) from the highest score down, as far as somebody reads.

    With many peers every slot is taken long before the end; `read` has what was looked at.
    """

    def __init__(self, weights: Mapping[str, int], num_slots: int) -> None:
        self.read: list[tuple[float, str, int]] = []
        self._rest = merge(*(_descending(peer, weight, num_slots) for peer, weight in weights.items()))

    def __iter__(self) -> Iterator[tuple[float, str, int]]:
        yield from self.read
        for pair in self._rest:
            self.read.append(pair)
            yield pair


def _descending(peer: str, weight: int, num_slots: int) -> Iterator[tuple[float, str, int]]:
    draws = draws_of(peer, num_slots)
    for slot in _ordered(peer, num_slots):
        yield -math.log(draws[slot]) / weight, peer, slot


@lru_cache(maxsize=4096)
def draws_of(peer: str, num_slots: int) -> array[float]:
    """u in (0, 1) per slot. One hash yields eight draws; a slot's draw does not depend on `num_slots`."""
    draws: array[float] = array("d")
    for block in range(-(-num_slots // 8)):
        digest = hashlib.blake2b(block.to_bytes(8) + peer.encode(), digest_size=64, person=b"shoal-owner").digest()
        # 53 bits: more would round to 1.0, whose logarithm is 0
        draws.extend(((int.from_bytes(digest[i : i + 8]) >> 11) + 0.5) / 2**53 for i in range(0, 64, 8))
    return draws[:num_slots]


@lru_cache(maxsize=4096)
def _ordered(peer: str, num_slots: int) -> array[int]:
    """All slots, the largest draw first."""
    draws = draws_of(peer, num_slots)
    return array("L", sorted(range(num_slots), key=lambda slot: (-draws[slot], slot)))
