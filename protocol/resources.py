"""Names of what one peer fetches from another over a stream, e.g. `standin/17`.

manifest                the run's signed manifest
backbone/<fragment>     a backbone fragment's last committed state
local/<fragment>        the same fragment as one composer has it now, unmerged: for export of a run with one composer
standin/<slot>          the published stand-ins of a slot, from its owner (StandInSnapshot)
snapshot/<slot>         a slot in full as of its last snapshot, from its owner or a standby (SlotState)
handover/<slot>         a slot in full, frozen: asking the owner for it ends its ownership (SlotState)
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from .errors import Refused
from .messages import MAX_SLOTS


class ResourceKind(enum.Enum):
    MANIFEST = "manifest"
    BACKBONE = "backbone"
    LOCAL = "local"
    STANDIN = "standin"
    SNAPSHOT = "snapshot"
    HANDOVER = "handover"


@dataclass(frozen=True)
class Resource:
    """Something to fetch. `index` is the fragment or the slot; None for the manifest."""

    kind: ResourceKind
    index: int | None = None

    @property
    def name(self) -> str:
        return self.kind.value if self.index is None else f"{self.kind.value}/{self.index}"


_NAME = re.compile(r"([a-z]{1,16})(?:/(0|[1-9][0-9]{0,7}))?")


def manifest() -> str:
    return ResourceKind.MANIFEST.value


def backbone(fragment: int) -> str:
    return Resource(ResourceKind.BACKBONE, fragment).name


def local(fragment: int) -> str:
    return Resource(ResourceKind.LOCAL, fragment).name


def standin(slot: int) -> str:
    return Resource(ResourceKind.STANDIN, slot).name


def snapshot(slot: int) -> str:
    return Resource(ResourceKind.SNAPSHOT, slot).name


def handover(slot: int) -> str:
    return Resource(ResourceKind.HANDOVER, slot).name


def parse_resource(name: str) -> Resource:
    """What a peer asks for. Raises Refused with reason "unknown-resource"; each resource has exactly one name."""
    match = _NAME.fullmatch(name)
    kinds = {kind.value: kind for kind in ResourceKind}
    if match is None or match[1] not in kinds:
        raise Refused("unknown-resource", f"there is no {name[:40]!r}")
    kind = kinds[match[1]]
    index = None if match[2] is None else int(match[2])
    if (index is None) != (kind is ResourceKind.MANIFEST) or (index is not None and index >= MAX_SLOTS):
        raise Refused("unknown-resource", f"there is no {name[:40]!r}")
    return Resource(kind, index)
