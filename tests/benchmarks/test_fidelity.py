"""Publishers that watch a training run are shown what its experts see."""

from __future__ import annotations

from collections import Counter

from shoal.benchmarks.fidelity import SLOTS, STUDIES, Setting, lone_composer, train, watch


def test_every_setting_sees_the_rows_that_are_routed_to_its_experts() -> None:
    composer = lone_composer("adamw", 0)
    study = STUDIES["stand-ins"]
    settings = {"copy": Setting(2), "narrow": Setting(2, kind="narrow", refit_steps=2)}
    watches = {name: watch(composer, setting, study.ages) for name, setting in settings.items()}
    composer.watches = list(watches.values())
    routed: Counter[tuple[int, int]] = Counter()
    for _ in range(2):
        train(composer, 1, study.cycle)
        assert composer.last_counts is not None
        routed.update(
            {(layer, slot): int(row[slot]) for layer, row in enumerate(composer.last_counts) for slot in SLOTS}
        )
    for each in watches.values():
        for place, publisher in each.publishers.items():
            assert publisher.replay.offered == routed[place]
            rows_ND, _ = publisher.replay.all_rows()
            assert len(rows_ND) == min(routed[place], publisher.replay.capacity)
