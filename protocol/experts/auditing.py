"""Audits: whether an owner without data does what it says. Pure: clock and view of the swarm are arguments.

Everything that moves a worker's experts came to it as sketches, so one of its steps can be taken again by whoever has
its record: the state before, the sketches, the learning rate and the clip factor, the weights after
(`messages.AuditRecord`). This file checks what a record *claims*, against what the auditor knows without computing;
`node/audits/audit_verdict.py` takes the step again.

**Findings.** A lie convicts at once. Silence convicts if it goes on: an owner may be restarting, or have had nothing to
step on; and a slow composer may often not be heard in just the step that is on file. Only what passes ends a row of
silences.

**Distrust** is this peer's own verdict, for the rest of its life, and costs the owner its leases here: see
`ownership.Watch.distrust`. An auditor tells the others, but nobody believes it: a composer audits the accused itself. A
worker cannot (it follows no stand-ins, and knows nothing of what composers sent), and follows more than half of the
active composers. So one liar among three deposes nobody but in its own eyes; a single composer is believed.

Rejected: proofs that convince third parties (sketches are not signed one by one, and a record of a large expert is
hundreds of megabytes), and votes of composers that have not audited (one lie would be passed on as many).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from ..messages import AuditRecord

RECORD_BYTES = 64 * 1024 * 1024  # of states; a slot with more is audited in part, see `num_chosen`
BYTES_PER_WEIGHT = 17  # masters twice, two moments, a stand-in
# Sent batches of a slot whose digests are kept: so many, and of the last seconds as many more.
REMEMBERED = 32
MOST_REMEMBERED = 512
REMEMBERED_SECONDS = 30.0
FORMER_SECONDS = 300.0  # no sketch waits longer at an owner that takes steps
ACCUSATION_SECONDS = 30.0  # an accuser is acted on this often at most
MAX_ACCUSED = 64  # peers that one accuser accuses at a time
REPEATED_SECONDS = 1800.0  # an accusation that was not repeated for so long, which is every lease, is one no more


class Finding(StrEnum):
    """What an audit came to."""

    PASSED = "passed"
    # lies
    NOT_AS_ASKED = "not-as-asked"  # another slot, epoch, or other experts
    MALFORMED = "malformed"  # shapes, values that are not finite, sketches that do not decode
    STALE_STANDIN = "stale-standin"  # it names stand-ins older than those that it had published
    OTHER_STANDIN = "other-standin"  # it names others than it had published
    POOR_STANDIN = "poor-standin"  # what it published does not do the work of what it trains
    STRANGER = "stranger"  # a sketch of somebody who is no composer
    FORGED_SKETCH = "forged-sketch"  # in the auditor's name
    LEFT_OUT = "left-out"  # a sketch of the auditor that it had taken
    WRONG_RATE = "wrong-rate"
    WRONG_CLIP = "wrong-clip"
    WRONG_UPDATE = "wrong-update"
    SILENT = "silent"  # silences, too many in a row
    # silences
    NO_ANSWER = "no-answer"
    EMPTY = "empty"  # an expert without a single sketch
    OLD_SKETCH = "old-sketch"  # of the auditor, from before what it remembers
    UNKNOWN_SENDER = "unknown-sender"  # in the directory as the auditor sees it
    UNHEARD = "unheard"  # nothing of the auditor, which was answered meanwhile that its sketches were taken


# How many in a row convict. A composer that is slower than an owner's patience is in every other record at worst.
SILENCES = {
    Finding.NO_ANSWER: 3, Finding.EMPTY: 3, Finding.OLD_SKETCH: 3, Finding.UNKNOWN_SENDER: 3, Finding.UNHEARD: 20
}  # fmt: skip
LIES = frozenset(Finding) - {Finding.PASSED, *SILENCES}


def num_chosen(num_experts: int, weights: int) -> int:
    """Of how many of a slot's experts, of `weights` each, an audit is."""
    return min(num_experts, max(1, RECORD_BYTES // (BYTES_PER_WEIGHT * weights)))


def chosen(seed: int, handles: Iterable[bytes], num: int) -> list[bytes]:
    """The `num` experts that the auditor's seed draws, known to it before the owner has taken the step."""
    salt = seed.to_bytes(8)
    return sorted(handles, key=lambda handle: hashlib.blake2b(handle, key=salt, digest_size=16).digest())[:num]


# -- what was sent -------------------------------------------------------------------------------------------------


def _digest(tokens: int, rows: bytes) -> bytes:
    return hashlib.blake2b(rows, key=tokens.to_bytes(8), digest_size=16).digest()


@dataclass
class _Sent:
    at: float  # monotonic seconds
    digests: dict[bytes, bytes] = field(default_factory=dict)  # by handle
    taken: set[bytes] = field(default_factory=set)  # handles of which the owner said so


class SentLog:
    """A composer's memory of the sketches that it sent last: digests, and whether they were taken."""

    def __init__(self) -> None:
        self._slots: dict[int, OrderedDict[int, _Sent]] = {}  # by slot, then step
        self._forgot_until = -math.inf  # monotonic seconds

    def forgot(self, now: float) -> None:
        """This composer has been restarted: owners may still hold what it sent before, of steps that it takes again."""
        self._forgot_until = now + FORMER_SECONDS

    def sent(self, slot: int, step: int, tokens: int, experts: Iterable[tuple[bytes, bytes]], now: float) -> None:
        """Before a batch goes out: (handle, rows) of one slot. An answer that is lost leaves it at that."""
        steps = self._slots.setdefault(slot, OrderedDict())
        entry = steps.setdefault(step, _Sent(now))
        entry.digests |= {handle: _digest(tokens, rows) for handle, rows in experts}
        while len(steps) > REMEMBERED:
            oldest = next(iter(steps))
            if len(steps) <= MOST_REMEMBERED and now - steps[oldest].at < REMEMBERED_SECONDS:
                break
            del steps[oldest]

    def taken(self, slot: int, step: int, handles: Iterable[bytes]) -> None:
        """The owner said that it took these."""
        entry = self._slots.get(slot, OrderedDict()).get(step)
        if entry is not None:
            entry.taken.update(handles)

    def steps_taken(self, slot: int, after: int = -1) -> list[int]:
        """Steps after `after` of which something was taken."""
        return [step for step, entry in self._slots.get(slot, {}).items() if step > after and entry.taken]

    def check(self, slot: int, handle: bytes, used: Collection[tuple[int, int, bytes]], now: float) -> Finding:
        """What an owner says that it used of ours for one expert: (step, tokens, rows). `now`: monotonic seconds."""
        steps: OrderedDict[int, _Sent] = self._slots.get(slot, OrderedDict())
        numbers = [step for step, _, _ in used]
        old, restarted = False, now < self._forgot_until
        if len(set(used if restarted else numbers)) < len(used):
            return Finding.FORGED_SKETCH
        for step, tokens, rows in used:
            entry = steps.get(step)
            if entry is not None and entry.digests.get(handle) == _digest(tokens, rows):
                continue
            if not restarted and (entry is not None or step >= next(iter(steps), step + 1)):
                return Finding.FORGED_SKETCH
            old = True
        if old and restarted:  # its steps say nothing of which others it took
            return Finding.OLD_SKETCH
        taken = (number for number, entry in steps.items() if handle in entry.taken)
        if numbers and any(min(numbers) < number < max(numbers) and number not in numbers for number in taken):
            return Finding.LEFT_OUT
        return Finding.OLD_SKETCH if old else Finding.PASSED


# -- what a record claims ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the auditor knew when it asked."""

    me: str
    slot: int
    epoch: int
    seq: int  # published by then
    handles: Collection[bytes]  # drawn by its seed
    newest: int  # step of the last sketch of ours that the owner had taken; -1 if none
    rows: bool = True  # whether the run's owners step on row sketches


def check_claims(
    record: AuditRecord, asked: Asked, log: SentLog, roles: Mapping[str, str], *, now: float = math.inf
) -> Finding:
    """A record against what the auditor knows without computing.

    Args:
        log: of what this composer sent; also what was taken since it asked.
        roles: of the peers in the directory.
        now: monotonic seconds.
    """
    if (record.slot, record.epoch) != (asked.slot, asked.epoch):
        return Finding.NOT_AS_ASKED
    if {expert.handle for expert in record.experts} != set(asked.handles):
        return Finding.NOT_AS_ASKED
    if record.seq < asked.seq:
        return Finding.STALE_STANDIN
    if not asked.rows:
        return Finding.PASSED
    found = Finding.PASSED
    heard = False
    for expert in record.experts:
        senders = {sketch.sender for sketch in expert.sketches}
        if any(roles.get(sender, "composer") != "composer" for sender in senders - {asked.me}):
            return Finding.STRANGER
        mine = [(s.step, s.tokens, s.rows) for s in expert.sketches if s.sender == asked.me]
        heard = heard or bool(mine)
        checked = log.check(record.slot, expert.handle, mine, now)
        if checked in LIES:
            return checked
        if not expert.sketches:
            found = Finding.EMPTY
        elif not senders <= {asked.me, *roles}:
            found = Finding.UNKNOWN_SENDER
        elif checked is not Finding.PASSED:
            found = checked
    if found is Finding.PASSED and not heard and log.steps_taken(record.slot, asked.newest):
        return Finding.UNHEARD
    return found


# -- whom not to trust ---------------------------------------------------------------------------------------------


class Distrust:
    """One peer's verdicts on owners.

    Args:
        audits: whether it comes to its own; else it follows the majority of those who do.
    """

    def __init__(self, me: str, *, audits: bool) -> None:
        self._me, self._audits = me, audits
        self.convicted: dict[str, Finding] = {}  # by owner
        self._silences: dict[str, Counter[Finding]] = {}  # by owner, in a row
        self._accused: dict[str, dict[str, float]] = {}  # by accuser, when it last accused whom
        self._acted: dict[str, float] = {}  # by accuser, when last

    def judge(self, owner: str, finding: Finding) -> bool:
        """Take in an audit's finding. Returns whether it convicts the owner, which it does once."""
        if owner in self.convicted:
            return False
        if finding is Finding.PASSED:
            self._silences.pop(owner, None)
            return False
        if finding in SILENCES:
            row = self._silences.setdefault(owner, Counter())
            row[finding] += 1
            if row[finding] < SILENCES[finding]:
                return False
            finding = Finding.SILENT
        self.convicted[owner] = finding
        return True

    def hear(self, accuser: str, owner: str, active: Collection[str], now: float) -> bool:
        """Take in an accusation. Returns whether to audit the accused now.

        Args:
            active: composers that train or have finished; others are not heard.
            now: monotonic seconds.
        """
        if accuser not in active or owner in (self._me, accuser):
            return False
        self._forget(now)
        accused = self._accused.setdefault(accuser, {})
        if len(accused.keys() | {owner}) > MAX_ACCUSED:
            return False
        accused[owner] = now
        if not self._audits or owner in self.convicted or accuser in self._acted:
            return False
        self._acted[accuser] = now
        return True

    def _forget(self, now: float) -> None:
        """Neither who was accused long ago counts, or its accuser could accuse nobody else, nor who has long gone."""
        recent = {
            accuser: {owner: at for owner, at in accused.items() if at > now - REPEATED_SECONDS}
            for accuser, accused in self._accused.items()
        }
        self._accused = {accuser: accused for accuser, accused in recent.items() if accused}
        self._acted = {accuser: at for accuser, at in self._acted.items() if at > now - ACCUSATION_SECONDS}

    def distrusted(self, active: Collection[str]) -> set[str]:
        """Owners whose claims mean nothing here."""
        if self._audits:
            return set(self.convicted)
        votes = Counter(owner for accuser in active for owner in self._accused.get(accuser, ()))
        return {owner for owner, number in votes.items() if 2 * number > len(active)}
