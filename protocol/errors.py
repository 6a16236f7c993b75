"""Errors that cross a module border. Each carries a code, a cause and what the user can do about it.

ShoalError
├── IdentityError       the identity file is missing, damaged, or open to other users
├── BadSignature        a record, message or manifest was not signed by whom it names
├── Refused             a peer's record or message broke a rule; counted by reason, never fatal
├── PeerUnreachable     nobody answered at an address
├── FetchFailed         a stream fetch ended without the whole, verified resource
├── DirectoryError      the DHT could not be joined, read or written
│   ├── ClockOff        this machine's clock and its peers' are apart
│   └── DirectoryEnded  this node's DHT process has ended
├── TransportError      the py-libp2p host process failed
└── RoundFailed         an outer round cannot be run at all
    └── AveragerEnded   and no other ever will
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of every error a user may see.

    Args:
        cause: what happened, in one sentence.
        fix: what the user can do, in one sentence; empty when there is nothing to do.
    """

    code = "SHOAL-000"

    def __init__(self, cause: str, *, fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause} [{self.code}]" + (f"\n  fix: {self.fix}" if self.fix else "")


class BadSignature(ShoalError):
    """A record, message or manifest was not signed by whom it names."""

    code = "SHOAL-101"


class Refused(ShoalError):
    """A peer's record or message broke a rule. `reason` is a short label for metrics."""

    code = "SHOAL-102"

    def __init__(self, reason: str, cause: str) -> None:
        super().__init__(cause)
        self.reason = reason


class PeerUnreachable(ShoalError):
    """Nobody answered at a peer's addresses, or the directory does not know the peer."""

    code = "SHOAL-103"


class FetchFailed(ShoalError):
    """A fetch from another peer ended without the whole, verified resource."""

    code = "SHOAL-104"


class DirectoryError(ShoalError):
    """The DHT could not be joined, read or written."""

    code = "SHOAL-105"


class ClockOff(DirectoryError):
    """This machine's clock and its peers' are apart: one side refuses what the other says."""

    code = "SHOAL-109"


class DirectoryEnded(DirectoryError):
    """The DHT process, or its p2p daemon, has ended; no waiting mends that. The peer starts over."""

    code = "SHOAL-110"


class TransportError(ShoalError):
    """The py-libp2p host process could not start, or keeps dying."""

    code = "SHOAL-106"


class RoundFailed(ShoalError):
    """An outer round cannot be run: the averager is still busy with that fragment, or did not start."""

    code = "SHOAL-107"


class AveragerEnded(RoundFailed):
    """The averager process has ended, so that this peer can never merge again. The peer starts over."""

    code = "SHOAL-111"


class IdentityError(ShoalError):
    """The identity file is missing, damaged, or open to other users."""

    code = "SHOAL-108"
