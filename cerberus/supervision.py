"""Named eternal tasks that are restarted, watched, and given up on; knows no domain.

A task that dies in a lifespan's task group does not stop uvicorn, which goes on answering with no
worker behind it. So no exception reaches the group: each task is restarted after a full-jitter
wait, `uniform(0, min(cap, base · 2^(failures − 1)))`; the return of an eternal task is a fault; too
many failures, or one that a restart cannot mend, end the process.
"""

import asyncio
import contextvars
import logging
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import anyio.abc

from cerberus import errors

log = logging.getLogger(__name__)

current_task: contextvars.ContextVar[str] = contextvars.ContextVar("current_task", default="main")
FATAL = (
    TypeError,
    AttributeError,
    NameError,
    ImportError,
    AssertionError,
    errors.ConfigError,
    errors.ModelMismatch,
)
EXIT_STATUS = 70


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient the supervisor is; all in seconds but `max_failures`."""

    backoff_base_s: float = 0.5
    backoff_cap_s: float = 30.0
    healthy_s: float = 60.0
    max_failures: int = 5
    failure_window_s: float = 600.0
    stall_s: float = 30.0
    stop_s: float = 8.0
    watch_s: float = 1.0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task as others see it: state is running, backing_off, stopped or failed."""

    state: str
    since_s: float
    restarts: int
    last_error: str | None
    last_progress_s: float


class Progress:
    """What a task tells its supervisor, and hears from it.

    Attributes:
        stopping: Set when the task should finish its work and return.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.stopping = asyncio.Event()
        self._clock = clock
        self.last_s = clock()
        self.behind = False

    def beat(self) -> None:
        """Say that progress was made."""
        self.last_s = self._clock()

    def lagging(self, behind: bool) -> None:
        """Say whether work waits; only then is silence a fault."""
        if behind and not self.behind:
            self.beat()
        self.behind = behind


class _Task:
    def __init__(
        self, name: str, run: Callable[[Progress], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.run = run
        self.progress = Progress(name, clock)
        self.state = "stopped"
        self.since_s = clock()
        self.restarts = 0
        self.last_error: str | None = None
        self.failures: deque[float] = deque()
        self.scope: anyio.CancelScope | None = None
        self.done = asyncio.Event()


class Supervisor:
    """Runs named tasks until told to stop.

    Args:
        on_give_up: Called once with the reason when a task cannot be kept alive.
        on_restart: Called with a task's name at each restart.
        policy: Waits and bounds.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.
        rng: For the jitter.
    """

    def __init__(
        self,
        on_give_up: Callable[[str], None],
        *,
        on_restart: Callable[[str], None] = lambda name: None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._on_give_up = on_give_up
        self._on_restart = on_restart
        self._policy = policy or Policy()
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.SystemRandom()
        self._tasks: dict[str, _Task] = {}
        self.gave_up: str | None = None

    def add(self, name: str, run: Callable[[Progress], Awaitable[None]]) -> None:
        """Name an eternal task; `run` may return only after `progress.stopping` was set."""
        self._tasks[name] = _Task(name, run, self._clock)

    def start(self, group: anyio.abc.TaskGroup) -> None:
        """Start all tasks, and the watch over them, in `group`."""
        for task in self._tasks.values():
            group.start_soon(self._keep_alive, task, name=task.name)
        group.start_soon(self._watch, name="watch")

    async def stop(self, order: Sequence[str]) -> None:
        """Stop tasks one after the other: each may finish within `stop_s`, then is cancelled."""
        for name in order:
            if (task := self._tasks.get(name)) is None:
                continue
            task.progress.stopping.set()
            if task.state == "backing_off" and task.scope is not None:
                task.scope.cancel()
            with anyio.move_on_after(self._policy.stop_s):
                await task.done.wait()
            if not task.done.is_set() and task.scope is not None:
                log.warning("not stopped in time", extra={"action": "task_cut", "stopped": name})
                task.scope.cancel()
                with anyio.move_on_after(2.0):
                    await task.done.wait()

    def status(self) -> dict[str, TaskStatus]:
        """Say how each task is."""
        now = self._clock()
        return {
            t.name: TaskStatus(
                t.state, now - t.since_s, t.restarts, t.last_error, now - t.progress.last_s
            )
            for t in self._tasks.values()
        }

    def _enter(self, task: _Task, state: str) -> None:
        task.state, task.since_s = state, self._clock()

    async def _keep_alive(self, task: _Task) -> None:
        current_task.set(task.name)
        try:
            while not task.progress.stopping.is_set() and task.state != "failed":
                with anyio.CancelScope() as task.scope:
                    await self._run_once(task)
        finally:
            if task.state != "failed":
                self._enter(task, "stopped")
            task.done.set()

    async def _run_once(self, task: _Task) -> None:
        self._enter(task, "running")
        task.progress.beat()
        task.progress.behind = False
        started_s = self._clock()
        try:
            with anyio.CancelScope() as scope:
                task.scope = scope
                await task.run(task.progress)
        except Exception as error:
            fault: Exception | None = error
        else:
            fault = None
        if task.progress.stopping.is_set():
            if fault is not None:
                log.error("failed while stopping", exc_info=fault, extra={"action": "task_failed"})
            return
        if scope.cancelled_caught:
            reason = f"made no progress for {self._policy.stall_s:g} s"
        elif fault is None:
            reason = "returned, though it is eternal"
        else:
            reason = f"{type(fault).__name__}: {fault}"
        await self._after_fault(task, reason, fault, started_s)

    async def _after_fault(
        self, task: _Task, reason: str, fault: Exception | None, started_s: float
    ) -> None:
        now, policy = self._clock(), self._policy
        if now - started_s >= policy.healthy_s:
            task.failures.clear()
        task.failures.append(now)
        while task.failures[0] <= now - policy.failure_window_s:
            task.failures.popleft()
        task.last_error = reason
        log.error("task failed: %s", reason, exc_info=fault, extra={"action": "task_failed"})
        if isinstance(fault, FATAL) or len(task.failures) > policy.max_failures:
            self._enter(task, "failed")
            if self.gave_up is None:
                self.gave_up = f"{task.name} {reason}"
                self._on_give_up(self.gave_up)
            return
        self._enter(task, "backing_off")
        task.restarts += 1
        self._on_restart(task.name)
        ceiling = policy.backoff_base_s * 2 ** (len(task.failures) - 1)
        with anyio.CancelScope() as task.scope:
            await self._sleep(self._rng.uniform(0, min(policy.backoff_cap_s, ceiling)))

    async def _watch(self) -> None:
        """Cancel tasks that lag in silence; ends when every task has ended."""
        while not all(task.done.is_set() for task in self._tasks.values()):
            await anyio.sleep(self._policy.watch_s)
            for task in self._tasks.values():
                silent_s = self._clock() - task.progress.last_s
                stalled = task.progress.behind and silent_s > self._policy.stall_s
                if task.state == "running" and stalled and task.scope is not None:
                    task.scope.cancel()


class Exit:
    """Ends the process with status 70 after a clean teardown, under any uvicorn."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask uvicorn to shut down as on SIGTERM."""
        self.reason = reason
        log.critical("giving up: %s", reason, extra={"action": "give_up"})
        signal.raise_signal(signal.SIGTERM)

    def finish(self) -> None:
        """End the process if that was asked for; the last statement of the lifespan.

        uvicorn would end with the signal's status, which service managers take for a clean stop.
        """
        if self.reason is not None:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_STATUS)
