"""Named eternal tasks that are restarted, watched, and given up on; knows no domain.

A task that dies in a lifespan's task group does not stop uvicorn, which goes on answering with no
worker behind it. So no exception reaches the group. Whatever ends a run is a fault: an error, a
return, a cancellation that is not ours, or silence while work waits. A fault is followed by a
full-jitter wait, `uniform(0, min(cap, base · 2^(attempt − 1)))`, and a new run.

A fault that only time repairs (a store is down) is waited out without limit. After too many other
faults, or one that no restart repairs, the supervisor gives up: the process drains and ends, and
the platform starts it again.
"""

import asyncio
import contextvars
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio
import anyio.abc

from cerberus import errors

log = logging.getLogger(__name__)

current_task: contextvars.ContextVar[str] = contextvars.ContextVar("current_task", default="main")

# No TypeError, AttributeError or AssertionError: client libraries raise them while a connection
# breaks, and one that is a bug of ours has used up its restarts within seconds.
FATAL = (
    NameError,
    ImportError,
    SystemExit,
    KeyboardInterrupt,
    errors.ConfigError,
    errors.ModelMismatch,
)
AWAY = (errors.StoreUnavailable, errors.FeaturesUnavailable)


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient the supervisor is; all in seconds except `max_failures`.

    Attributes:
        backoff_base_s: Ceiling of the first wait; it doubles with each fault in a row.
        backoff_cap_s: Greatest ceiling.
        healthy_s: A run of this length resets the ceiling.
        max_failures: How many faults within `failure_window_s` are tolerated.
        failure_window_s: See above.
        watch_s: Time between two looks at a task.
        stall_s: How long a task that lags may be silent.
        clean_up_s: How long a stalled task may clean up after it was cancelled.
        stop_s: Time for all tasks together to stop.
        cut_s: How long a task that did not stop in time may clean up.
    """

    backoff_base_s: float = 0.5
    backoff_cap_s: float = 30.0
    healthy_s: float = 60.0
    max_failures: int = 5
    failure_window_s: float = 600.0
    watch_s: float = 1.0
    stall_s: float = 30.0
    clean_up_s: float = 15.0
    stop_s: float = 16.0
    cut_s: float = 2.0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The state of a task.

    Attributes:
        state: running, backing_off, stopped or failed.
        since_s: How long it has been in that state.
        restarts: How often it was restarted.
        sound: Whether it runs and, after a restart, has made progress or lasted: a task that dies
            at each start is not sound between two deaths.
        last_error: What ended its latest run that failed.
        last_progress_s: How long ago it made progress or was started.
    """

    state: str
    since_s: float
    restarts: int
    sound: bool
    last_error: str | None
    last_progress_s: float


class Progress:
    """The channel between a task and its supervisor.

    Attributes:
        stopping: Set when the task should finish its work and return.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.stopping = asyncio.Event()
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Begin a new run; only the supervisor calls this."""
        self.last_s = self._clock()
        self.behind = self.beaten = False

    def beat(self) -> None:
        """Report progress."""
        self.last_s = self._clock()
        self.beaten = True

    def lagging(self, behind: bool) -> None:
        """Report whether work waits; only then is silence a fault."""
        if behind and not self.behind:
            self.last_s = self._clock()
        self.behind = behind

    async def wait(self, seconds: float) -> None:
        """Wait that long, or until asked to stop."""
        with anyio.move_on_after(seconds):
            await self.stopping.wait()


@dataclass(slots=True)
class _Task:
    name: str
    run: Callable[[Progress], Awaitable[None]]
    progress: Progress
    since_s: float
    state: str = "stopped"
    restarts: int = 0
    attempt: int = 0
    last_error: str | None = None
    failures: deque[float] = field(default_factory=deque)
    scope: anyio.CancelScope | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Fault:
    reason: str
    error: BaseException | None
    lived_s: float
    fatal: bool


class Supervisor:
    """Runs named tasks until asked to stop.

    Args:
        on_give_up: Called once with the reason when a task cannot be kept alive.
        on_restart: Called with a task's name at each restart.
        policy: Waits and bounds.
        clock: Monotonic seconds.
        rng: Draws the jitter.

    Attributes:
        gave_up: Which task was given up on and why; None while all are kept alive.
        misconfigured: The sentence about a wrong setting that made it give up; None otherwise.
    """

    def __init__(
        self,
        on_give_up: Callable[[str], None],
        *,
        on_restart: Callable[[str], None] = lambda name: None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._on_give_up = on_give_up
        self._on_restart = on_restart
        self._policy = policy or Policy()
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._tasks: dict[str, _Task] = {}
        self.gave_up: str | None = None
        self.misconfigured: str | None = None

    def add(self, name: str, run: Callable[[Progress], Awaitable[None]]) -> None:
        """Add an eternal task.

        Args:
            name: Also the `task` of its log lines.
            run: Called again at each restart; may return only after `progress.stopping` was set.

        Raises:
            ValueError: There is a task of that name.
        """
        if name in self._tasks:
            raise ValueError(f"there is a task named {name!r} already; give each its own name")
        self._tasks[name] = task = _Task(name, run, Progress(self._clock), self._clock())
        task.ended.set()

    def start(self, group: anyio.abc.TaskGroup) -> None:
        """Start all tasks in `group`, which cannot end before they have stopped."""
        for task in self._tasks.values():
            task.ended.clear()
            group.start_soon(self._keep_alive, task, name=task.name)

    async def stop(self, order: Sequence[str] = ()) -> None:
        """Stop the tasks one by one, all within `stop_s`; a second call is harmless.

        Each may use an equal share of the remaining time to finish by itself. Then it is
        cancelled, and abandoned if it ignores that.

        Args:
            order: Names; unknown names are skipped, and tasks that are not named come last.
        """
        rest = [task for name, task in self._tasks.items() if name not in order]
        tasks = [self._tasks[name] for name in order if name in self._tasks] + rest
        ends_s = anyio.current_time() + self._policy.stop_s
        for done, task in enumerate(tasks):
            task.progress.stopping.set()
            share_s = (ends_s - anyio.current_time()) / (len(tasks) - done)
            with anyio.move_on_after(share_s - self._policy.cut_s):
                await task.ended.wait()
            if not task.ended.is_set() and task.scope is not None:
                log.warning("%s did not stop in time", task.name, extra={"action": "task_cut"})
                task.scope.cancel()
                await task.ended.wait()  # `cut_s` at most

    def status(self) -> dict[str, TaskStatus]:
        """Return the state of each task, by name."""
        now, healthy_s = self._clock(), self._policy.healthy_s
        return {
            t.name: TaskStatus(
                state=t.state,
                since_s=now - t.since_s,
                restarts=t.restarts,
                sound=t.state == "running"
                and (t.restarts == 0 or t.progress.beaten or now - t.since_s >= healthy_s),
                last_error=t.last_error,
                last_progress_s=now - t.progress.last_s,
            )
            for t in self._tasks.values()
        }

    def _enter(self, task: _Task, state: str) -> None:
        task.state, task.since_s = state, self._clock()

    async def _keep_alive(self, task: _Task) -> None:
        current_task.set(task.name)
        try:
            with anyio.CancelScope() as task.scope:
                while (fault := await self._run(task)) is not None:
                    if self._bearable(task, fault):
                        await self._back_off(task, fault)
                    else:
                        self._give_up(task, fault)
                        break
        finally:
            if task.state != "failed":
                self._enter(task, "stopped")
                log.info("stopped", extra={"action": "task_stopped"})
            task.ended.set()

    async def _run(self, task: _Task) -> _Fault | None:
        """Run the task to its end; None if it was asked to stop."""
        if task.progress.stopping.is_set():
            return None
        self._enter(task, "running")
        task.progress.begin()
        # A task of its own, so that it is cancelled once and can then await its clean-up, and so
        # that a cancellation by anybody else can be told from ours.
        child = asyncio.create_task(_contained(task), name=task.name)
        try:
            stalled = await self._watch(task, child)
        except asyncio.CancelledError:
            child.cancel()
            with anyio.move_on_after(self._policy.cut_s, shield=True):
                await asyncio.wait({child})
            if not child.done():
                log.error("abandoned: it ignores its cancellation", extra={"action": "task_left"})
            raise
        fault = self._judge(task, child, stalled)
        if not task.progress.stopping.is_set():
            return fault
        if fault.error is not None:
            _log_fault("failed while stopping: %s", fault)
        return None

    async def _watch(self, task: _Task, child: asyncio.Task[BaseException | None]) -> bool:
        """Wait for the end of the run; True if it was cancelled for its silence."""
        policy, progress = self._policy, task.progress
        while not child.done():
            looked_s = self._clock()
            await asyncio.wait({child}, timeout=policy.watch_s)
            now = self._clock()
            if now - looked_s > policy.watch_s + policy.stall_s:
                # The whole process was suspended: no task could make progress.
                progress.last_s = now
            silent = progress.behind and now - progress.last_s > policy.stall_s
            if silent and not child.done() and not progress.stopping.is_set():
                child.cancel()
                await asyncio.wait({child}, timeout=policy.clean_up_s)
                return True
        return False

    def _judge(
        self, task: _Task, child: asyncio.Task[BaseException | None], stalled: bool
    ) -> _Fault:
        error = child.result() if child.done() and not child.cancelled() else None
        # Two runs side by side would do everything twice.
        deaf = not child.done()
        if stalled:
            reason = f"made no progress for {self._policy.stall_s:g} s" + (
                " and ignored its cancellation" if deaf else ""
            )
        elif child.cancelled():
            reason = "was cancelled, though not by its supervisor"
        elif error is None:
            reason = "returned, though it should run for ever"
        else:
            reason = f"{type(error).__name__}: {error}"
        ended_s = task.progress.last_s if stalled else self._clock()
        fatal = deaf or (error is not None and _group(error).subgroup(FATAL) is not None)
        return _Fault(reason, error, ended_s - task.since_s, fatal)

    def _bearable(self, task: _Task, fault: _Fault) -> bool:
        task.last_error = fault.reason
        _log_fault("failed: %s", fault)
        if fault.error is not None and _group(fault.error).split(AWAY)[1] is None:
            return True
        now = self._clock()
        task.failures.append(now)
        while task.failures[0] <= now - self._policy.failure_window_s:
            task.failures.popleft()
        return not fault.fatal and len(task.failures) <= self._policy.max_failures

    async def _back_off(self, task: _Task, fault: _Fault) -> None:
        policy = self._policy
        task.attempt = 1 if fault.lived_s >= policy.healthy_s else task.attempt + 1
        # The exponent is bounded too: an outage of hours would exceed the range of floats.
        ceiling_s = min(
            policy.backoff_cap_s, policy.backoff_base_s * 2 ** min(task.attempt - 1, 64)
        )
        self._enter(task, "backing_off")
        await task.progress.wait(self._rng.uniform(0, ceiling_s))
        if not task.progress.stopping.is_set():
            task.restarts += 1
            _tell(self._on_restart, task.name)

    def _give_up(self, task: _Task, fault: _Fault) -> None:
        self._enter(task, "failed")
        if self.gave_up is None:
            self.gave_up = f"{task.name}: {fault.reason}"
            self.misconfigured = _wrong_setting(fault.error)
            _tell(self._on_give_up, self.gave_up)


async def _contained(task: _Task) -> BaseException | None:
    try:
        await task.run(task.progress)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # an exit or interrupt that escapes a task breaks the loop
        return error
    return None


def _group(error: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("fault", [error])


def _log_fault(text: str, fault: _Fault) -> None:
    # A wrong setting is logged as a sentence, without a traceback.
    trace = None if _wrong_setting(fault.error) else fault.error
    log.error(text, fault.reason, exc_info=trace, extra={"action": "task_failed"})


def _wrong_setting(error: BaseException | None) -> str | None:
    while isinstance(error, BaseExceptionGroup):
        error = next(iter((error.subgroup(errors.ConfigError) or error).exceptions))
    return str(error) if isinstance(error, errors.ConfigError) else None


def _tell(hook: Callable[[str], None], text: str) -> None:
    try:
        hook(text)
    except Exception:
        log.exception("a hook of the supervisor failed", extra={"action": "hook_failed"})
