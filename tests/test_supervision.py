import asyncio
import contextlib
import dataclasses
import functools
import itertools
import random
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerberus import errors, supervision

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


def in_groups() -> BaseException:
    return BaseExceptionGroup("both", [asyncio.CancelledError(), ValueError("x")])


SAID = {
    as_told: "RuntimeError: as told",
    in_groups: "BaseExceptionGroup: both (2 sub-exceptions)",
    "return": "returned, though it is eternal",
    "cancel": "was cancelled, though not by its supervisor",
    "cancelled": "was cancelled, though not by its supervisor",
    "hang": "made no progress for 30 s",
    "hang and fail": "made no progress for 30 s",
}
scripts = st.lists(st.tuples(st.floats(0, 90), st.sampled_from(list(SAID))), max_size=5)


@given(st.lists(scripts, min_size=1, max_size=3), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_some_tasks_do_all_are_kept_alive(plays, seed):
    async def scene() -> None:
        stage = Stage(SELDOM, random.Random(seed))
        for number, script in enumerate(plays):
            stage.add(str(number), *script)
        stage.add("bystander")
        async with stage.running() as supervisor:
            await asyncio.sleep(1000)
            for number, script in enumerate(plays):
                status = supervisor.status()[str(number)]
                assert (status.state, status.restarts) == ("running", len(script))
                assert status.sound
                assert status.last_error == (SAID[script[-1][1]] if script else None)
            assert stage.restarted.count("0") == len(plays[0])
        beats = stage.beats["bystander"]
        assert max(b - a for a, b in itertools.pairwise(beats)) <= 10.0
        assert not stage.given_up
        assert {s.state for s in supervisor.status().values()} == {"stopped"}
        assert set(stage.alive.values()) == {0}

    play(scene)


@given(st.lists(st.floats(0, 250), max_size=12), st.sampled_from([as_told, "return", "cancel"]))
@settings(max_examples=80, deadline=None)
def test_the_sixth_fault_within_ten_minutes_is_given_up_on_and_no_other(lives_s, word):
    async def scene() -> None:
        stage = Stage(SELDOM)
        stage.add("task", *((life_s, word) for life_s in lives_s))
        stage.add("bystander")
        async with stage.running():
            await asyncio.sleep(4000)
            faults = stage.faults.get("task", [])
            too_many = [
                index
                for index, at_s in enumerate(faults)
                if sum(at_s - 600 < other_s <= at_s for other_s in faults[: index + 1]) > 5
            ]
            assert too_many == ([len(faults) - 1] if stage.given_up else [])
            assert len(stage.given_up) == bool(too_many)
            assert stage.state("task") == ("failed" if too_many else "running")
            assert stage.state("bystander") == "running"
            assert stage.beats["bystander"][-1] > now_s() - 11

    play(scene)


def waits(
    faults: list[tuple[float, Any]], rng: random.Random, for_s: float = 1000.0
) -> list[float]:
    async def scene() -> list[float]:
        stage = Stage(rng=rng)
        stage.add("task", *faults)
        async with stage.running():
            await asyncio.sleep(for_s)
        after = stage.starts["task"][1:]
        return [b - a for a, b in zip(stage.faults["task"], after, strict=False)]

    return play(scene)


def test_the_longest_waits_double():
    faults = [(1.0, as_told)] * 5
    assert waits(faults, Longest()) == pytest.approx([0.5, 1, 2, 4, 8])


def test_the_shortest_wait_is_none():
    assert waits([(1.0, as_told)] * 5, Shortest()) == [0.0] * 5


def test_a_minute_of_health_brings_the_first_wait_back():
    lives_s = [1, 59.9, 60.1, 1, 61]
    found = waits([(life_s, as_told) for life_s in lives_s], Longest())
    assert found == pytest.approx([0.5, 1, 0.5, 1, 0.5])


def test_silence_does_not_count_as_health():
    async def scene() -> None:
        stage = Stage(rng=Longest())
        stage.add("task", (1, as_told), (1, as_told), (40, "hang"))
        async with stage.running():
            await asyncio.sleep(200)
        start_s, fault_s = stage.starts["task"][-1], stage.faults["task"][-1]
        assert start_s - fault_s >= 30 + 2

    play(scene)


def test_a_store_that_is_away_is_waited_out_for_ever():
    def away() -> Exception:
        return ExceptionGroup("both", [errors.StoreUnavailable(), errors.FeaturesUnavailable()])

    faults = [(0.0, errors.StoreUnavailable), (0.0, away)] * 550
    found = waits(faults, Longest(), 34_000.0)
    assert found[:8] == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30])
    assert len(found) == 1100
    assert max(found) == pytest.approx(30)


@pytest.mark.parametrize(
    "fault",
    [
        errors.ConfigError,
        errors.ModelMismatch,
        ModuleNotFoundError,
        SystemExit,
        KeyboardInterrupt,
        functools.partial(
            ExceptionGroup, "a", [ExceptionGroup("b", [ValueError(), errors.ModelMismatch()])]
        ),
    ],
    ids=lambda fault: getattr(fault, "__name__", "in groups"),
)
def test_what_a_restart_cannot_mend_is_given_up_on_at_once_and_once(fault):
    async def scene() -> None:
        stage = Stage()
        stage.add("task", (1, fault))
        stage.add("other", (2, fault))
        stage.add("bystander")
        async with stage.running() as supervisor:
            await asyncio.sleep(100)
            assert len(stage.starts["task"]) == 1
            assert [text.partition(":")[0] for text in stage.given_up] == ["task"]
            assert supervisor.gave_up == stage.given_up[0]
            assert not supervisor.status()["task"].sound
            assert stage.beats["bystander"][-1] > now_s() - 11
        assert stage.state("task") == "failed"

    play(scene)


def test_an_error_beside_an_absent_store_counts():
    async def scene() -> None:
        stage = Stage()
        causes = [errors.StoreUnavailable(), ValueError("x")]
        stage.add("task", *[(1, functools.partial(ExceptionGroup, "both", causes))] * 6)
        async with stage.running():
            await asyncio.sleep(100)
        assert len(stage.given_up) == 1

    play(scene)


def silence(policy: supervision.Policy, run: Callable[[supervision.Progress], Any]) -> list[float]:
    """Return when the runs of a task started, after its beginning, in 500 s."""

    async def scene() -> list[float]:
        starts: list[float] = []

        async def kept(progress: supervision.Progress) -> None:
            starts.append(now_s())
            if len(starts) == 1:
                await run(progress)
            await progress.stopping.wait()

        stage = Stage(policy, Shortest())
        stage.supervisor.add("task", kept)
        async with stage.running():
            await asyncio.sleep(500)
        return [start_s - starts[0] for start_s in starts]

    return play(scene)


def test_silence_without_work_is_no_fault():
    async def run(progress: supervision.Progress) -> None:
        progress.lagging(True)
        await asyncio.sleep(29)
        progress.lagging(False)
        await asyncio.sleep(300)

    assert silence(POLICY, run) == [0]


def test_work_that_comes_late_has_the_whole_time():
    async def run(progress: supervision.Progress) -> None:
        await asyncio.sleep(100)
        progress.lagging(True)
        await asyncio.sleep(EVER_S)

    assert silence(POLICY, run)[1] == pytest.approx(131, abs=1)


def test_progress_gives_the_whole_time_again():
    async def run(progress: supervision.Progress) -> None:
        for _ in range(5):
            progress.lagging(True)
            await asyncio.sleep(29)
            progress.beat()
        await asyncio.sleep(EVER_S)

    assert silence(POLICY, run)[1] == pytest.approx(5 * 29 + 31, abs=1)


def test_a_process_that_stood_still_is_no_task_s_fault():
    async def run(progress: supervision.Progress) -> None:
        progress.lagging(True)
        for _ in range(5):
            asyncio.get_running_loop().clock.now_s += 100.0
            await asyncio.sleep(20)
            progress.beat()
        progress.lagging(False)

    assert silence(POLICY, run) == [0]


def test_a_stalled_task_may_clean_up_before_it_is_started_anew():
    cleaned: list[float] = []

    async def run(progress: supervision.Progress) -> None:
        progress.lagging(True)
        try:
            await asyncio.sleep(EVER_S)
        finally:
            await asyncio.sleep(10)
            cleaned.append(now_s())

    assert silence(POLICY, run)[1] == pytest.approx(41, abs=1)
    assert cleaned


def test_a_task_that_swallows_its_cancellation_is_given_up_on_and_not_doubled():
    async def scene() -> None:
        stage = Stage()
        stage.add("task", (1, "deaf"))
        async with stage.running():
            await asyncio.sleep(500)
            assert stage.state("task") == "failed"
        assert stage.given_up == [
            "task: made no progress for 30 s and ignored its cancellation",
        ]

    play(scene)


def test_a_restarted_task_is_sound_once_it_has_made_progress_or_lasted():
    async def scene() -> None:
        stage = Stage(rng=Longest())
        runs = 0

        async def run(progress: supervision.Progress) -> None:
            nonlocal runs
            runs += 1
            await asyncio.sleep(10)
            if runs == 1:
                raise RuntimeError
            if runs == 2:
                progress.beat()
                await asyncio.sleep(10)
                raise RuntimeError
            await progress.stopping.wait()

        stage.supervisor.add("task", run)
        async with stage.running() as supervisor:
            seen = []
            for at_s in (5, 10.25, 15, 21, 35, 95):
                await asyncio.sleep(1000 + at_s - now_s())
                status = supervisor.status()["task"]
                seen.append((status.state, status.sound))
            assert seen == [
                ("running", True),
                ("backing_off", False),
                ("running", False),
                ("running", True),
                ("running", False),
                ("running", True),
            ]

    play(scene)


endings = st.one_of(
    st.floats(0, 30),
    st.sampled_from(["cut", "deaf", "raise", "backing off", "cleaning up"]),
)


@given(st.lists(endings, min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_a_stop_keeps_its_order_and_its_time_whatever_the_tasks_do(plan, seed):
    order = [str(number) for number in range(len(plan))]
    random.Random(seed).shuffle(order)

    async def scene() -> None:
        stage = Stage(rng=Longest())
        told: list[str] = []
        over: dict[str, float] = {}

        def ending(name: str, how: Any) -> Callable[[supervision.Progress], Awaitable[None]]:
            async def run(progress: supervision.Progress) -> None:
                if how == "backing off":
                    raise errors.StoreUnavailable
                if how == "cleaning up":
                    progress.lagging(True)
                    try:
                        await asyncio.sleep(EVER_S)
                    finally:
                        await asyncio.sleep(14)
                await progress.stopping.wait()
                told.append(name)
                match how:
                    case float():
                        await asyncio.sleep(how)
                    case "cut":
                        try:
                            await asyncio.sleep(EVER_S)
                        finally:
                            await asyncio.sleep(1)
                            over[name] = now_s()
                    case "deaf":
                        await stage._fail(progress, "deaf")
                    case "raise":
                        raise errors.ConfigError
                over[name] = now_s()

            return run

        for number, how in enumerate(plan):
            stage.supervisor.add(str(number), ending(str(number), how))
        foreign = asyncio.create_task(asyncio.sleep(EVER_S))
        async with anyio.create_task_group() as group:
            stage.supervisor.start(group)
            # In the midst of a wait, and of the clean-up of a stalled task.
            await asyncio.sleep(32.5 if "cleaning up" in plan else 1.0)
            started_s = now_s()
            await asyncio.gather(stage.supervisor.stop(order), stage.supervisor.stop(order))
            took_s = now_s() - started_s
        assert took_s <= POLICY.stop_s + 1e-6
        deaf = ("backing off", "cleaning up")
        assert told == [name for name in order if plan[int(name)] not in deaf]
        if all(isinstance(how, float) and how < 1 for how in plan):
            assert took_s == pytest.approx(sum(plan))
        if plan == ["backing off"]:
            assert took_s == 0
        if "cut" in plan:
            assert str(plan.index("cut")) in over
        assert not foreign.done()
        assert {s.state for s in stage.supervisor.status().values()} <= {"stopped", "failed"}
        assert not stage.given_up
        foreign.cancel()
        stage.release.set()

    play(scene)


def test_who_is_not_named_stops_last_and_has_all_the_time_that_is_left():
    async def scene() -> None:
        stage = Stage()
        stopped = []

        async def slow(progress: supervision.Progress) -> None:
            await progress.stopping.wait()
            await asyncio.sleep(POLICY.stop_s - POLICY.cut_s - 1)
            stopped.append("slow")

        stage.supervisor.add("slow", slow)
        stage.add("nimble")
        stage.add("quick")
        async with anyio.create_task_group() as group:
            stage.supervisor.start(group)
            await asyncio.sleep(1)
            await stage.supervisor.stop(["absent", "quick", "nimble"])
        assert stopped == ["slow"]

    play(scene)


def test_a_stop_comes_before_the_first_statement_and_without_a_start_too():
    async def scene() -> None:
        stage = Stage()
        stage.add("task")
        await stage.supervisor.stop()
        async with anyio.create_task_group() as group:
            stage.supervisor.start(group)
            await stage.supervisor.stop()
        assert stage.starts == {}
        assert stage.state("task") == "stopped"

    play(scene)


@pytest.mark.parametrize("fault", [None, "deaf"])
def test_a_cancellation_of_the_group_ends_the_tasks_and_goes_on_outwards(fault):
    async def scene() -> None:
        stage = Stage()
        cleaned = []

        async def run(progress: supervision.Progress) -> None:
            try:
                await asyncio.sleep(EVER_S)
            finally:
                await asyncio.sleep(1)
                cleaned.append("run")

        stage.supervisor.add("task", run)
        stage.add("other", *([(1.0, fault)] if fault else []))

        async def life() -> None:
            async with anyio.create_task_group() as group:
                stage.supervisor.start(group)
                await asyncio.sleep(EVER_S)

        living = asyncio.create_task(life())
        await asyncio.sleep(5)
        living.cancel()
        started_s = now_s()
        with pytest.raises(asyncio.CancelledError):
            await living
        assert cleaned == ["run"]
        assert now_s() - started_s <= POLICY.cut_s + 1e-6
        assert stage.state("task") == "stopped"
        assert not stage.given_up
        stage.release.set()

    play(scene)


class Loose:
    """Takes tasks as a group does, and leaves them to be cancelled one by one."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def start_soon(self, run: Callable[..., Any], *args: Any, name: str) -> None:
        self.tasks.append(asyncio.create_task(run(*args), name=name))


def test_a_cancellation_from_outside_is_not_swallowed():
    async def scene() -> None:
        stage, group = Stage(), Loose()
        stage.add("works")
        stage.add("waits", *[(0.0, errors.StoreUnavailable)] * 100)
        stage.supervisor.start(group)
        await asyncio.sleep(50)
        for task in group.tasks:
            task.cancel()
        await asyncio.wait(group.tasks)
        assert all(task.cancelled() for task in group.tasks)
        assert set(stage.alive.values()) == {0}

    play(scene)


def test_hooks_that_fail_hurt_nobody():
    async def scene() -> None:
        stage = Stage()

        def broken(text: str) -> None:
            raise RuntimeError(text)

        stage.supervisor = supervision.Supervisor(
            broken, on_restart=broken, clock=asyncio.get_running_loop().time
        )
        stage.add("task", (1, as_told), (1, errors.ConfigError))
        stage.add("bystander")
        async with stage.running() as supervisor:
            await asyncio.sleep(100)
            assert supervisor.gave_up is not None
            assert stage.state("bystander") == "running"

    play(scene)


def test_a_name_is_given_once():
    async def scene() -> None:
        stage = Stage()
        stage.add("task")
        with pytest.raises(ValueError, match="task"):
            stage.add("task")

    play(scene)
