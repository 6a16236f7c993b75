"""How long a peer may take over what it is sent."""

from __future__ import annotations


class Patience:
    """Seconds left for a peer that reads. What it takes gives it more, at the slowest rate that is borne with.

    It is never more than in the beginning: who has read fast may not hold on to the rest for long.
    """

    def __init__(self, seconds: float, bytes_per_second: float) -> None:
        self._most = self.left = seconds
        self._rate = bytes_per_second

    def took(self, nbytes: int, seconds: float) -> None:
        """The peer took so many bytes in so many seconds. `left` may be negative then."""
        self.left = min(self._most, self.left + nbytes / self._rate - seconds)
