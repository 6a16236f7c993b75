"""The bench of calls measures what there is: two real hosts, whose processes it finds."""

import asyncio

from shoal.benchmarks.calls import markdown, run


def test_it_has_a_row_for_each_size_and_finds_both_hosts_busy() -> None:
    costs = asyncio.run(run([1_000, 100_000], 0.5))
    assert [cost.nbytes for cost in costs] == [1_000, 100_000]
    assert all(cost.latency > 0 and cost.hosts > 0 and cost.own > 0 for cost in costs)
    assert len(markdown(costs).splitlines()) == 4
