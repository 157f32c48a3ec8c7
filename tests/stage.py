"""Supervised tasks that play a part, by a clock that passes at once when everybody waits."""

import asyncio
import contextlib
import dataclasses
import random
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio

from cerberus import supervision

POLICY = supervision.Policy()
SELDOM = dataclasses.replace(POLICY, watch_s=10.0)  # long scenes in fewer steps
EVER_S = 1e6


class Time(selectors.DefaultSelector):
    """Lets time pass at once when everybody waits."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for nothing"
        self.now_s += timeout
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """Runs by that time."""

    def __init__(self) -> None:
        self.clock = Time()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s


def now_s() -> float:
    return asyncio.get_running_loop().time()


def play(scene: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await scene()

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main())


class Longest(random.Random):
    """Draws the upper end."""

    def uniform(self, a: float, b: float) -> float:
        return b


class Shortest(random.Random):
    """Draws the lower end."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Stage:
    """A supervisor and what it and its tasks did, by the clock."""

    def __init__(self, policy: supervision.Policy = POLICY, rng: random.Random | None = None):
        self.given_up: list[str] = []
        self.restarted: list[str] = []
        self.starts: dict[str, list[float]] = {}
        self.faults: dict[str, list[float]] = {}
        self.beats: dict[str, list[float]] = {}
        self.alive: dict[str, int] = {}
        self.release = asyncio.Event()
        self.supervisor = supervision.Supervisor(
            self.given_up.append,
            on_restart=self.restarted.append,
            policy=policy,
            clock=asyncio.get_running_loop().time,
            rng=rng or random.Random(7),
        )

    def add(self, name: str, *faults: tuple[float, Any]) -> None:
        """Add a task that works so many seconds before each fault, and after the last for ever."""
        left = list(faults)

        async def run(progress: supervision.Progress) -> None:
            assert supervision.current_task.get() == name
            self.starts.setdefault(name, []).append(now_s())
            self.alive[name] = self.alive.get(name, 0) + 1
            assert self.alive[name] == 1, "two runs side by side"
            try:
                works_s, fault = left.pop(0) if left else (EVER_S, "return")
                await self._work(name, progress, works_s)
                if not progress.stopping.is_set():
                    self.faults.setdefault(name, []).append(now_s())
                    await self._fail(progress, fault)
            finally:
                self.alive[name] -= 1

        self.supervisor.add(name, run)

    async def _work(self, name: str, progress: supervision.Progress, works_s: float) -> None:
        ends_s = now_s() + works_s
        while (left_s := ends_s - now_s()) > 0 and not progress.stopping.is_set():
            progress.beat()
            self.beats.setdefault(name, []).append(now_s())
            await progress.wait(min(10.0, left_s))

    async def _fail(self, progress: supervision.Progress, fault: Any) -> None:
        match fault:
            case "cancelled":
                raise asyncio.CancelledError
            case "hang":
                progress.lagging(True)
                await asyncio.sleep(EVER_S)
            case "hang and fail":
                progress.lagging(True)
                try:
                    await asyncio.sleep(EVER_S)
                finally:
                    raise RuntimeError("while cleaning up")
            case "cancel":
                asyncio.current_task().cancel()
                await asyncio.sleep(0)
            case "deaf":
                progress.lagging(True)
                while not self.release.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await self.release.wait()
            case _ if callable(fault):
                raise fault()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[supervision.Supervisor]:
        async with anyio.create_task_group() as group:
            self.supervisor.start(group)
            yield self.supervisor
            await self.supervisor.stop()
        self.release.set()

    def state(self, name: str) -> str:
        return self.supervisor.status()[name].state


def as_told() -> Exception:
    return RuntimeError("as told")
