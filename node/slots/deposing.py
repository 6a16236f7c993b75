"""What it costs an owner to be found to lie: this peer ignores its leases, its deltas and its claims from then on.

Composers find it out themselves (`auditor.py`); workers, who cannot, follow more than half of the active composers. Who
takes the slots over is decided as ever, among those who are left.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ...protocol.experts.auditing import Distrust
from ...protocol.messages import Accusation
from ..logs import get_logger
from ..peer.links import Links

log = get_logger(__name__)


class Deposing:
    """On the asyncio loop.

    Args:
        audits: whether this peer comes to verdicts of its own.

    Attributes:
        on_accused: called with an accusation that is to be looked into now.
        on_distrust: called with each owner that is not trusted any more, after the directory has forgotten its leases.
    """

    def __init__(self, links: Links, *, audits: bool) -> None:
        self._links = links
        self.distrust = Distrust(links.peer_id, audits=audits)
        self.on_accused: Callable[[Accusation], None] | None = None
        self.on_distrust: Callable[[str], None] | None = None
        self._deposed: set[str] = set()

    def on_accusation(self, accuser: str, accusation: Accusation) -> None:
        """Somebody's verdict, its envelope already verified."""
        if accusation.owner == self._links.peer_id:
            log.error("audit.accused", accuser=accuser, slot=accusation.slot, reason=accusation.reason)
            return
        active = self._links.active_composers()
        if self.distrust.hear(accuser, accusation.owner, active, time.monotonic()) and self.on_accused is not None:
            self.on_accused(accusation)
        self.depose()

    def depose(self) -> None:
        """Act on the verdicts that there are."""
        for owner in self.distrust.distrusted(self._links.active_composers()) - self._deposed:
            self._deposed.add(owner)
            log.error("owner.deposed", owner=owner, slots=sorted(self._held_by(owner)))
            self._links.distrust(owner)
            if self.on_distrust is not None:
                self.on_distrust(owner)
            self._links.news.changed()

    def _held_by(self, owner: str) -> list[int]:
        return [slot for slot, claim in self._links.view().leases.items() if claim.owner == owner]
