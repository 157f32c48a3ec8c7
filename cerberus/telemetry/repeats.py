"""Reduce a library's repeated warning to one line a minute, with a count.

While a broker is away, its client logs the same error several times a second.
"""

import collections
import logging
import re
import time
from collections.abc import Callable

_EVERY_S = 60.0
_MOST = 500
_KEY_CHARS, _TEXT_CHARS = 300, 2_000
# They log every change and every request.
_OURS = ("cerberus", "uvicorn")
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")
Key = tuple[str, str]


class _Complaint:
    __slots__ = ("last", "since_s", "withheld")

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.withheld = 0
        self.last: logging.LogRecord | None = None


class Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the first of a library's warnings that look alike, then one a minute.

    Records look alike if they have the logger and the text in common, without arguments and
    numbers. The line after a minute is the last that was withheld; its field `suppressed` counts
    the others. It is written with the next record of any logger. At most 500 kinds are remembered.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._told: collections.OrderedDict[Key, _Complaint] = collections.OrderedDict()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless one like it was written in the last minute."""
        now_s = self._clock()
        repeated = record.levelno >= logging.WARNING and not record.name.startswith(_OURS)
        if not repeated or not self._withhold(record, now_s):
            super().emit(record)
        while self._told:
            key, oldest = next(iter(self._told.items()))
            if now_s - oldest.since_s < _EVERY_S and len(self._told) <= _MOST:
                break
            del self._told[key]
            if oldest.last is not None:
                self._tell(oldest.last, oldest.withheld)
                if len(self._told) < _MOST:
                    self._told[key] = _Complaint(now_s)

    def _withhold(self, record: logging.LogRecord, now_s: float) -> bool:
        key = (record.name, _NUMBER.sub("#", str(record.msg)[:_KEY_CHARS]))
        known = self._told.get(key)
        if known is None:
            self._told[key] = _Complaint(now_s)
            return False
        known.withheld += 1
        # Without the traceback, which would keep its frames' objects alive.
        known.last = logging.makeLogRecord(
            {"name": record.name, "levelno": record.levelno, "levelname": record.levelname}
            | {"msg": record.getMessage()[:_TEXT_CHARS], "created": record.created}
        )
        return True

    def _tell(self, last: logging.LogRecord, withheld: int) -> None:
        last.suppressed = withheld - 1
        super().emit(last)
