"""How fast windows are recovered from the log, compared with a bare drain of the same log.

    python benchmarks/replay.py [--events 300000] [--users 1000] [--rounds 3]

The drain polls and decodes as the consumer does, and keeps nothing. Both read the same topic of the
same broker in turns; the ratio shows what a restart costs beyond reading. Kafka, Redis and Postgres
are started for the run in a temporary directory and stopped after it.
"""

import argparse
import asyncio
import dataclasses
import os
import pathlib
import statistics
import sys
import tempfile
import time

import aiokafka

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cerberus import (  # noqa: E402
    assembly,
    clock,
    judging,
    kafka,
    settings,
    stack,
    supervision,
    synthetic,
    transactions,
)

PARTITIONS, SPREAD_MS, DEADLINE_S = 6, 540_000, 600.0


async def publish(config, events, users, *, committed=True):
    """Fill the topic with traffic of the last nine minutes, and commit its end for the group."""
    population = synthetic.Population(users, 1000, config.currency, config.synthetic.seed)
    topic, now_ms = config.kafka.topic(kafka.TRANSACTIONS), clock.now_ms()
    client = aiokafka.AIOKafkaProducer(
        bootstrap_servers=config.kafka.bootstrap,
        compression_type="lz4",
        linger_ms=20,
        max_batch_size=262_144,
    )
    await client.start()
    for first in range(0, events, 5_000):
        sent = []
        for i in range(first, min(events, first + 5_000)):
            at_ms = now_ms - SPREAD_MS + SPREAD_MS * i // events
            paid = population.pay(at_ms).transaction
            key = transactions.key(paid.user_id)
            value = transactions.encode(paid)
            sent.append(await client.send(topic, value, key=key, timestamp_ms=at_ms))
        await asyncio.gather(*sent)
    await client.stop()
    group = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=config.kafka.bootstrap,
        group_id=config.kafka.topic(kafka.GROUP),
        enable_auto_commit=False,
    )
    await group.start()
    tps = [aiokafka.TopicPartition(topic, p) for p in range(PARTITIONS)]
    group.assign(tps)
    ends = await group.end_offsets(tps)
    if committed:
        await group.commit({tp: (end, str(now_ms)) for tp, end in ends.items()})
    await group.stop()
    return tps, sum(ends.values())


async def drain(config, spans, tps, total):
    """Poll and decode the whole topic; return the seconds that it took."""
    client = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=config.kafka.bootstrap,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await client.start()
    client.assign(tps)
    seen, began_s = 0, time.perf_counter()
    while seen < total:
        for records in (await client.getmany(timeout_ms=200, max_records=1000)).values():
            for record in records:
                judging.judge(record, config.currency, spans)
            seen += len(records)
    took_s = time.perf_counter() - began_s
    await client.stop()
    return took_s


async def _until(condition):
    async with asyncio.timeout(300):
        while not condition():  # noqa: ASYNC110 - it observes from outside
            await asyncio.sleep(0.005)


async def replay(service):
    """Let a new owner recover all partitions; return the seconds from its first replayed record."""
    one = dataclasses.replace(service).consumer  # a consumer as in another process
    progress = supervision.Progress(time.monotonic)
    running = asyncio.create_task(one.run(progress))
    await _until(lambda: one.counts["replayed"])
    began_s = time.perf_counter()
    await _until(lambda: all(s.state != "replaying" for s in one.states().values()))
    took_s = time.perf_counter() - began_s
    progress.stopping.set()
    await running
    return took_s


async def measure(environ, options):
    """Run both in turns and print their events per second and the ratio."""
    config = settings.load(environ | {"CERBERUS_PARTITIONS": str(PARTITIONS)})
    await kafka.create_topics(config)
    async with assembly.open(config) as service:
        await service.postgres.schema.migrate()
        tps, total = await publish(config, options.events, options.users)
        ratios = []
        print(f"{total} events of {options.users} users in {PARTITIONS} partitions\n")
        print("round   bare drain/s      replay/s   ratio")
        for number in range(options.rounds):
            drained_s = await drain(config, service.spans, tps, total)
            replayed_s = await replay(service)
            ratios.append(drained_s / replayed_s)
            print(
                f"{number + 1:>5} {total / drained_s:>14,.0f} {total / replayed_s:>13,.0f} "
                f"{ratios[-1]:>7.2f}"
            )
        print(f"\nmedian ratio {statistics.median(ratios):.2f}")


def main():
    """Start the servers, measure, stop them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=300_000, help="records in the log")
    parser.add_argument("--users", type=int, default=1_000, help="users who pay")
    parser.add_argument("--rounds", type=int, default=3, help="drains and replays")
    options = parser.parse_args()

    async def bounded(environ):
        async with asyncio.timeout(DEADLINE_S):
            await measure(environ, options)

    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory).chmod(0o755)
        with stack.servers(pathlib.Path(directory), os.environ, durable=False) as servers:
            asyncio.run(bounded(servers.environ))


if __name__ == "__main__":
    main()
