"""What tests of faults do to a log and its group, and what they wait for."""

import contextlib
import time

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import OffsetAndMetadata
from pipeline import live, shown, until

from cerberus import kafka, transactions

PARTITIONS = 3
USERS = range(1000, 1012)


@contextlib.asynccontextmanager
async def admin_of(here):
    client = AIOKafkaAdminClient(bootstrap_servers=here.config.kafka.bootstrap)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def drained(here, one, partitions=PARTITIONS):
    async def at_the_end():
        logs = await here.log()
        ends = {number: records[-1].offset + 1 for number, records in logs.items() if records}
        states = one.states()
        return (
            live(one, partitions=partitions)
            and all(states[number].offset >= end for number, end in ends.items())
            and await shown(here, partitions)
        )

    return until(at_the_end, "all partitions live and at the log's end")


def stored(here):
    """Wait until all effects of the log are stored: what is observed alone is not."""

    async def committed():
        ends = {n: records[-1].offset + 1 for n, records in (await here.log()).items() if records}
        found = await commits(here)
        return all(found[number][0] >= end for number, end in ends.items())

    return until(committed, "all is committed")


async def remake_topic(here):
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    async with admin_of(here) as admin:
        await admin.delete_topics([name])

        async def gone():
            return name not in await admin.list_topics()

        await until(gone, "the topic is gone")
    await kafka.create_topics(here.config)


async def set_topic(here, topic, name, value):
    async with admin_of(here) as admin:
        changed = ConfigResource(ConfigResourceType.TOPIC, topic, configs={name: value})
        await admin.alter_configs([changed])

        async def known():  # a moment after it was acknowledged
            return (await kafka.topic_config(admin, topic)).get(name) == value

        await until(known, f"{topic} has {name} {value}")


async def cluster_of(here):
    async with admin_of(here) as admin:
        return await kafka.cluster_id(admin)


async def commits(here, partitions=PARTITIONS):
    """Return the group's commits: (offset, metadata) by partition."""
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    tps = [TopicPartition(name, number) for number in range(partitions)]
    async with admin_of(here) as admin:
        found = await admin.list_consumer_group_offsets(
            here.config.kafka.topic(kafka.GROUP), partitions=tps
        )
    return {tp.partition: (at.offset, at.metadata) for tp, at in found.items()}


async def commit(here, wanted):
    """Commit for a group that nobody is in."""
    name = here.config.kafka.topic(kafka.TRANSACTIONS)
    async with AIOKafkaConsumer(
        bootstrap_servers=here.config.kafka.bootstrap,
        group_id=here.config.kafka.topic(kafka.GROUP),
        enable_auto_commit=False,
    ) as consumer:
        consumer.assign([TopicPartition(name, number) for number in wanted])
        await consumer.commit(
            {TopicPartition(name, n): OffsetAndMetadata(*at) for n, at in wanted.items()}
        )


async def assert_rows_equal_the_log(here):
    oracles = await here.oracles()
    for user in USERS:
        told = oracles[transactions.partition_of(user, len(oracles))]
        row = await here.certain(user, told.frontier)
        assert tuple(row.stats[0].__getstate__()) == told.stats(user, told.frontier)


async def set_topics(here, topic, values):
    """Set a topic's settings; the brokers reset those that are not given."""
    async with admin_of(here) as admin:
        changed = ConfigResource(ConfigResourceType.TOPIC, topic, configs=values)
        await admin.alter_configs([changed])

        async def known():
            found = await kafka.topic_config(admin, topic)
            return all(found.get(name) == value for name, value in values.items())

        await until(known, f"{topic} has {values}")


COMPACTING = {
    "cleanup.policy": "compact",
    "segment.ms": "50",
    "min.cleanable.dirty.ratio": "0.0",
    "delete.retention.ms": "0",
}


async def compacted(here, policy="compact", topic=kafka.TRANSACTIONS):
    """Compact a topic, until each partition lacks records."""
    name = here.config.kafka.topic(topic)
    before = {n: len(records) for n, records in (await here.log(topic)).items() if records}
    await set_topics(here, name, COMPACTING | {"cleanup.policy": policy})

    async def fewer():
        # The newest segment is not compacted, and only a new record begins another segment.
        for number in before:
            key = b"last-%d" % time.time_ns()  # its own key, or its removal would leave a gap, too
            await here.kafka.send_and_wait(name, b"{}", key=key, partition=number)
        log = await here.log(topic)
        kept = {n: [r for r in log[n] if not (r.key or b"").startswith(b"last")] for n in before}
        return all(len(kept[n]) < before[n] for n in before)

    await until(fewer, "the topic is compacted")
