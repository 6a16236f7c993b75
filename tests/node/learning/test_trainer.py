"""The training thread: work between steps, in order, and an end that leaves nobody waiting."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import pytest
from shoal.node.learning.composer import Composer, StepReport
from shoal.node.learning.trainer import NICENESS, Trainer
from tiny import composer_of, manifest_of

SECONDS = 30.0


class Running:
    """A trainer on a thread of its own."""

    def __init__(self, steps: int = 1000, at_step: Any = None) -> None:
        self.composer = composer_of(manifest_of(train={"steps": steps}), owned=[0])
        self.reports: list[StepReport] = []
        self.stepped = threading.Condition()
        self.at_step = at_step
        self.error: BaseException | None = None
        self.trainer = Trainer(self.composer, self._on_step)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.trainer.run()
        except RuntimeError as error:
            self.error = error

    def _on_step(self, composer: Composer, report: StepReport) -> None:
        if self.at_step is not None:
            self.at_step(composer)
        with self.stepped:
            self.reports.append(report)
            self.stepped.notify_all()

    def wait_for_steps(self, steps: int) -> None:
        with self.stepped:
            assert self.stepped.wait_for(lambda: len(self.reports) >= steps, SECONDS)


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    it = Running(**options)
    try:
        yield it
    finally:
        it.trainer.stop()
        it.thread.join(SECONDS)
        assert not it.thread.is_alive()


def test_work_runs_in_order_on_the_training_thread() -> None:
    with running() as it:
        it.trainer.start_training()
        ran: list[tuple[int, int]] = []
        thread = it.thread.ident
        futures = [
            it.trainer.ask(lambda composer, i=i: (ran.append((i, composer.step)), threading.get_ident())[1])
            for i in range(50)
        ]
        assert {future.result(SECONDS) for future in futures} == {thread}
        assert [i for i, _ in ran] == list(range(50))
        assert [step for _, step in ran] == sorted(step for _, step in ran)


def test_it_serves_but_does_not_train_before_it_may_nor_after_the_last_step() -> None:
    with running(steps=3) as it:
        assert it.trainer.ask(lambda composer: composer.step).result(SECONDS) == 0
        assert not it.reports
        it.trainer.start_training()
        it.wait_for_steps(3)
        assert it.trainer.ask(lambda composer: composer.step).result(SECONDS) == 3
        assert it.trainer.ask(lambda composer: composer.step).result(SECONDS) == 3
        assert len(it.reports) == 3


def test_a_pause_ends_steps_but_not_service() -> None:
    with running() as it:
        it.trainer.start_training()
        it.wait_for_steps(2)
        it.trainer.pause_training()
        at = it.trainer.ask(lambda composer: composer.step).result(SECONDS)
        # The flag may have been read just before the pause: one more step at most.
        assert it.trainer.ask(lambda composer: composer.step).result(SECONDS) <= at + 1


def test_errors_travel_to_who_asked_and_training_goes_on() -> None:
    def fails(_: Composer) -> None:
        raise LookupError("mine")

    with running() as it:
        it.trainer.start_training()
        with pytest.raises(LookupError, match="mine"):
            it.trainer.ask(fails).result(SECONDS)
        it.wait_for_steps(len(it.reports) + 1)


def test_stop_while_idle_and_ask_afterwards() -> None:
    with running() as it:
        pass
    late = it.trainer.ask(lambda composer: composer.step)
    assert late.cancelled()
    with pytest.raises(CancelledError):
        late.result(SECONDS)


def test_what_waits_at_the_end_is_cancelled_not_forgotten() -> None:
    entered, leave = threading.Event(), threading.Event()
    waiting: list[Future[int]] = []

    def holds(_: Composer) -> None:
        entered.set()
        assert leave.wait(SECONDS)

    with running(at_step=holds) as it:
        it.trainer.start_training()
        assert entered.wait(SECONDS)
        waiting = [it.trainer.ask(lambda composer: composer.step) for _ in range(5)]
        it.trainer.stop()
        leave.set()
    assert all(future.done() for future in waiting)
    assert all(future.cancelled() for future in waiting)


def test_a_failing_step_ends_the_loop_and_cancels_the_rest() -> None:
    waiting: list[Future[int]] = []

    def fails(_: Composer) -> None:
        waiting.append(it.trainer.ask(lambda composer: composer.step))
        raise RuntimeError("the disk is gone")

    with running(at_step=fails) as it:
        it.trainer.start_training()
        it.thread.join(SECONDS)
        assert str(it.error) == "the disk is gone"
        assert waiting[0].cancelled()
        assert it.trainer.ask(lambda composer: composer.step).cancelled()


def test_work_may_ask_for_more_work() -> None:
    with running() as it:
        inner = it.trainer.ask(lambda _: it.trainer.ask(lambda composer: composer.step)).result(SECONDS)
        assert inner.result(SECONDS) == 0


def test_steps_are_taken_though_work_comes_faster_than_it_is_done() -> None:
    """An owner that was sent sketches faster than it could hear them took no step at all."""
    asking = threading.Event()
    asking.set()
    with running() as it:

        def again(composer: Composer) -> None:
            if asking.is_set():
                it.trainer.ask(again)

        it.trainer.ask(again)
        it.trainer.start_training()
        try:
            it.wait_for_steps(3)
        finally:
            asking.clear()


def test_the_training_thread_yields_to_the_peers_other_threads_and_to_nobody_less_than_before() -> None:
    def niceness(thread: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, thread)

    mine = niceness(threading.get_native_id())
    with running() as it:
        theirs = it.trainer.ask(lambda _: niceness(threading.get_native_id())).result(SECONDS)
    assert theirs == max(mine, NICENESS)
    assert niceness(threading.get_native_id()) == mine
