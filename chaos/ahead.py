"""The service with a clock that is an hour ahead."""

import time

_now_ns = time.time_ns
time.time_ns = lambda: _now_ns() + 3_600_000_000_000

from cerberus.app import app  # noqa: E402 - imported modules must see that clock

__all__ = ["app"]
