"""The wall clock. It is passed to everything that reads the time, so that a test can set it."""

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns ms since the Unix epoch."""


def now_ms() -> int:
    """Return the wall clock, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000
