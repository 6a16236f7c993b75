"""A part of the day, in local time: "22:00-07:30"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..errors import ConfigError

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Hours:
    """From one minute of the local day to another, over midnight if the second is earlier."""

    begin: int  # minutes since midnight
    end: int

    @classmethod
    def parse(cls, text: str) -> Hours:
        """`"22:00-07:30"`.

        Raises:
            ConfigError: it is not written so, or begins when it ends.
        """
        match = _HOURS.fullmatch(text)
        if match is None or match[1] + match[2] == match[3] + match[4]:
            raise ConfigError(f"hours = {text!r} is no part of a day", fix="write it like 22:00-07:30, in local time")
        hour, minute, until_hour, until_minute = map(int, match.groups())
        return cls(60 * hour + minute, 60 * until_hour + until_minute)

    def now_open(self, now: datetime) -> bool:
        """Whether `now`, in local time, is in these hours; the last minute is not."""
        minute = 60 * now.hour + now.minute
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end

    def opens(self, now: datetime) -> datetime:
        """When they begin next, after `now`."""
        today = now.replace(hour=self.begin // 60, minute=self.begin % 60, second=0, microsecond=0)
        return today if today > now else today + timedelta(days=1)
