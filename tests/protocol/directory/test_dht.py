"""Starting and ending DHT processes: clear errors, no orphans, however they die."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hivemind.utils import MPFuture
from shoal.protocol.addresses import Address, Reach, farthest_first
from shoal.protocol.directory.dht import RunDHT, refusals, require_alive, start_dht, visible_addresses
from shoal.protocol.errors import ClockOff, DirectoryError, IdentityError
from shoal.protocol.identity import Identity

RUN = "demo-0123456789ab"
STRANGER = Identity.generate().peer_id


@contextmanager
def running(path: Path, **options: Any) -> Iterator[RunDHT]:
    dht = start_dht(
        path, **({"initial_peers": [], "host": "127.0.0.1", "port": 0, "announce": [], "run_id": RUN} | options)
    )
    try:
        yield dht
    finally:
        dht.shutdown()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(0.01)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def daemon_of(dht: RunDHT) -> psutil.Process:
    [daemon] = psutil.Process(dht.pid).children()
    return daemon


def socket_of(dht: RunDHT) -> Path:
    """Where its daemon listens for it."""
    [path] = [Path(word.partition("/unix")[2]) for word in daemon_of(dht).cmdline() if "shoal-p2pd-" in word]
    assert path.is_socket()
    return path


@pytest.mark.parametrize(("ahead", "said"), [(609.0, r"60\d s ahead of"), (-10800.0, r"108\d\d s behind")])
def test_who_joins_by_a_wrong_clock_is_told_which_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, said: str
) -> None:
    with running(tmp_path / "a") as first:
        monkeypatch.setattr(
            "hivemind.dht.protocol.get_dht_time", lambda: time.time() + ahead
        )  # its process inherits it
        with pytest.raises(ClockOff, match=said), running(tmp_path / "b", initial_peers=visible_addresses(first)):
            pass


def test_three_nodes_find_each_other_and_leave_nothing_behind(tmp_path: Path) -> None:
    with running(tmp_path / "a") as first:
        known = visible_addresses(first)
        assert known[0].endswith(f"/p2p/{Identity.load(tmp_path / 'a').peer_id}")
        assert str(first.peer_id) == Identity.load(tmp_path / "a").peer_id
        with (
            running(tmp_path / "b", initial_peers=known) as second,
            running(tmp_path / "c", initial_peers=visible_addresses(second)) as third,
        ):
            until = time.time() + 60
            assert first.store("averager.0b0", 1.5, until, subkey=b"x")
            found = third.get("averager.0b0", latest=True)
            assert found is not None
            assert found.value[b"x"].value == 1.5
            assert refusals(second) == Counter()
            processes = [psutil.Process(dht.pid) for dht in (first, second, third)]
            processes += [daemon_of(dht) for dht in (first, second, third)]
    assert len(processes) == 6
    assert all(gone(process) for process in processes)


def test_requests_over_16_kilobytes_do_not_end_the_process(tmp_path: Path) -> None:
    """hivemind's own pipe breaks there: it reads a message's header, and not its body, which is still being written."""
    with running(tmp_path / "a") as dht:
        started = time.monotonic()
        for size in (15_000, 17_000, 70_000, 200_000):
            for number in range(10):
                # Refused for its size by the node's own rules, which is an answer.
                stored = dht.store(f"key{number}", bytes(size), time.time() + 30, return_future=True).result(10)
                assert stored is False
        assert time.monotonic() - started < 30
        assert refusals(dht) == {"oversized": 40}


def test_announced_addresses_are_what_others_see(tmp_path: Path) -> None:
    with running(tmp_path / "a", announce=["/dns4/example.org/tcp/4001", "/ip4/8.8.8.8/tcp/4001"]) as dht:
        peer_id = Identity.load(tmp_path / "a").peer_id
        assert sorted(visible_addresses(dht)) == [
            f"/dns4/example.org/tcp/4001/p2p/{peer_id}",
            f"/ip4/8.8.8.8/tcp/4001/p2p/{peer_id}",
        ]


def test_unreachable_bootstrap_names_the_address_the_cause_and_the_fix(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # bound, not listening: refused
        started = time.monotonic()
        with (
            pytest.raises(DirectoryError) as caught,
            running(
                tmp_path / "a",
                initial_peers=[
                    f"/ip4/127.0.0.1/tcp/{port}/p2p/{STRANGER}",
                    f"/dns4/nowhere.invalid/tcp/1/p2p/{STRANGER}",
                ],
                deadline_seconds=1.0,
            ),
        ):
            pass
    assert f"127.0.0.1 port {port}: {os.strerror(errno.ECONNREFUSED)}" in caught.value.cause
    assert "nowhere.invalid port 1: " in caught.value.cause
    assert "TCP port is open" in caught.value.fix
    assert time.monotonic() - started < 15


def test_a_bootstrap_peer_that_comes_late_is_found(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    late = Identity.load_or_create(tmp_path / "late")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from shoal.protocol.directory.dht import start_dht\n"
        f"dht = start_dht(Path(sys.argv[1]), initial_peers=[], host='127.0.0.1', port={port}, announce=[],"
        f" run_id={RUN!r})\n"
        "sys.stdin.read()\n"
        "dht.shutdown()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "late")], stdin=subprocess.PIPE)
    try:
        with running(tmp_path / "a", initial_peers=[f"/ip4/127.0.0.1/tcp/{port}/p2p/{late.peer_id}"]) as dht:
            assert dht.store("averager.0b0", 1, time.time() + 30, exclude_self=True)
    finally:
        child.communicate(timeout=20)
    assert child.returncode == 0


def test_a_stranger_at_the_bootstrap_address(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        address = visible_addresses(dht)[0].rpartition("/")[0] + f"/{STRANGER}"
        with (
            pytest.raises(DirectoryError, match="no peer with the expected identity") as caught,
            running(tmp_path / "b", initial_peers=[address], deadline_seconds=0),
        ):
            pass
        assert address in caught.value.cause
        assert caught.value.fix


def test_own_address_among_the_bootstrap_peers_is_skipped(tmp_path: Path) -> None:
    own = Identity.load_or_create(tmp_path / "a").peer_id
    with running(tmp_path / "a", initial_peers=[f"/ip4/127.0.0.1/tcp/1/p2p/{own}"]) as dht:
        require_alive(dht)


def test_port_in_use(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        port = Address.parse(visible_addresses(dht)[0]).port
        with (
            pytest.raises(DirectoryError, match=f"port {port}: Address already in use") as caught,
            running(tmp_path / "b", port=port),
        ):
            pass
        assert "another DHT port" in caught.value.fix


def test_an_address_that_this_machine_lacks(tmp_path: Path) -> None:
    with (
        pytest.raises(DirectoryError, match="Cannot assign requested address") as caught,
        running(tmp_path / "a", host="192.0.2.77"),
    ):
        pass
    assert caught.value.fix == "listen at an address that this machine has"


def test_one_identity_serves_one_process(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        path = socket_of(dht)
        with pytest.raises(DirectoryError, match="in use by another node") as caught, running(tmp_path / "a"):
            pass
        assert str(tmp_path / "a") in caught.value.cause
        require_alive(dht)
    with running(tmp_path / "a"):  # free again
        pass
    assert not path.exists()


def test_an_open_identity_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path / "a")
    (tmp_path / "a").chmod(0o644)
    with pytest.raises(IdentityError), running(tmp_path / "a"):
        pass


def test_it_must_start_on_the_main_thread(tmp_path: Path) -> None:
    caught: list[RuntimeError] = []

    def start() -> None:
        try:
            with running(tmp_path / "a"):
                pass
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(20)
    assert "main thread" in str(caught[0])


def test_the_daemon_is_out_of_the_terminals_reach(tmp_path: Path) -> None:
    """Ctrl-C signals the whole process group: neither child may end before the node has handed over."""
    with running(tmp_path / "a") as dht:
        daemon = daemon_of(dht)
        assert os.getpgid(daemon.pid) != os.getpgid(0)
        assert dht.pid is not None
        os.kill(dht.pid, signal.SIGINT)
        assert refusals(dht) == Counter()
        assert not gone(daemon)


def test_the_daemon_dies_with_a_killed_dht_process(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        daemon = daemon_of(dht)
        assert dht.pid is not None
        os.kill(dht.pid, signal.SIGKILL)
        wait_until(lambda: gone(daemon))
        dht.join(10)
        with pytest.raises(DirectoryError, match="has ended"):
            visible_addresses(dht)
    with running(tmp_path / "a"):  # the identity's lock went with it
        pass


def test_a_lock_that_a_killed_process_held_does_not_block_the_next_start(tmp_path: Path) -> None:
    def hold() -> None:
        MPFuture._update_lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    process.join(10)
    with running(tmp_path / "a") as dht:
        assert refusals(dht) == Counter()


def test_the_dht_process_ends_with_its_daemon_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        daemon_of(dht).kill()
        dht.join(10)
        with pytest.raises(DirectoryError, match="after its p2p daemon died"):
            require_alive(dht)


def test_nothing_survives_a_killed_node(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from shoal.protocol.directory.dht import start_dht\n"
        "dht = start_dht(Path(sys.argv[1]), initial_peers=[], host='127.0.0.1', port=0, announce=[],"
        f" run_id={RUN!r})\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    node = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert node.stdout is not None
        assert node.stdout.readline() == "up\n"
        descendants = psutil.Process(node.pid).children(recursive=True)
        assert any(process.name() == "p2pd" for process in descendants)
        node.kill()
        node.wait(10)
        wait_until(lambda: all(gone(process) for process in descendants))
    finally:
        node.kill()
        node.communicate()


def test_the_dht_process_cleans_up_when_terminated(tmp_path: Path) -> None:
    with running(tmp_path / "a") as dht:
        daemon, path = daemon_of(dht), socket_of(dht)
        dht.terminate()
        dht.join(10)
        wait_until(lambda: gone(daemon))
        assert not path.exists()


async def searches_kept(_dht: RunDHT, node: Any) -> int:
    return len(node.pending_get_requests)


def test_of_searches_that_are_over_no_note_is_kept(tmp_path: Path) -> None:
    """Every round of averagers searches for a key of its own, for weeks."""
    with running(tmp_path / "a") as dht:
        for number in range(20):
            assert dht.get(f"averager.0b{number:b}", latest=True) is None
        assert dht.run_coroutine(searches_kept) == 0


def test_addresses() -> None:
    for good in ("/ip4/1.2.3.4/tcp/5", f"/ip6/::1/tcp/5/p2p/{STRANGER}", f"/dns4/example.org/tcp/1/p2p/{STRANGER}"):
        assert str(Address.parse(good)) == good
    for bad in (
        "",
        "ip4/1.2.3.4/tcp/5",
        "/ip4/1.2.3.4/udp/5",
        "/ip4/1.2.3/tcp/5",
        "/ip4/::1/tcp/5",
        "/ip4/1.2.3.4/tcp/0",
        "/ip4/1.2.3.4/tcp/99999",
        "/ip4/1.2.3.4/tcp/-1",
        "/ip4/1.2.3.4/tcp/5/p2p/Qm",
        "/dns/a b/tcp/5",
        f"/ip4/1.2.3.4/tcp/5/p2p-circuit/{STRANGER}",
    ):
        with pytest.raises(ValueError, match=r"."):
            Address.parse(bad)
    reaches = {
        "127.0.0.1": Reach.THIS_MACHINE,
        "0.0.0.0": Reach.THIS_MACHINE,
        "::1": Reach.THIS_MACHINE,
        "localhost": Reach.THIS_MACHINE,
        "10.1.2.3": Reach.LOCAL_NETWORK,
        "192.168.0.1": Reach.LOCAL_NETWORK,
        "100.64.0.1": Reach.LOCAL_NETWORK,  # carrier-grade NAT
        "fe80::1": Reach.LOCAL_NETWORK,
        "8.8.8.8": Reach.ANYWHERE,
        "2606:4700::1111": Reach.ANYWHERE,
        "example.org": Reach.ANYWHERE,
    }
    addresses = [Address.of_host(host, 1) for host in reaches]
    assert [address.reach for address in addresses] == list(reaches.values())
    assert [address.reach for address in farthest_first(addresses)] == [Reach.ANYWHERE] * 3 + [Reach.LOCAL_NETWORK] * 4
    assert farthest_first(addresses[:1] * 2) == addresses[:1]


def test_a_founder_whose_peers_are_all_gone_starts_alone(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening
        gone = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{STRANGER}"
        with running(tmp_path / "a", initial_peers=[gone], founder=True, deadline_seconds=0.1) as founder:
            assert visible_addresses(founder)
            with running(tmp_path / "b", initial_peers=[gone, visible_addresses(founder)[0]]) as second:
                assert second.store("averager.0b0", 1.5, time.time() + 60, subkey=b"x")
                found = founder.get("averager.0b0", latest=True)
                assert found is not None
                assert found.value[b"x"].value == 1.5


def test_a_founder_that_comes_back_joins_those_it_knew(tmp_path: Path) -> None:
    with running(tmp_path / "a") as first:
        here = visible_addresses(first)
        with running(tmp_path / "b", initial_peers=here) as second:
            assert second.store("averager.0b0", 1.5, time.time() + 60, subkey=b"x")
            first.shutdown()
            with running(tmp_path / "a", initial_peers=visible_addresses(second), founder=True) as again:
                found = again.get("averager.0b0", latest=True)
                assert found is not None
                assert found.value[b"x"].value == 1.5
