"""The connections of a process: how many, how long each may take, and the bytes of their bodies.

Every connection is in one phase at a time, and every phase has a deadline. When no more connections
fit, the one that has waited longest for its client makes room. So well-behaved callers are served,
however many others open connections and send nothing.
"""

import asyncio
import collections
import contextlib
import enum
import logging
import resource
from collections.abc import Mapping
from typing import Protocol

from cerberus import settings

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Load balancers keep an idle connection for 60 s, and they should close it first."""
RESERVED_FILES = 96
"""How many files the stores' pools, Kafka's clients and child processes may have open."""
SMALL_BODY = 64 * 1024
_ANSWER_S, _LEAVE_S, _BODY_GRACE_S, _SWEEP_S, _TOLD_S = 60.0, 2.0, 5.0, 1.0, 60.0
_HELD_BYTES = {False: 32 * 2**20, True: 8 * 2**20}


class Phase(enum.Enum):
    """What a connection waits for."""

    NEW = "its first byte"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    ANSWER = "our answer"
    IDLE = "the next request"
    LEAVING = "its end, after the last answer"

    __hash__ = object.__hash__  # by identity: `Enum` would hash the name in Python, which is slower


_MAKE_ROOM = ((Phase.LEAVING,), (Phase.NEW, Phase.HEAD), (Phase.IDLE,), (Phase.BODY,))


class Connection(Protocol):
    """One connection, as `Connections` sees it."""

    phase: Phase | None
    """What it waits for; None when it is gone. `Connections` sets it."""

    def overdue(self, phase: Phase) -> None:
        """Answer and close: the phase took too long."""

    def drop(self) -> None:
        """Close at once, without an answer."""


_Since = dict[Connection, float]  # oldest first


class Connections:
    """Keeps every connection by phase, oldest first. Cost: 0.2 µs for a change of phase.

    Args:
        limits: How many, and how long.
    """

    def __init__(self, limits: settings.Connections) -> None:
        self.limits = limits
        self.most = capacity(limits.most)
        self.refused: collections.Counter[str] = collections.Counter()
        self.seconds = {
            Phase.NEW: float(KEEP_ALIVE_S),
            Phase.HEAD: limits.head_s,
            Phase.BODY: limits.body_s
            + _BODY_GRACE_S,  # the route that reads the body answers first
            Phase.ANSWER: _ANSWER_S,
            Phase.IDLE: float(KEEP_ALIVE_S),
            Phase.LEAVING: _LEAVE_S,
        }
        self._since: Mapping[Phase, _Since] = {phase: {} for phase in Phase}
        self._count = 0
        self._held = {False: 0, True: 0}
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_SWEEP_S, self._sweep)
        self._told_s = self._loop.time()

    def __len__(self) -> int:
        return self._count

    def admit(self, connection: Connection) -> bool:
        """Accept a new connection, if necessary in place of another; False if all are busy."""
        fits = self._count < self.most or self._make_room()
        if fits:
            self.enter(connection, Phase.NEW)
        return fits

    def enter(self, connection: Connection, phase: Phase) -> None:
        """Note what a connection waits for from now on."""
        before = connection.phase
        if before is not phase or phase is Phase.ANSWER:
            if before is None:
                self._count += 1
            else:
                del self._since[before][connection]
            connection.phase = phase
            self._since[phase][connection] = self._loop.time()

    def leave(self, connection: Connection) -> None:
        """Forget a connection that is gone."""
        if connection.phase is not None:
            del self._since[connection.phase][connection]
            connection.phase = None
            self._count -= 1

    def hold(self, count: int, *, large: bool) -> bool:
        """Reserve memory for bytes of bodies; False if there is none left.

        Bodies above 64 KiB have a separate limit, so that they do not displace predictions.
        """
        fits = self._held[large] + count <= _HELD_BYTES[large]
        if fits:
            self._held[large] += count
        return fits

    def let_go(self, count: int, *, large: bool) -> None:
        """Release bytes that `hold` reserved."""
        self._held[large] -= count

    def close(self) -> None:
        """Stop watching."""
        self._timer.cancel()

    def _make_room(self) -> bool:
        for phases in _MAKE_ROOM:
            oldest = [
                next(iter(since.items())) for phase in phases if (since := self._since[phase])
            ]
            if oldest:
                connection, _ = min(oldest, key=lambda each: each[1])
                self.refused["no_room"] += 1
                self.leave(connection)
                connection.drop()
                return True
        return False

    def _sweep(self) -> None:
        try:
            now_s = self._loop.time()
            for phase, since in self._since.items():
                until_s = now_s - self.seconds[phase]
                late = [each for each, at_s in _while(since, until_s)]
                for connection in late:
                    self.refused[f"late: {phase.value}"] += phase is not Phase.IDLE
                    connection.overdue(phase)
            if now_s - self._told_s >= _TOLD_S:
                self._told_s = now_s
                self._tell()
        finally:
            self._timer = self._loop.call_later(_SWEEP_S, self._sweep)

    def _tell(self) -> None:
        if refused := {why: count for why, count in self.refused.items() if count}:
            log.warning(
                "connections and requests were refused before any route: %s",
                ", ".join(f"{count} {why}" for why, count in sorted(refused.items())),
                extra={"action": "connections_refused"},
            )
            self.refused.clear()


def _while(since: _Since, until_s: float) -> list[tuple[Connection, float]]:
    found = []
    for connection, at_s in since.items():
        if at_s > until_s:
            break
        found.append((connection, at_s))
    return found


def capacity(wanted: int) -> int:
    """Return how many connections fit, and raise the limit of open files for them if allowed."""
    needed = wanted + RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        soft_wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit below its hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft_wanted, hard))
            soft = soft_wanted
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fits = max(1, soft - RESERVED_FILES)
    log.warning(
        "%d connections fit, not %d: this process may open %d files; raise `ulimit -n`",
        fits,
        wanted,
        soft,
        extra={"action": "connections_limited"},
    )
    return fits
