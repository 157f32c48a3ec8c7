"""How supervised tasks are stopped: in order, in time, and by whom."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import EVER_S, POLICY, Longest, Stage, now_s, play

from cerberus import errors, supervision

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
        stage.supervisor.start(cast(anyio.abc.TaskGroup, group))
        await asyncio.sleep(50)
        for task in group.tasks:
            task.cancel()
        await asyncio.wait(group.tasks)
        assert all(task.cancelled() for task in group.tasks)
        assert set(stage.alive.values()) == {0}

    play(scene)
