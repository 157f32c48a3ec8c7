"""The end of the process: in time whatever hangs, and with a status that says why."""

import asyncio
import contextlib
import functools
import logging
import os
import queue
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

EXIT_STATUS = 70
_FLUSH_S = 1.0


class Exit:
    """Ends the process in time after SIGTERM or SIGINT, and with status 70 after a give-up.

    uvicorn lets the lifespan end only when all connections are closed, by default without bound,
    so that one client could hold up the drain. Therefore the signal itself sets `asked`, beside
    uvicorn's own handler, and a thread ends the process `deadline_s` later, even if its loop is
    blocked; then the status is 128 + signal, as a shell would say it.

    Under plain uvicorn the process that gave up ends with 70: by itself uvicorn would end with the
    signal's status, which service managers treat as a clean stop. Under `--workers` the worker
    ends with 70, and uvicorn's parent replaces it at once while the others serve on. The parent
    goes on, and would itself end with 0: there, the platform has to watch `/health`.

    Args:
        deadline_s: From the first signal to the end of the process, whatever hangs.

    Attributes:
        asked: Set when the process has to end; set it to stop without a signal.
        reason: Why the process was given up; None otherwise.
        status: The exit status of a process that was given up.
    """

    def __init__(self, deadline_s: float = 19.0) -> None:
        self.asked = asyncio.Event()
        self.reason: str | None = None
        self.status = EXIT_STATUS
        self._deadline_s = deadline_s
        # A signal handler may call its put.
        self._heard: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Listen to the signals, from the start of the lifespan on.

        Only the main thread can: in any other, as in tests, this does nothing.
        """
        if threading.current_thread() is threading.main_thread():
            threading.Thread(target=self._bound, name="exit", daemon=True).start()
            hear = functools.partial(self._hear, asyncio.get_running_loop())
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.getsignal(number)
                signal.signal(number, hear)

    def request(self, reason: str) -> None:
        """Ask uvicorn to shut down as on SIGTERM; `finish` then ends it with `status`."""
        self.reason = reason
        log.critical("giving up: %s", reason, extra={"action": "give_up"})
        self.asked.set()
        signal.raise_signal(signal.SIGTERM)

    def finish(self) -> None:
        """End the process if it gave up; the last statement of the lifespan, in a `finally`.

        uvicorn has sent all responses by then.
        """
        if self.reason is not None:
            if sys.exc_info()[0] is not None:
                log.exception("the teardown failed", extra={"action": "give_up"})
            _end(self.status)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._heard.put(0)

    def _hear(self, loop: asyncio.AbstractEventLoop, number: int, frame: FrameType | None) -> None:
        self._heard.put(number)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self.asked.set)
        if callable(before := self._before[number]):
            before(number, frame)

    def _bound(self) -> None:
        if number := self._heard.get():
            time.sleep(self._deadline_s)
            _end(
                128 + number if self.reason is None else self.status,
                f"not stopped after {self._deadline_s:g} s, ending now: a client holds its "
                "connection, or a task ignores its cancellation or blocks the loop",
            )


def _end(status: int, complaint: str = "") -> None:
    """End the process now; a log that nobody reads delays that by at most a second."""

    def flush() -> None:
        if complaint:
            log.critical(complaint, extra={"action": "exit_forced"})
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(_FLUSH_S)
    os._exit(status)
