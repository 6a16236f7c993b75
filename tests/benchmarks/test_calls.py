"""The bench of calls measures what there is: two real hosts, whose processes it finds."""

import asyncio

from shoal.benchmarks.calls import markdown, run


def test_it_has_a_row_for_each_size_and_finds_both_hosts_busy() -> None:
    costs = asyncio.run(run([1_000, 20_000_000], 0.5))
    assert [cost.nbytes for cost in costs] == [1_000, 20_000_000]
    assert all(cost.latency > 0 and cost.own > 0 for cost in costs)
    assert costs[1].hosts > 0  # other processes' time comes in hundredths of a second: a small call may take none
    assert len(markdown(costs).splitlines()) == 4
