"""Whatever removes records from a log, no answer without a doubt is too low."""

import signal

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from faults import (
    PARTITIONS,
    USERS,
    admin_of,
    compacted,
    drained,
    set_topics,
    stored,
)
from pipeline import now_ms, payment, running, until, world

from cerberus import kafka, transactions
from cerberus.stream import label_topic, removals, topic_settings

pytestmark = pytest.mark.anyio
KEEP_MS = 720_000


@pytest.fixture
async def here(environ):
    config = environ | {"CERBERUS_PARTITIONS": str(PARTITIONS), "CERBERUS_MAX_REJECTED_SHARE": "1"}
    async with world(config) as opened:
        yield opened


def topic_of(here):
    return here.config.kafka.topic(kafka.TRANSACTIONS)


async def paid(here, times=6, ago_ms=300_000):
    """Publish payments of all users, some minutes old."""
    at = now_ms() - ago_ms
    sent = [(u, payment((u, i), u, at + i), at + i) for i in range(times) for u in USERS]
    await here.publish(sent)


async def below(here, wanted):
    """Return the answers without a doubt that are too low."""
    rows = [await here.read(user, now_ms()) for user in USERS]
    return [r for r in rows if r.degraded == () and r.stats[0].count < wanted]


async def doubted(here):
    rows = [await here.read(user, now_ms()) for user in USERS]
    return all("warming" in row.degraded for row in rows)


@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
async def test_what_compaction_removed_is_doubted_after_a_restart(here, policy):
    await paid(here)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 6) == []
    await compacted(here, policy)
    for _ in range(2):
        async with running(one := here.consumer()):
            await drained(here, one)
            await until(lambda: doubted(here), "every row is doubted")
            assert f"cleanup.policy={policy}" in one.problems["cleanup"]
            assert "set cleanup.policy=delete" in one.problems["cleanup"]
            assert "lost records from inside partition 0 (offsets 0 to" in one.problems["removed"]
    # The policy is reset, so only the gaps reveal the loss.
    await set_topics(here, topic_of(here), {"cleanup.policy": "delete"})
    async with running(one := here.consumer()):
        await drained(here, one)
        await until(lambda: doubted(here), "every row is doubted")
        assert "cleanup" not in one.problems
        assert "lost records" in one.problems["removed"]


async def delete_up_to(here, before):
    """Delete each partition's records below an offset."""
    places = {TopicPartition(topic_of(here), n): RecordsToDelete(at) for n, at in before.items()}
    async with admin_of(here) as admin:
        await admin.delete_records(places)


async def middles(here):
    return {n: len(records) // 2 for n, records in (await here.log()).items()}


@pytest.mark.parametrize("stopped", [True, False])
async def test_what_was_deleted_up_to_the_middle_is_doubted_by_the_next_owner(here, stopped):
    await paid(here)
    async with running(one := here.consumer()):
        await drained(here, one)
        if not stopped:
            await delete_up_to(here, await middles(here))
            # The owner still has every event in memory.
            await here.publish([(u, payment((u, "new"), u, now_ms()), now_ms()) for u in USERS])
            await drained(here, one)
            await stored(here)
            rows = [await here.certain(user, now_ms()) for user in USERS]
            assert {row.stats[0].count for row in rows} == {7}
    if stopped:
        await delete_up_to(here, await middles(here))
    async with running(one := here.consumer()):
        await drained(here, one)
        await until(lambda: doubted(here), "every row is doubted")


async def test_what_is_deleted_though_it_was_never_read_is_doubted(here):
    await paid(here, times=1)
    async with running(one := here.consumer()):
        await drained(here, one)
    await paid(here)
    await delete_up_to(here, await middles(here))
    async with running(one := here.consumer()):
        await drained(here, one)
        await until(lambda: doubted(here), "every row is doubted")


async def test_a_first_record_that_is_expired_does_not_say_from_when_on_all_is_known(here):
    await paid(here)
    middle = {n: len(records) for n, records in (await here.log()).items()}
    old = now_ms() - 3_600_000
    await here.publish([(u, payment((u, "old"), u, old), old) for u in USERS[:3]])
    await paid(here, times=1, ago_ms=100_000)
    await delete_up_to(here, middle)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 7) == []


async def test_what_is_compacted_before_it_is_read_is_doubted(here, servers):
    async with running(one := here.consumer()):
        await drained(here, one)
        servers.redis.kill(signal.SIGSTOP)
        try:
            await paid(here)
            await until(lambda: "store" in one.problems, "the trouble is said")
            await paid(here, times=3, ago_ms=100_000)
            await compacted(here)
        finally:
            servers.redis.kill(signal.SIGCONT)
        await drained(here, one)
        await stored(here)
        assert await below(here, 9) == []
        await until(lambda: "cleanup" in one.problems, "the policy is said", 30)
    await set_topics(here, topic_of(here), {"cleanup.policy": "delete"})
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 9) == []


async def test_what_is_compacted_before_the_first_start_is_doubted(here):
    await paid(here)
    await compacted(here)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 6) == []


async def test_a_gap_right_before_the_reach_of_the_windows_is_seen(here):
    """The remaining log is contiguous where the window begins: the gap is right before that."""
    at = now_ms() - 3_000_000
    others = range(5_000, 5_060)
    await here.publish([(u, payment(u, u, at), at) for u in others])
    await paid(here, times=5)
    await paid(here, times=1, ago_ms=200_000)  # a batch of its own, which stays whole
    async with running(one := here.consumer()):
        await drained(here, one)
    await compacted(here)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 6) == []


async def test_a_writer_s_transactions_cast_no_doubt(here):
    name, bootstrap = topic_of(here), here.config.kafka.bootstrap
    at = now_ms() - 60_000
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=name) as writer:
        for i in range(9):
            await writer.begin_transaction()
            for user in USERS:
                value = payment((user, i), user, at + i)
                await writer.send(name, value, key=transactions.key(user), timestamp_ms=at + i)
            await (writer.abort_transaction() if i % 3 == 1 else writer.commit_transaction())
    for _ in range(2):
        async with running(one := here.consumer()):
            await drained(here, one)
            await stored(here)
            rows = [await here.certain(user, now_ms()) for user in USERS]
            assert {row.stats[0].count for row in rows} == {6}
            assert "removed" not in one.problems


async def test_a_doubt_passes_when_no_window_reaches_back_to_it(here, environ):
    await paid(here)
    await compacted(here)
    await set_topics(here, topic_of(here), {"cleanup.policy": "delete"})
    async with running(one := here.consumer()):
        await drained(here, one)
        assert "removed" in one.problems
        later = now_ms() + here.spans.longest_ms + here.spans.slack_ms
        one._removals._clock = lambda: later
        await until(lambda: "removed" not in one.problems, "nothing is said any more")
    row = await here.read(USERS[0], later)
    assert "warming" not in row.degraded


async def test_settings_that_change_while_a_topic_is_read_are_said(here, monkeypatch):
    monkeypatch.setattr(topic_settings, "_ASK_S", 0.5)
    async with running(one := here.consumer()):
        await drained(here, one)
        assert not {"cleanup", "retention", "retention_bytes"} & one.problems.keys()
        bad = {"cleanup.policy": "compact", "retention.ms": "60000", "retention.bytes": "1000"}
        await set_topics(here, topic_of(here), bad)
        for name in ("cleanup", "retention", "retention_bytes"):
            await until(lambda name=name: name in one.problems, f"{name} is said")
        await set_topics(here, topic_of(here), {"cleanup.policy": "delete"})
        for name in ("cleanup", "retention", "retention_bytes"):
            await until(lambda name=name: name not in one.problems, f"{name} is over")


async def test_dead_letters_that_are_compacted_are_said(here, monkeypatch):
    """Two refused records of one user have one key, so one letter would replace the other."""
    monkeypatch.setattr(topic_settings, "_ASK_S", 0.5)
    topics = [here.config.kafka.topic(n) for n in (kafka.DEAD_LETTERS, kafka.LABEL_DEAD_LETTERS)]
    labels = label_topic.LabelConsumer(here.config, here.postgres)
    async with running(one := here.consumer()), running(labels):
        await drained(here, one)
        assert "dead_letters" not in one.problems
        assert labels.advice is None
        for topic in topics:
            await set_topics(here, topic, {"cleanup.policy": "compact"})
        await until(lambda: topics[0] in one.problems.get("dead_letters", ""), "it is said")
        await until(lambda: topics[1] in (labels.advice or ""), "it is said of labels")


@pytest.mark.parametrize(
    ("found", "held_ms", "name", "said"),
    [
        ({}, None, None, None),
        ({"cleanup.policy": "delete", "retention.ms": "604800000"}, None, None, None),
        ({"cleanup.policy": "compact,delete"}, None, "cleanup", "set cleanup.policy=delete"),
        ({"retention.ms": str(3 * KEEP_MS - 1)}, None, "retention", "at least 2160000"),
        ({"retention.ms": str(3 * KEEP_MS)}, None, None, None),
        ({"retention.bytes": "1000"}, None, "retention_bytes", "set retention.bytes=-1"),
        ({"retention.bytes": "1000"}, 3 * KEEP_MS - 1, "retention_bytes", "retention.bytes=1000"),
        ({"retention.bytes": "1000"}, 3 * KEEP_MS, None, None),
        ({"max.message.bytes": "1048588"}, None, None, None),
        ({"max.message.bytes": "104857600"}, None, "batch_bytes", "at most 8388608"),
    ],
)
def test_each_setting_that_may_lose_a_record_is_named_with_its_cure(found, held_ms, name, said):
    told = removals.advise("t", found, KEEP_MS, held_ms)
    sentences = {each: sentence for each, sentence in told.items() if sentence}
    assert set(sentences) == ({name} if name else set())
    assert name is None or said in sentences[name]


@pytest.mark.parametrize("setting", [{"retention.bytes": "1"}, {"retention.ms": "60000"}])
async def test_what_a_short_retention_deleted_is_doubted(here, setting):
    await paid(here)
    async with running(one := here.consumer()):
        await drained(here, one)
    await set_topics(here, topic_of(here), {"segment.ms": "50"} | setting)

    async def begun():
        await here.publish([(u, payment((u, now_ms()), u, now_ms()), now_ms()) for u in USERS])
        log = await here.log()
        return all(records and records[0].offset for records in log.values())

    await until(begun, "the first records are gone")
    async with running(one := here.consumer()):
        await drained(here, one)
        assert await below(here, 6) == []
        assert ("retention_bytes" if "retention.bytes" in setting else "retention") in one.problems
