"""Faults of the log that were found under fire, each in its smallest form."""

import asyncio
import dataclasses
import functools
import random
import signal

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from asking import client
from changes import changed
from faults import (
    PARTITIONS,
    USERS,
    admin_of,
    assert_rows_equal_the_log,
    cluster_of,
    commit,
    commits,
    drained,
    remake_topic,
    set_topic,
    stored,
)
from pipeline import live, now_ms, payment, running, until, world
from service import service

from cerberus import kafka, settings, transactions, window
from cerberus.features import evaluation, fences
from cerberus.stream import starts
from chaos import cluster

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": str(PARTITIONS)}) as opened:
        yield opened


async def test_a_partition_that_is_added_is_read_at_once_and_leaves_no_short_window(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    bootstrap = here.config.kafka.bootstrap
    async with running(one := here.consumer()):
        await drained(here, one)
        async with admin_of(here) as admin:
            await admin.create_partitions({name: NewPartitions(PARTITIONS + 1)})
        async with AIOKafkaProducer(bootstrap_servers=bootstrap) as informed:
            for user in USERS:
                value = payment(f"{user}b", user, at + 1)
                await informed.send_and_wait(
                    name, value, key=transactions.key(user), timestamp_ms=at + 1
                )
        await drained(here, one, PARTITIONS + 1)
        homes = [{u: transactions.partition_of(u, PARTITIONS + n) for u in USERS} for n in (0, 1)]
        for user in USERS:
            row = await here.read(user, now_ms())
            if homes[0][user] == homes[1][user]:
                assert (row.degraded, row.stats[0].count) == ((), 2)
            else:
                assert "warming" in row.degraded
                assert row.stats[0].count == 1  # the former home's row is not in the way
        # Once nothing of before is inside the window, its users are whole again.
        later = now_ms() + 670_000
        for user in USERS:
            [found] = await here.online.read([user], now_ms(), 1.0)
            row = evaluation.as_of(
                found, later, None, now_ms=now_ms(), rules=evaluation.Rules(here.spans, 60_000)
            )
            assert row.degraded == ()


async def test_what_was_told_first_stands_also_when_the_epoch_rises_in_between(here):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    homes = [(u, *(transactions.partition_of(u, PARTITIONS + n) for n in (0, 1))) for u in USERS]
    user, place = next((u, old) for u, old, new in homes if old == new)
    at = now_ms() - 60_000
    await here.publish([(user, payment("a", user, at, 10.0), at)])
    async with running(one := here.consumer()):
        await drained(here, one)
        async with admin_of(here) as admin:
            await admin.create_partitions({name: NewPartitions(PARTITIONS + 1)})
        await until(lambda: live(one, partitions=PARTITIONS + 1), "the new partition is read")
        await here.publish([(user, payment("a", user, at, 99.0), at)], partition=place)
        await until(lambda: one.counts["conflict"], "the other amount is seen")
        await stored(here)
    assert await here.pool.fetchval("SELECT amount_minor FROM transactions") == 1_000


async def test_while_there_are_more_partitions_than_are_read_nobody_is_at_the_end(
    here, monkeypatch
):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        known = await here.certain(1000, at)
        # Members of a group learn of a new partition one after the other.
        with monkeypatch.context() as one_knows_more:
            one_knows_more.setattr(one._client, "partitions_for_topic", lambda _: {0, 1, 2, 3})

            async def stale():
                return (found := await here.read(1000, at)).degraded and found

            told = await until(stale, "the answers are doubted")
            assert (told.degraded, told.stats) == (("stale",), known.stats)
            assert {s.state for s in one.states().values()} == {"live"}
        assert (await here.certain(1000, at)).stats == known.stats


async def test_events_outside_the_home_are_doubted_whichever_came_first(here):
    at = now_ms() - 5_000
    async with running(one := here.consumer()):
        await drained(here, one)
        for user in USERS[:6]:
            home = transactions.partition_of(user, PARTITIONS)
            places = [home, (home + 1) % PARTITIONS][:: 1 if user % 2 else -1]
            for i, place in enumerate(places):
                await here.publish([(user, payment(i, user, at + i), at + i)], partition=place)
                await asyncio.sleep(0.3)
        await drained(here, one)
        for user in USERS[:6]:
            row = await here.read(user, now_ms())
            assert row.degraded == ("split_user",)
            assert row.fence is not None
        assert one.counts["split_user"] == 6


async def split_said(here):
    """Return whether a process that consumes nothing reports split users."""
    async with client(here.app(here.decision_log())) as http:
        reasons = (await http.get("/health")).json()["reasons"]
    return any("users of another" in reason for reason in reasons)


@pytest.mark.parametrize("told", ["by the replay", "by the former owner"])
async def test_health_says_after_a_restart_too_that_a_user_is_split(here, told):
    at = now_ms()
    away = (transactions.partition_of(1000, PARTITIONS) + 1) % PARTITIONS
    other = next(u for u in USERS if transactions.partition_of(u, PARTITIONS) == away)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert not await split_said(here)
        before = at - 300_000  # further back than the second replay reaches
        await here.publish([(1000, payment(1, 1000, before), before)], partition=away)
        await here.publish([(other, payment(2, other, at), at)])
        await drained(here, one)
        await stored(here)
        await until(lambda: split_said(here), "it is said", 10)
    if told == "by the replay":
        await here.redis.flushdb()
    else:
        here.config = changed(here.config, replay_span_ms=1)
    async with running(two := here.consumer()):
        await drained(here, two)
        assert not two.counts["split_user"]
        await until(lambda: split_said(here), "it is said", 10)


async def test_an_owner_of_fewer_partitions_says_nothing_of_how_many_there_are(here):
    def state(epoch):
        return fences.PartitionState(epoch, 5, "live", now_ms())

    await here.online.write_states(4, {0: state(2), 3: state(2)}, create=True)
    await here.online.write_states(3, {0: state(1)}, create=True)
    assert (await here.online.states()).keys() == {0, 3}
    await here.online.write_states(2, {0: state(3)}, create=True)
    assert (await here.online.states()).keys() == {0}  # what 3 said is of a former life


async def test_an_owner_that_is_behind_says_nothing_of_its_partition(here):
    for offset, state in ((5, "live"), (4, "replaying")):
        told = fences.PartitionState(1, offset, state, now_ms())
        await here.online.write_states(1, {0: told}, create=True)
    assert (await here.online.states())[0].state == "live"


@pytest.mark.parametrize("running_meanwhile", [True, False])
async def test_a_topic_made_anew_is_read_from_its_start_also_past_the_old_commit(
    here, running_meanwhile
):
    at = now_ms() - 5_000
    await here.publish([(u, payment(i, u, at), at) for u in USERS for i in range(2)])
    one = here.consumer()
    async with running(one):
        await drained(here, one)
        if running_meanwhile:
            await remake_topic(here)
            await here.publish(
                [(u, payment(f"n{i}", u, at + 9), at + 9) for u in USERS for i in range(5)]
            )
            await drained(here, one)
            await assert_rows_equal_the_log(here)
            return
    old = await commits(here)
    await remake_topic(here)
    await here.publish([(u, payment(f"n{i}", u, at + 9), at + 9) for u in USERS for i in range(5)])
    # As an owner that has not noticed would.
    await commit(here, old)
    async with running(two := here.consumer()):
        await drained(here, two)
        await assert_rows_equal_the_log(here)
    stored = "SELECT count(*) FROM transactions WHERE transaction_id LIKE 'tn%'"
    assert await here.pool.fetchval(stored) == 5 * len(USERS)


async def test_the_first_commit_of_a_log_that_was_empty_names_its_first_record(here):
    async with running(one := here.consumer()):
        await until(lambda: live(one, partitions=PARTITIONS), "the empty log is read to its end")
        at = now_ms() - 5_000
        await here.publish([(u, payment(1, u, at), at) for u in USERS])
        await stored(here)
    cluster_id = await cluster_of(here)
    for offset, metadata in (await commits(here)).values():
        found = starts.Commit.read(offset, metadata, cluster_id)
        assert found.first == (0, at)


async def test_commits_are_written_in_the_version_that_all_owners_read(here):
    here.online._partitions.versions._patience_s = 0.0
    written = []
    for version in (0, 1):
        async with running(one := here.consumer()):
            await drained(here, one)
            if version == 0:  # what an owner of an earlier release tells, behind any of ours
                key, number = here.online._partitions.key, f"{PARTITIONS - 1}"
                told = fences.PartitionState.unpack(await here.redis.hget(key, number))
                early = dataclasses.replace(told, epoch=told.epoch + 1, version=0)
                await here.redis.hset(key, number, early.pack())
                await until(lambda: here.online.spoken == 0, "an owner is known to read less")
            else:
                await until(lambda: here.online.spoken == 1, "all owners are known to read it")
            at = now_ms() - 5_000
            await here.publish([(u, payment(f"{version}", u, at), at) for u in USERS])
            await drained(here, one)
        written.append([metadata for _, metadata in (await commits(here)).values()])
        await here.redis.delete(here.online._partitions.key)
    assert not any(metadata.startswith("{") for metadata in written[0])
    assert all(metadata.startswith('{"version":1,') for metadata in written[1])


async def test_a_first_record_that_its_writer_took_back_begins_no_other_life(here):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    bootstrap = here.config.kafka.bootstrap
    async with (
        AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=name) as writer,
        running(one := here.consumer()),
    ):
        await until(lambda: live(one, partitions=PARTITIONS), "the empty log is read to its end")
        before = {state.epoch for state in one.states().values()}
        marking = one._liveness._marking
        await until(lambda: one._liveness._marking is not marking, "the log is asked for its end")
        await until(lambda: one._liveness._marking.done(), "it has answered")
        at = now_ms() - 5_000
        for i, end in enumerate((writer.abort_transaction, writer.commit_transaction)):
            await writer.begin_transaction()
            value = payment(i, 1000, at + i)
            await writer.send_and_wait(name, value, partition=0, timestamp_ms=at + i)
            await end()
        await until(lambda: one.counts["accepted"] == 1, "what was kept is read")
        await asyncio.sleep(2.5)  # the log is asked for its end each second
        await drained(here, one)
        assert {state.epoch for state in one.states().values()} == before
        assert one.counts["accepted"] == 1


async def test_a_topic_made_anew_while_its_owner_is_frozen_is_read_from_its_start(environ, here):
    at = now_ms() - 5_000
    quiet = {"CERBERUS_RATE": "0", "CERBERUS_SESSION_TIMEOUT_S": "30", "CERBERUS_PARTITIONS": "3"}
    with service(environ | quiet) as owner:
        await asyncio.to_thread(owner.wait_until_ready)
        await here.publish([(u, payment(1, u, at), at) for u in USERS])
        counted = [here.certain(user, at) for user in USERS]
        await asyncio.gather(*counted)
        before = await here.online.states()
        owner.process.send_signal(signal.SIGSTOP)
        try:
            await remake_topic(here)
            new = [(u, payment(f"n{i}", u, at + 9), at + 9) for u in USERS for i in range(3)]
            await here.publish(new)
        finally:
            owner.process.send_signal(signal.SIGCONT)

        async def read():
            ends = {n: records[-1].offset + 1 for n, records in (await here.log()).items()}
            told = await here.online.states()
            return all(
                told[n].epoch > before[n].epoch
                and told[n].state == "live"
                and told[n].offset >= ends[n]
                for n in ends
            )

        await until(read, "the new topic is read")
        await assert_rows_equal_the_log(here)


async def test_a_partition_that_begins_anew_leaves_the_long_windows_of_others(environ, tmp_path):
    environ |= {
        "CERBERUS_SPANS": "1m,20m",
        "CERBERUS_REPLAY_SPAN_S": "60",
        "CERBERUS_PARTITIONS": "2",
        "CERBERUS_MODEL": str(tmp_path / "fraud_model.json"),
    }
    config = settings.load(environ)
    cluster.pin_model(config, window.Spans(config.windows.spans))
    start = now_ms() - 900_000
    async with world(environ) as here:
        places = [(USERS[i % 12], start + i * 5_000) for i in range(170)]
        await here.publish([(u, payment(i, u, at), at) for i, (u, at) in enumerate(places)])
        async with running(one := here.consumer()):
            await drained(here, one, 2)
        offset, metadata = (await commits(here, 2))[0]
        cluster_id = await cluster_of(here)
        found = starts.Commit.read(offset, metadata, cluster_id)
        assert found.first is not None
        other = dataclasses.replace(found, first=(found.first[0], found.first[1] + 1))
        await commit(here, {0: (offset, other.metadata(cluster_id))})
        async with running(two := here.consumer()):
            await drained(here, two, 2)
            assert two.states()[0].epoch > two.states()[1].epoch
            oracles = await here.oracles()
            for user in USERS:
                told = oracles[transactions.partition_of(user, 2)]
                row = await here.certain(user, told.frontier)
                assert row.stats[1].count == told.stats(user, told.frontier)[0]


async def test_a_coordinator_that_still_loads_is_asked_again(here, monkeypatch):
    at = now_ms() - 5_000
    await here.publish([(u, payment(1, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        epochs = {state.epoch for state in one.states().values()}
    ask, asked = AIOKafkaAdminClient.list_consumer_group_offsets, []

    async def loading(self, *arguments, **named):
        # Seen of a 4.3.1 broker just after its start.
        asked.append(1)
        return {} if len(asked) < 3 else await ask(self, *arguments, **named)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", loading)
    async with running(two := here.consumer()):
        await drained(here, two)
        assert {state.epoch for state in two.states().values()} == epochs
        assert two.counts["accepted"] == 0
    assert len(asked) >= 3


async def test_what_retention_took_from_under_a_waiting_owner_is_said_to_miss(here, servers):
    at, user = now_ms() - 5_000, 1000
    place = TopicPartition(
        here.config.kafka.topic(kafka.TRANSACTIONS), transactions.partition_of(user, PARTITIONS)
    )
    async with running(one := here.consumer()):
        await drained(here, one)
        servers.redis.kill(signal.SIGSTOP)
        try:
            await here.publish([(user, payment(i, user, at + i), at + i) for i in range(3_000)])
            await until(lambda: "store" in one.problems, "the trouble is said")
            async with admin_of(here) as admin:
                await admin.delete_records({place: RecordsToDelete(2_900)})
        finally:
            servers.redis.kill(signal.SIGCONT)
        await drained(here, one)
        row = await here.read(user, now_ms())
        assert "warming" in row.degraded


async def test_a_replay_without_longer_windows_asks_postgres_nothing(here, monkeypatch):
    rng = random.Random(1)
    start = now_ms() - 1_000_000
    records = [(rng.choice(USERS), start + i * 10_000) for i in range(99)]
    await here.publish([(u, payment(i, u, at), at) for i, (u, at) in enumerate(records)])
    async with running(one := here.consumer()):
        await drained(here, one)
    seeds = []
    monkeypatch.setattr(type(here.postgres.facts), "seed", lambda *_: seeds.append(1))
    async with running(two := here.consumer()):
        await drained(here, two)
    assert two.counts["replayed"] > 0
    assert seeds == []


async def test_a_log_or_a_store_that_may_lose_what_a_window_needs_is_advised_against(here):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    await set_topic(here, name, "retention.ms", "60000")
    await here.redis.config_set("maxmemory", "1gb")
    await here.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        async with running(one := here.consumer()):
            await drained(here, one)
            assert "set retention.ms" in one.problems["retention"]
            assert "noeviction" in one.problems["eviction"]
    finally:
        await here.redis.config_set("maxmemory-policy", "noeviction")
        await here.redis.config_set("maxmemory", "0")


@pytest.mark.parametrize("step", ["resolve", "commit"])
async def test_what_a_rebalance_overtakes_is_left_undone(here, monkeypatch, step):
    at, held, goes_on = now_ms() - 5_000, asyncio.Event(), asyncio.Event()
    one, two = here.consumer(), here.consumer()
    await here.publish([(u, payment(u, u, at), at) for u in USERS])

    def hold(owner, name):
        call = getattr(owner, name)

        async def late(*arguments):
            answer = await call(*arguments)
            held.set()
            await goes_on.wait()
            return answer

        monkeypatch.setattr(owner, name, late)

    if step == "resolve":
        hold(one._resolver, "resolve")
    async with running(one):
        if step == "commit":
            await drained(here, one)
            hold(one._client, "commit")
            await here.publish([(u, payment(-u, u, at + 1), at + 1) for u in USERS])
        await until(held.is_set, "the call is under way")
        generation = one._generation
        async with running(two):
            await until(lambda: one._generation >= generation + 2, "partitions are shared")
            goes_on.set()
            await until(
                lambda: live(one, two, partitions=PARTITIONS), "both own something, and live", 20
            )
            await stored(here)
            await assert_rows_equal_the_log(here)


async def test_a_commit_beyond_the_log_s_end_is_of_another_life(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
    old = await commits(here)
    await remake_topic(here)
    await commit(here, old)
    async with running(two := here.consumer()):
        await until(lambda: live(two, partitions=PARTITIONS), "all partitions live", 20)
        await here.publish([(u, payment(-u, u, at + 1), at + 1) for u in USERS])
        await stored(here)
        await assert_rows_equal_the_log(here)


async def test_while_another_life_is_read_no_answer_is_certain(here):
    at = now_ms() - 5_000
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
    await remake_topic(here)
    await here.publish([(u, payment(i, u, at + 9), at + 9) for i in range(500) for u in USERS])
    seen = set()
    async with running(two := here.consumer()):
        while not live(two, partitions=PARTITIONS):
            for number, state in (await here.online.states()).items():
                if number in two.states() and state.epoch == two.states()[number].epoch:
                    rows = [await here.read(user, now_ms()) for user in USERS]
                    seen |= {(r.degraded, r.stats[0].count) for r in rows if r.fence is None}
                    seen |= {
                        (r.degraded, r.stats[0].count)
                        for r in rows
                        if r.fence and r.fence.epoch == state.epoch
                    }
            await asyncio.sleep(0)
    assert {count for degraded, count in seen if degraded == ()} <= {500}
    assert any("rebuilding" in degraded for degraded, _ in seen)


async def test_a_dead_letter_that_is_not_taken_holds_the_commit_back(here):
    letters = here.config.kafka.topic(kafka.DEAD_LETTERS)

    async with running(one := here.consumer()):
        await drained(here, one)
        before = await commits(here)
        await set_topic(here, letters, "max.message.bytes", "10")
        await here.publish([(1000, b"not json", now_ms())])
        await until(lambda: "store" in one.problems, "the trouble is said", 20)
        assert await commits(here) == before
        await set_topic(here, letters, "max.message.bytes", "1000000")
        await drained(here, one)
    assert sum(map(len, (await here.log(kafka.DEAD_LETTERS)).values())) == 1


async def test_a_replay_sends_nothing_again_and_is_no_schema_break(here):
    at = now_ms() - 5_000
    good = [(u, payment((u, i), u, at), at) for u in USERS for i in range(20)]
    bad = [(u, b"not json", at) for u in USERS for _ in range(20)]
    all_taken = changed(here.config, max_rejected_share=1.0)
    strict, here.config = here.config, all_taken
    await here.publish(good[:1] + bad + good[1:])
    async with running(one := here.consumer()):
        await drained(here, one)

    async def sent():
        return [
            sum(map(len, (await here.log(topic)).values()))
            for topic in (kafka.DEAD_LETTERS, kafka.DECISIONS)
        ]

    assert await sent() == [len(bad), len(good)]
    here.config = strict
    async with running(two := here.consumer()):
        await until(lambda: live(two, partitions=PARTITIONS), "all partitions live", 20)
        assert two.counts["replayed"] >= len(good)
    assert await sent() == [len(bad), len(good)]


async def test_a_commit_has_a_deadline(here, servers, monkeypatch, caplog):
    async with running(one := here.consumer()):
        await drained(here, one)
        call = one._client.commit

        async def to_nobody(*arguments):
            servers.kafka.kill(signal.SIGSTOP)
            monkeypatch.setattr(one._client, "commit", call)
            return await call(*arguments)

        monkeypatch.setattr(one._client, "commit", to_nobody)
        await here.publish([(u, payment(u, u, now_ms()), now_ms()) for u in USERS])
        try:
            await until(
                lambda: any("commit failed" in r.message for r in caplog.records),
                "the commit is given up",
                15,
            )
        finally:
            servers.kafka.kill(signal.SIGCONT)
        await stored(here)
        await assert_rows_equal_the_log(here)


async def test_who_cannot_ask_for_the_log_s_end_grows_stale(here, servers):
    at = now_ms()
    await here.publish([(u, payment(u, u, at), at) for u in USERS])
    async with running(one := here.consumer()):
        await drained(here, one)
        known = await here.certain(1000, at)

        async def stale():
            return (found := await here.read(1000, at)).degraded and found

        servers.kafka.kill(signal.SIGSTOP)
        try:
            told = await until(stale, "the answers are doubted", 15)
            assert (told.degraded, told.stats) == (("stale",), known.stats)
            assert {s.state for s in one.states().values()} == {"live"}
        finally:
            servers.kafka.kill(signal.SIGCONT)
        await drained(here, one)
        assert (await here.certain(1000, at)).stats == known.stats


async def test_a_replay_begins_early_enough_for_events_ahead_of_their_records(here):
    at, user = now_ms() - 900_000, 1000
    ahead = at + here.spans.max_future_skew_ms - 1_000
    # When the last has come the first is still kept, though its record's own time is not.
    last = ahead + here.spans.keep_ms - 500
    await here.publish([(user, payment(1, user, ahead), at), (user, payment(2, user, last), last)])
    as_of = last - here.spans.slack_ms
    counts = []
    for _ in range(2):
        async with running(one := here.consumer()):
            await drained(here, one)
            part = next(o.part for o in one._parts.values() if o.part.windows.user(user))
            counts.append(part.windows.stats(user, as_of)[0].count)
    assert counts == [1, 1]


@pytest.mark.parametrize("hard", [True, False])
async def test_a_producer_whose_broker_goes_neither_spins_nor_outlives_its_stop(
    here, servers, caplog, hard
):
    await kafka.create_topics(here.config)
    await here.kafka.stop()
    before = asyncio.all_tasks()
    client, topic = kafka.producer(here.config), here.config.kafka.topic(kafka.DECISIONS)
    await client.start()
    await client.send_and_wait(topic, b"{}", key=b"1")
    # A broker that goes politely says before that its partitions have no leader now.
    end = functools.partial(servers.kafka.kill, signal.SIGKILL) if hard else servers.kafka.stop
    stopping = asyncio.create_task(asyncio.to_thread(end))
    try:
        while not stopping.done():
            sent = await client.send(topic, b"{}", key=b"1")
            sent.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.sleep(0.01)
        await asyncio.sleep(2)
        await kafka.stop(client)
        await until(lambda: not asyncio.all_tasks() - before, "its tasks are gone", 20)
    finally:
        await stopping
        servers.kafka.start()
    questions = sum("Unable to update metadata" in record.message for record in caplog.records)
    assert questions < 200
