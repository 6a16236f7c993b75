"""Invites: what is printed can be read, and what cannot be read says why."""

import pytest
from shoal.node.errors import InviteError
from shoal.node.run.invite import Invite
from shoal.protocol.addresses import Address, Reach
from shoal.protocol.identity import Identity

A, B = "12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB", Identity.generate().peer_id
RUN = "demo-0123456789ab"


def test_golden() -> None:
    invite = Invite(addresses=(Address.of_host("203.0.113.5", 4001, A),), run_id=RUN)
    assert str(invite) == f"shoal://{A}@203.0.113.5:4001/demo-0123456789ab?v=1"
    assert invite.multiaddrs() == [f"/ip4/203.0.113.5/tcp/4001/p2p/{A}"]


@pytest.mark.parametrize("host", ["203.0.113.5", "2001:db8::1", "::1", "example.org", "a-b.example", "localhost"])
def test_round_trip(host: str) -> None:
    invite = Invite(addresses=(Address.of_host(host, 1, A), Address.of_host("10.0.0.1", 65535, B)), run_id=RUN)
    assert Invite.parse(str(invite)) == invite


def test_networks() -> None:
    invite = Invite.parse(f"shoal://{A}@[2001:db8::1]:1,{B}@example.org:2,{A}@1.2.3.4:3/{RUN}?v=1")
    assert invite.multiaddrs() == [
        f"/ip6/2001:db8::1/tcp/1/p2p/{A}",
        f"/dns/example.org/tcp/2/p2p/{B}",
        f"/ip4/1.2.3.4/tcp/3/p2p/{A}",
    ]


def test_multiaddrs_are_accepted() -> None:
    dns = f"/dns4/example.org/tcp/4001/p2p/{A}"
    invite = Invite.parse(f"shoal://{dns},{B}@1.2.3.4:5/{RUN}?v=1")
    assert invite.multiaddrs() == [dns, f"/ip4/1.2.3.4/tcp/5/p2p/{B}"]
    assert Invite.parse(f"shoal://{B}@1.2.3.4:5,{dns}/{RUN}").multiaddrs() == list(reversed(invite.multiaddrs()))


@pytest.mark.parametrize("host", ["203.0.113.9", "2001:db8::9", "relay.example.org"])
def test_a_relay_is_named_and_read(host: str) -> None:
    relay = Address.of_host(host, 31400)
    invite = Invite(addresses=(Address.of_host("10.0.0.1", 1, A),), run_id=RUN, relay=relay)
    assert str(invite).endswith("&relay=[2001:db8::9]:31400" if ":" in host else f"&relay={host}:31400")
    assert Invite.parse(str(invite)) == invite


@pytest.mark.parametrize("relay", ["", "host", "host:0", "host:65536", "-x:5", "1.2.3.400:5", f"{A}@"])
def test_a_relay_that_cannot_be_is_refused(relay: str) -> None:
    with pytest.raises(InviteError, match="relay"):
        Invite.parse(f"shoal://{A}@1.2.3.4:5/{RUN}?v=1&relay={relay}")


@pytest.mark.parametrize("decorate", ["  {}\n", "'{}'", '"{}"', "<{}>", "{}&note=ignored"])
def test_how_people_paste_it(decorate: str) -> None:
    invite = Invite(addresses=(Address.of_host("1.2.3.4", 5, A),), run_id=RUN)
    assert Invite.parse(decorate.format(invite)) == invite
    folded = f"{str(invite)[:41]}\n        {str(invite)[41:]}"
    assert Invite.parse(decorate.format(folded)) == invite


def test_a_shell_may_have_eaten_the_version() -> None:
    assert Invite.parse(f"shoal://{A}@1.2.3.4:5/{RUN}/").run_id == RUN


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "does not start with shoal://"),
        (f"https://{A}@1.2.3.4:5/{RUN}?v=1", "does not start with shoal://"),
        (f"shoal://{A}@1.2.3.4:5?v=1", "ends before the run id"),
        (f"shoal:///{RUN}?v=1", "ends before the run id"),
        (f"shoal://{A}@1.2.3.4:5/demo?v=1", "not a run id"),
        (f"shoal://{A}@1.2.3.4:5/Demo-0123456789ab?v=1", "not a run id"),
        (f"shoal://{A}@1.2.3.4:5/{RUN}?v=2", "protocol 2, this software speaks protocol 1"),
        (f"shoal://{A}@1.2.3.4:5/{RUN}?v=0", "protocol 0"),
        (f"shoal://{A}@1.2.3.4:5/{RUN}?v=x", "not a protocol version"),
        (f"shoal://1.2.3.4:5/{RUN}?v=1", "lacks the peer id"),
        (f"shoal://@1.2.3.4:5/{RUN}?v=1", "lacks its peer id"),
        (f"shoal://{A[:-1]}@1.2.3.4:5/{RUN}?v=1", "not the peer id"),
        (f"shoal://{A}@1.2.3.4/{RUN}?v=1", "not HOST:PORT"),
        (f"shoal://{A}@1.2.3.4:/{RUN}?v=1", "not HOST:PORT"),
        (f"shoal://{A}@2001:db8::1:5/{RUN}?v=1", "not HOST:PORT"),
        (f"shoal://{A}@[1.2.3.4/{RUN}?v=1", "not HOST:PORT"),
        (f"shoal://{A}@1.2.3.4:0/{RUN}?v=1", "not in 1..65535"),
        (f"shoal://{A}@1.2.3.4:65536/{RUN}?v=1", "not in 1..65535"),
        (f"shoal://{A}@1.2.3.400:5/{RUN}?v=1", "neither an IP address"),
        (f"shoal://{A}@exa mple:5/{RUN}?v=1", "not a host name"),
        (f"shoal://{A}@-x:5/{RUN}?v=1", "not a host name"),
        (f"shoal:///ip4/1.2.3.4/udp/5/quic/p2p/{A}/{RUN}?v=1", "not of the form"),
        (f"shoal:///ip4/1.2.3.4/tcp/5/{RUN}?v=1", "lacks its peer id"),
        (f"shoal:///ip6/1.2.3.4/tcp/5/p2p/{A}/{RUN}?v=1", "not an address of ip6"),
        (f"shoal://,/{RUN}?v=1", "has no address"),
        (f"shoal://{A}@1.2.3.4:5/{'x' * 5000}", "at most 4096 characters"),
    ],
)
def test_unreadable_invites_say_why(text: str, complaint: str) -> None:
    with pytest.raises(InviteError) as caught:
        Invite.parse(text)
    assert complaint in caught.value.cause
    assert caught.value.fix


def test_an_invite_to_another_protocol_says_what_to_do() -> None:
    with pytest.raises(InviteError) as caught:
        Invite.parse(f"shoal://{A}@1.2.3.4:5/{RUN}?v=2")
    assert "protocol-2" in caught.value.fix


@pytest.mark.parametrize(
    ("hosts", "reach", "words"),
    [
        (["127.0.0.1"], Reach.THIS_MACHINE, "this machine only"),
        (["::1", "localhost"], Reach.THIS_MACHINE, "this machine only"),
        (["127.0.0.1", "192.168.1.7"], Reach.LOCAL_NETWORK, "the local network"),
        (["fd00::1"], Reach.LOCAL_NETWORK, "the local network"),
        (["10.0.0.1", "8.8.8.8"], Reach.ANYWHERE, "anywhere"),
        (["example.org"], Reach.ANYWHERE, "anywhere"),
    ],
)
def test_reach(hosts: list[str], reach: Reach, words: str) -> None:
    invite = Invite(addresses=tuple(Address.of_host(host, 4001, A) for host in hosts), run_id=RUN)
    assert invite.reach == reach
    assert invite.reachable_from == words
