"""Consuming stops at a schema break, and continues when an operator says so."""

import asyncio
import os
import subprocess
import sys

import pytest
from pipeline import live, now_ms, payment, running, until, world
from service import ROOT

from cerberus import kafka, partition, window
from cerberus.postgres import lives
from cerberus.stream import upstream

pytestmark = pytest.mark.anyio
PARTITIONS = 3
USERS = range(1000, 1012)


@pytest.fixture
async def here(environ):
    environ |= {"CERBERUS_PARTITIONS": str(PARTITIONS)}
    async with world(environ) as opened:
        opened.environ = environ
        yield opened


async def publish(here, good, bad):
    at = now_ms() - 1_000
    await here.publish(
        [(u, payment((at, u, i), u, at), at) for i in range(good) for u in USERS]
        + [(u, b"not json", at) for _ in range(bad) for u in USERS]
    )


async def resume(here):
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "cerberus", "resume"],
        env=os.environ | here.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def letters(here):
    return sum(map(len, (await here.log(kafka.DEAD_LETTERS)).values()))


async def read_to_the_end(here, *consumers):
    async def done():
        ends = {n: len(records) for n, records in (await here.log()).items()}
        states = [s for c in consumers for s in c.states().items()]
        return (
            live(*consumers, partitions=PARTITIONS)
            and {number: state.offset for number, state in states} == ends
        )

    await until(done, "the log is read to its end")


async def test_a_resume_lets_all_consumers_go_on_and_later_records_are_judged_anew(here):
    await publish(here, 20, 30)
    one, two = here.consumer(), here.consumer()
    async with running(one), running(two):
        await until(lambda: "schema" in one.problems or "schema" in two.problems, "one stops")
        stopped = one if "schema" in one.problems else two
        assert "cerberus resume" in stopped.problems["schema"]
        assert "value: is not JSON" in stopped.problems["schema"]
        assert "resume 1" in await resume(here)
        await read_to_the_end(here, one, two)
        assert not one.problems
        assert not two.problems
        assert await letters(here) == 30 * len(USERS)
        # The writer was not repaired.
        await publish(here, 1, 100)
        await until(lambda: "schema" in one.problems or "schema" in two.problems, "it stops again")
        assert "resume 2" in await resume(here)
        await read_to_the_end(here, one, two)
    assert await letters(here) == 130 * len(USERS)


async def test_a_resume_holds_for_who_starts_later_too(here):
    await publish(here, 1, 100)
    async with running(one := here.consumer()):
        await until(lambda: "schema" in one.problems, "it stops")
        assert not one.states()
    await resume(here)
    async with running(two := here.consumer()):
        await read_to_the_end(here, two)
        assert not two.problems
    assert await letters(here) == 100 * len(USERS)


def test_a_resume_excuses_no_record_of_a_later_life_of_the_topic():
    broken = upstream.Upstream(0.0, 600_000)
    spans = window.Spans()
    resumed = lives.Resumed(1, 7, (10, 10))
    for epoch, excused in ((7, 10), (8, 0)):
        part = partition.Partition(1, spans, partition.Start(epoch=epoch, begin=0, commit=0))
        broken.excuse([part], resumed)
        assert broken._excused[1] == excused
    assert not broken.goes_on(resumed)
    assert broken.goes_on(resumed._replace(number=2))
