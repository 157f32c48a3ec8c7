"""Restart servers of this run that have died."""

import collections
import threading
import time
import types
from collections.abc import Sequence

from cerberus import errors
from cerberus.stack import process, server

TIMES, WITHIN_S = 3, 600.0
_LOOK_S, _PAUSE_S = 0.2, 1.0


class Watch:
    """Watches servers in a thread while the block lasts.

    A server that has died is started again on the same ports with the same data, three times in
    ten minutes at most.

    Args:
        servers: Those that were started here.
        site: Where restarts are reported.

    Attributes:
        failure: Why a server is not started again; None while all of them run.
    """

    def __init__(self, servers: Sequence[server.Local], site: process.Site) -> None:
        self.failure: errors.ServerUnavailable | None = None
        self._servers = servers
        self._site = site
        self._ending = threading.Event()
        self._deaths: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=TIMES + 1)
        )
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._ending.set()
        # Otherwise a server could be started after it was stopped.
        self._site.cancelled.set()
        self._thread.join()

    def _look(self) -> None:
        while self.failure is None and not self._ending.wait(_LOOK_S):
            for each in self._servers:
                if each.status is not None and self.failure is None and not self._ending.is_set():
                    self._start_again(each)

    def _start_again(self, dead: server.Local) -> None:
        deaths, ended = self._deaths[dead.name], dead.account(process.ending(dead.status))
        while True:
            now_s = time.monotonic()
            deaths.append(now_s)
            recent = sum(now_s - died_s < WITHIN_S for died_s in deaths)
            if recent > TIMES:
                self.failure = errors.ServerUnavailable(
                    f"{dead.name} was started again {TIMES} times within {WITHIN_S / 60:g} "
                    f"minutes and has died again: {ended}"
                )
                return
            how = ended.partition(";")[0].removeprefix(f"{dead.name} ")
            self._site.tell(dead.name, f"{how}; starting it again ({recent} of {TIMES})")
            if self._ending.wait(_PAUSE_S):
                return
            try:
                dead.revive()
            except process.Cancelled:
                return
            except errors.ServerUnavailable as error:
                ended = str(error)
            else:
                self._site.report(dead.name, dead.url, f"ready in {dead.ready_s:.1f} s")
                return
