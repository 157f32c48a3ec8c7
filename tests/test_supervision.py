import asyncio
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage import EVER_S, POLICY, SELDOM, Longest, Loop, Shortest, Stage, as_told, now_s, play

from cerberus import errors, supervision


def in_groups() -> BaseException:
    return BaseExceptionGroup("both", [asyncio.CancelledError(), ValueError("x")])


SAID = {
    as_told: "RuntimeError: as told",
    in_groups: "BaseExceptionGroup: both (2 sub-exceptions)",
    "return": "returned, though it should run for ever",
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
            cast(Loop, asyncio.get_running_loop()).clock.now_s += 100.0
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
