"""Clocks: whose is off, as signed times and the machine's own monotonic clock tell."""

import pytest
from shoal.protocol.directory.clocks import _MAX_PEERS, Clocks


class Machine:
    """A machine whose wall clock can be set."""

    def __init__(self) -> None:
        self.true, self.ahead = 5000.0, 0.0
        self.clocks = Clocks(lambda: self.true + self.ahead, lambda: self.true)

    def hear(self, seconds: float, **ahead: float) -> None:
        """Every second for `seconds`, from peers with clocks `ahead` by so much."""
        for _ in range(int(seconds)):
            self.true += 1
            self.clocks.ahead()  # a peer looks every second
            for peer, by in ahead.items():
                self.clocks.heard(peer, self.true + by)


def test_a_clock_that_jumps_is_not_right_until_it_has_settled() -> None:
    machine = Machine()
    machine.hear(30, a=0.0, b=0.0)
    assert machine.clocks.right(20.0)
    machine.ahead = 600.0
    assert not machine.clocks.right(20.0)  # before anybody was heard
    assert machine.clocks.offset() is None
    machine.hear(30, a=0.0, b=0.0, c=0.0)
    assert machine.clocks.offset() == -600.0
    assert not machine.clocks.right(20.0)
    machine.ahead = 0.0
    machine.hear(20, a=0.0, b=0.0, c=0.0)  # in the first of these seconds it is seen
    assert not machine.clocks.right(20.0)
    machine.hear(1, a=0.0, b=0.0, c=0.0)
    assert machine.clocks.right(20.0)


def test_a_short_lease_is_judged_by_no_clock_of_which_nothing_is_known() -> None:
    machine = Machine()
    machine.hear(30, a=0.0, b=0.0)
    assert machine.clocks.right(4.0)
    machine.ahead = 600.0
    for _ in range(30):
        machine.hear(1, a=0.0, b=0.0)
        assert not machine.clocks.right(4.0)


def test_who_was_heard_first_is_not_taken_for_all() -> None:
    machine = Machine()
    machine.hear(1, a=600.0)
    for _ in range(20):
        machine.hear(1, a=600.0, b=0.0)
        assert machine.clocks.offset() in (None, 0.0)
    assert machine.clocks.offset() == 0.0


def test_a_clock_that_drifts_is_found_out_by_others() -> None:
    machine = Machine()
    for _ in range(100):
        machine.ahead -= 0.1
        machine.hear(1, a=0.0, b=0.0, c=0.0)
    machine.hear(61, a=0.0, b=0.0, c=0.0)  # what came while it was less is forgotten
    assert machine.clocks.offset() == pytest.approx(10.0)
    assert not machine.clocks.right(20.0)


@pytest.mark.parametrize(
    ("others", "offset"),
    [
        ({"a": 600.0, "b": 0.0}, 0.0),  # of three clocks one is off, and it is not ours
        ({"a": 600.0, "b": 600.0}, 600.0),  # ours
        ({"a": 600.0}, 600.0),  # of two nobody can tell
        ({"a": 600.0, "b": 0.0, "c": 0.0}, 0.0),
    ],
)
def test_the_majority_is_right(others: dict[str, float], offset: float) -> None:
    machine = Machine()
    machine.hear(30, **others)
    assert machine.clocks.offset() == offset
    assert machine.clocks.ahead() == others


def test_old_records_sent_again_make_no_clock_slow() -> None:
    machine = Machine()
    machine.hear(30, a=0.0)
    for _ in range(100):
        machine.clocks.heard("a", machine.true - 500)
    assert machine.clocks.ahead() == {"a": 0.0}
    machine.hear(1, a=0.0)
    machine.hear(100)
    assert machine.clocks.ahead() == {"a": 0.0}


def test_what_waited_for_a_peer_to_wake_makes_no_clock_slow() -> None:
    """Stopped and continued, as a paused container is: the wall clock and the monotonic one have both gone on."""
    machine = Machine()
    machine.hear(30, a=0.0, b=0.0)
    machine.true += 360
    for waited in range(360, 0, -4):
        for peer in "ab":
            machine.clocks.heard(peer, machine.true - waited)
        assert machine.clocks.offset() is None
        assert not machine.clocks.right(20.0)  # nobody's lease has been renewed since, as far as is known here
    machine.hear(10, a=0.0, b=0.0)
    assert machine.clocks.offset() == 0.0
    assert not machine.clocks.right(20.0)
    machine.hear(10, a=0.0, b=0.0)
    assert machine.clocks.right(20.0)


def test_what_a_peer_says_that_wakes_makes_its_clock_no_slow_one() -> None:
    machine = Machine()
    machine.hear(200, a=0.0)
    machine.clocks.heard("asleep", machine.true - 180)
    assert machine.clocks.ahead() == {"a": 0.0}
    machine.hear(6, a=0.0, asleep=0.0)
    assert machine.clocks.ahead() == {"a": 0.0, "asleep": 0.0}


def test_who_is_silent_is_forgotten_and_invented_peers_take_no_room() -> None:
    machine = Machine()
    for _ in range(2):
        for number in range(_MAX_PEERS + 5):
            machine.clocks.heard(f"peer-{number}", machine.true + 600)
        machine.true += 6
    assert len(machine.clocks.ahead()) == _MAX_PEERS
    assert not machine.clocks.right(20.0)
    machine.hear(151)
    assert not machine.clocks.ahead()
    machine.hear(6, honest=0.0)
    assert machine.clocks.ahead() == {"honest": 0.0}
    assert machine.clocks.right(20.0)
