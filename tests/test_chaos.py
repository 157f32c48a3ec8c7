"""Exactness under fire, in a minute; and that the harness sees when a rule is removed."""

import asyncio
import contextlib
import random

import pytest

from chaos import cluster, compare, faults, questions, runs, service, traffic

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]
FAULTS = (
    "kill",
    "redis without power",
    "pause",
    "partition added",
    "postgres killed",
    "kill",
    "redis flushed",
    "log cut",
    "batches swell",
    "broker restarted",
)
# Each removes one rule of the service and nothing else.
REMOVED = {
    "the epoch": """
from cerberus.postgres import lives
async def epoch(self, cluster, topic, partitions, *, ended=None):
    return 1
lives.Lives.epoch = epoch
""",
    "half of the replay": """
import dataclasses
from cerberus.stream import starts
plan = starts.plan_start
def half(log, commit, spans, facts):
    start = plan(log, commit, spans, facts)
    return dataclasses.replace(start, begin=(start.begin + start.commit) // 2)
starts.plan_start = half
""",
    "a clock for each partition": """
from cerberus import window
clock = [0]
observe = window.PartitionWindows.observe
def shared(self, transaction):
    clock[0] = max(clock[0], transaction.event_ms)
    self.frontier_ms = clock[0] - 1
    self.lower_ms = self.frontier_ms - self._keep_ms
    return observe(self, transaction)
window.PartitionWindows.observe = shared
""",
    "the fence": """
from cerberus.online import user_rows
user_rows._WRITE_ROW = "redis.call('HSET', KEYS[1], unpack(ARGV, 5)) return 1"
""",
    "the doubt of a log that begins later": """
import dataclasses
from cerberus.stream import starts
plan = starts.plan_start
def certain(log, commit, spans, facts):
    return dataclasses.replace(plan(log, commit, spans, facts), known_from_ms=0, floor_ms=None)
starts.plan_start = certain
""",
    "the time in an identity": """
from cerberus import transactions, window
full = transactions.id_hash64
transactions.id_hash64 = lambda user_id, name, event_ms: full(user_id, name, 0)
insert = window.UserWindow.insert
def alone(self, event):
    known = event.id_hash64 in self.ids[self._head :]
    return window.Outcome.DUPLICATE if known else insert(self, event)
window.UserWindow.insert = alone
""",
}

# Whoever finds the file "sleep" next, with rows in hand, stops before they are sent.
SLEEPS = """
import os, pathlib, signal, time
from cerberus.online import user_rows
write, sleep = user_rows.OnlineStore.write, pathlib.Path(__file__).with_name("sleep")
async def sleeper(self, rows, trail=None):
    if rows and sleep.exists():
        if len(rows) < 20:
            time.sleep(0.3)  # so that the next batch has more
        else:
            sleep.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
    return await write(self, rows, trail)
user_rows.OnlineStore.write = sleeper
"""


@contextlib.asynccontextmanager
async def opened(servers, environ, directory, *changes, instances=1):
    """Open a cluster whose instances run with changes."""
    app = cluster.APP
    if changes:
        (directory / "changed.py").write_text("\n".join((*changes, "from cerberus.app import app")))
        app = "changed:app"
    setup = cluster.Setup(runs.USERS, instances, app, credit=False)
    async with cluster.opened(servers, environ, directory, setup) as target:
        yield target


async def test_a_minute_under_fire_loses_nothing_and_counts_nothing_twice(
    servers, environ, new_directory
):
    plan = runs.Plan(20_000, FAULTS, reborn=2_000, seed=11)
    async with opened(servers, environ, new_directory(), instances=3) as target:
        told = await runs.run(target, plan, print)
    assert told.differences == []
    assert told.outcomes["exact"] > 100
    assert told.events >= 21_500


async def lives_through(target, *, reborn=False, cut=False):
    """Let one instance process a backlog, kill it, let it process another; then compare.

    Before its second start the log may lose what is older than the middle of the windows.
    """
    [one], rng = target.instances, random.Random(5)
    now = traffic.now_ms()
    one.start()
    for part, (from_ms, until_ms) in enumerate(((100_000, 50_000), (50_000, 0))):
        publisher = traffic.Publisher(target, range(1_000, 1_040), 1_000, rng, f"{part}-")
        await publisher.backlog(now - from_ms, now - until_ms)
        await cluster.until(target.drained, "all is stored", 60)
        one.kill()
        if cut and not target.removed:
            await target.cut_log(50_000 + faults.CUT_MS)
        one.start()
    await cluster.until(target.answer, "it serves again", 60)
    lives = [await compare.read_log(target)]
    if reborn:
        await target.recreate_topic()
        publisher = traffic.Publisher(target, range(1_000, 1_040), 300, rng, "r")
        await publisher.backlog(now, now + 3_000)
        with contextlib.suppress(TimeoutError):  # without epochs its state is refused for ever
            await cluster.until(target.drained, "all is stored", 8)
        lives.append(await compare.read_log(target))
    return (await compare.stores(target, lives)).differences


async def test_the_rules_hold_and_the_comparison_finds_nothing(servers, environ, new_directory):
    async with opened(servers, environ, new_directory()) as target:
        assert await lives_through(target, reborn=True) == []


async def test_where_the_log_was_cut_all_that_is_short_says_so(servers, environ, new_directory):
    async with opened(servers, environ, new_directory()) as target:
        assert await lives_through(target, cut=True) == []


@pytest.mark.parametrize("rule", sorted(REMOVED.keys() - {"the fence"}))
async def test_a_rule_that_is_removed_is_found(servers, environ, new_directory, rule):
    async with opened(servers, environ, new_directory(), REMOVED[rule]) as target:
        cut = rule == "the doubt of a log that begins later"
        assert await lives_through(target, reborn=rule == "the epoch", cut=cut)


async def swells(target):
    """Send batches that unpack to much to one instance; return what was wrong."""
    [one] = target.instances
    one.start()
    await cluster.until(target.live, "the instance owns all", 60)
    publisher = traffic.Publisher(target, range(1_000, 1_400), 0, random.Random(3))
    schedule = faults.Schedule(target, publisher, (), random.Random(3))
    await schedule.swell()
    await cluster.until(target.drained, "all is stored", 60)
    return (
        schedule.unasked
        + (await compare.stores(target, [await compare.read_log(target)])).differences
    )


async def test_batches_that_swell_take_bounded_memory(servers, environ, new_directory):
    async with opened(servers, environ, new_directory()) as target:
        assert await swells(target) == []


async def test_batches_that_swell_without_a_bound_are_found(servers, environ, new_directory):
    unbounded = """
from cerberus import fetching
async def as_it_is(self, request, response):
    pass
fetching.Fetches._bound = as_it_is
"""
    async with opened(servers, environ, new_directory(), unbounded) as target:
        assert any("bytes for what swells" in line for line in await swells(target))


async def zombie_comes_back(target, sleep, *, sessions):
    """Stop an owner before a write, for some sessions, while another takes over; look at each row.

    Returns what was wrong: rows that are not the oracle's at their fence or older than one shown
    before, and what is wrong in the stores once all is over.
    """
    users = range(1_000, 1_400)
    one, two = target.instances
    one.start()
    await cluster.until(target.live, "the first instance owns all", 60)
    publisher = traffic.Publisher(target, users, 100_000, random.Random(3))
    publisher.rate = 400.0
    seen, wrong = {}, []

    async def look():
        newest = {}
        while True:
            for row in await target.online.read(users, 0, 5.0):
                if row.recent is None:
                    continue
                fence = row.recent.fence
                if newest.setdefault(row.user_id, fence) > fence:
                    wrong.append(f"{row.user_id}: {fence} after {newest[row.user_id]}")
                newest[row.user_id] = max(fence, newest[row.user_id])
                seen[row.user_id, fence] = row.recent
            await asyncio.sleep(0.1)

    async with runs.beside(publisher.run()), runs.beside(look()):
        await asyncio.sleep(2)
        sleep.touch()
        await cluster.until(lambda: not sleep.exists(), "the first instance sleeps", 10)
        two.start()
        stopped_s = traffic.now_ms() / 1000
        await cluster.until(lambda: target.live(stopped_s), "the other has taken over", 60)
        slept_s = traffic.now_ms() / 1000 - stopped_s
        await asyncio.sleep(max(0, sessions * cluster.SESSION_S - slept_s))
        one.resume()
        await asyncio.sleep(4)
        publisher.total = publisher.sent
        await cluster.until(target.drained, "all is stored", 60)
        await asyncio.sleep(1)
    log = await compare.read_log(target)
    for (user_id, fence), recent in seen.items():
        (expected, _), got = compare.packed(log[recent.partition], user_id, recent)
        if expected != got:
            wrong.append(f"{user_id} at {fence}: expected {expected}, found {got}")
    assert len(seen) > 1_000
    one.kill()
    two.kill()
    two.start()  # from the commits alone: what they pass over would be missing
    await cluster.until(target.drained, "all is stored", 60)
    return wrong + (await compare.stores(target, [log])).differences


async def test_a_zombie_shows_nothing_wrong_and_loses_nothing(servers, environ, new_directory):
    directory = new_directory()
    async with opened(servers, environ, directory, SLEEPS, instances=2) as target:
        assert await zombie_comes_back(target, directory / "sleep", sessions=3) == []


async def test_a_zombie_without_a_fence_is_found(servers, environ, new_directory):
    directory = new_directory()
    changes = REMOVED["the fence"], SLEEPS
    async with opened(servers, environ, directory, *changes, instances=2) as target:
        wrong = await zombie_comes_back(target, directory / "sleep", sessions=2)
    assert any("after" in line for line in wrong)


# Each removes one rule that holds where a server or a clock is not what it seems.
LEFT = """
from cerberus.online import pool
async def stay(client):
    pass
pool._renew = stay
"""
TRUSTED = """
from cerberus.features import evaluation
from cerberus.online import partition_states
evaluation.AHEAD_MS = 10**12
partition_states.PartitionStates._aged = lambda self, number, state, now_ms: state
"""


async def handed_over(target, within_s):
    """Fail Redis over under one instance; return whether it recovers within some seconds."""
    target.instances[0].start()
    await cluster.until(target.live, "it owns all", 60)
    users = range(1_000, 1_040)
    publisher = traffic.Publisher(target, users, 100_000, random.Random(3))
    publisher.rate = 100.0
    async with runs.beside(publisher.run()):
        await asyncio.sleep(2)
        await target.pair.hand_over(back=False)
        over_s = traffic.now_ms() / 1000
        with contextlib.suppress(TimeoutError):
            await cluster.until(lambda: target.live(over_s + 1), "it is live again", within_s)
            return True
    return False


async def test_a_redis_that_hands_over_is_left_at_once(servers, environ, new_directory):
    async with opened(servers, environ, new_directory()) as target:
        assert await handed_over(target, 10)


async def test_who_stays_with_a_replica_is_found(servers, environ, new_directory):
    async with opened(servers, environ, new_directory(), LEFT) as target:
        assert not await handed_over(target, 20)


async def owned_by_a_clock_ahead(target):
    """Ask a reader what it says after an owner with a fast clock has ended."""
    ahead, reader = target.instances
    reader._environ = {**reader._environ, "CERBERUS_TASKS": "api"}
    ahead.start(service.AHEAD)
    reader.start()

    async def both():
        states = await target.online.states()
        late_ms = traffic.now_ms() + 1_800_000
        owned = len(states) == cluster.PARTITIONS
        return owned and all(s.caught_up_ms > late_ms for s in states.values())

    await cluster.until(both, "the one with the clock ahead owns all", 60)
    await cluster.until(target.answer, "both answer", 60)
    rng, users, began_s = random.Random(5), range(1_000, 1_040), traffic.now_ms() / 1000
    publisher = traffic.Publisher(target, users, 100_000, rng)
    publisher.rate = 200.0
    asker = questions.Asker(target, users, rng, publisher)
    async with runs.beside(publisher.run()), runs.beside(asker.run()):
        await asyncio.sleep(2)
        ahead.kill()
        await asyncio.sleep(2 * questions.UNSEEN_S)
    life = questions.Life(await compare.read_log(target), publisher.acked_s, 2**62, began_s)
    asked = [answer for answer in asker.answers if answer.instance is reader]
    sure = [answer for answer in asked if answer.status == 200 and not answer.degraded]
    return sure, *questions.answers(target, asked, [life])


async def test_rows_of_an_owner_with_a_clock_ahead_are_doubted(servers, environ, new_directory):
    async with opened(servers, environ, new_directory(), instances=2) as target:
        sure, outcomes, found = await owned_by_a_clock_ahead(target)
    assert found.differences == []
    assert outcomes["degraded: clock_ahead"] > 20
    assert outcomes["degraded: stale"] > 20
    assert all(answer.body["replayed"] for answer in sure)  # what the stream had decided


async def test_who_trusts_a_clock_that_is_ahead_is_found(servers, environ, new_directory):
    async with opened(servers, environ, new_directory(), TRUSTED, instances=2) as target:
        *_, found = await owned_by_a_clock_ahead(target)
    assert found.differences
