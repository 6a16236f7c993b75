"""Names of what one peer fetches from another over a stream, e.g. `standin/17`.

manifest                the run's signed manifest
backbone/<fragment>     a backbone fragment's last committed state
local/<fragment>        the same fragment as one composer has it now, unmerged: for export of a run with one composer
standin/<slot>          the published stand-ins of a slot, from its owner (StandInSnapshot)
snapshot/<slot>         a slot in full as of its last snapshot, from its owner or a standby (SlotState)
handover/<slot>         a slot in full, frozen: asking the owner for it ends its ownership (SlotState)
weights/<slot>          what a slot's experts compute with, exactly, without optimizer state: for export (SlotState)
rebuilt/<slot>          a slot of which no copy is left, made from the stand-in that runs there (SlotState)
seed/<part>             a part of the checkpoint that the run starts from, if it does (node/seed)
seed-index              their digests
handle-key              the run's handle key (handles.py): for composers only
handles/<slot>/<from_epoch>/<to_epoch>
                        how the experts of a copy in the handle order of `from_epoch` are called under the lease of
                        `to_epoch`, not earlier: for the owner (HandleTable)
audit/<slot>/<epoch>/<seed>
                        the owner's next step of a slot that it holds at `epoch`, on file; of its experts those that
                        `auditing.chosen` draws by the asker's `seed`: for composers (AuditRecord)
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from .directory.records import MAX_EPOCH
from .errors import Refused
from .messages import MAX_SLOTS


class ResourceKind(enum.Enum):
    MANIFEST = "manifest"
    BACKBONE = "backbone"
    LOCAL = "local"
    STANDIN = "standin"
    SNAPSHOT = "snapshot"
    HANDOVER = "handover"
    WEIGHTS = "weights"
    REBUILT = "rebuilt"
    HANDLE_KEY = "handle-key"
    HANDLES = "handles"
    AUDIT = "audit"
    SEED = "seed"
    SEED_INDEX = "seed-index"


_PAIRED = frozenset({ResourceKind.HANDLES, ResourceKind.AUDIT})
_RUN_WIDE = frozenset({ResourceKind.MANIFEST, ResourceKind.HANDLE_KEY, ResourceKind.SEED_INDEX})
_MAX_PARTS = 2 * MAX_SLOTS + 2


@dataclass(frozen=True)
class Resource:
    """Something to fetch. `index` is the fragment or the slot; None for what there is once in a run."""

    kind: ResourceKind
    index: int | None = None
    pair: tuple[int, int] | None = None  # of `handles`: epochs from and to; of `audit`: epoch and seed

    @property
    def name(self) -> str:
        return "/".join([self.kind.value, *(str(n) for n in (self.index, *(self.pair or ())) if n is not None)])


_NAME = re.compile(r"([a-z][a-z-]{0,15})(?:/(0|[1-9][0-9]{0,7})(?:/(0|[1-9][0-9]{0,14})/(0|[1-9][0-9]{0,14}))?)?")


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


def weights(slot: int) -> str:
    return Resource(ResourceKind.WEIGHTS, slot).name


def rebuilt(slot: int) -> str:
    return Resource(ResourceKind.REBUILT, slot).name


def seed(part: int) -> str:
    return Resource(ResourceKind.SEED, part).name


def seed_index() -> str:
    return ResourceKind.SEED_INDEX.value


def handle_key() -> str:
    return ResourceKind.HANDLE_KEY.value


def handles(slot: int, from_epoch: int, to_epoch: int) -> str:
    return Resource(ResourceKind.HANDLES, slot, (from_epoch, to_epoch)).name


def audit(slot: int, epoch: int, seed: int) -> str:
    return Resource(ResourceKind.AUDIT, slot, (epoch, seed)).name


def parse_resource(name: str) -> Resource:
    """What a peer asks for. Raises Refused with reason "unknown-resource"; each resource has exactly one name."""
    match = _NAME.fullmatch(name)
    kinds = {kind.value: kind for kind in ResourceKind}
    if match is None or match[1] not in kinds:
        raise Refused("unknown-resource", f"there is no {name[:40]!r}")
    kind = kinds[match[1]]
    index = None if match[2] is None else int(match[2])
    pair = None if match[3] is None else (int(match[3]), int(match[4]))
    if (
        (index is None) != (kind in _RUN_WIDE)
        or (pair is None) != (kind not in _PAIRED)
        or (index is not None and index >= (_MAX_PARTS if kind is ResourceKind.SEED else MAX_SLOTS))
        or (pair is not None and not (pair[0] <= MAX_EPOCH and pair[1] <= MAX_EPOCH))
        or (pair is not None and kind is ResourceKind.HANDLES and pair[0] > pair[1])
    ):
        raise Refused("unknown-resource", f"there is no {name[:40]!r}")
    return Resource(kind, index, pair)
