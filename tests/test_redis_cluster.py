"""On a Redis Cluster of three nodes the same holds: a user is one key, so one node."""

import asyncio
import random
import subprocess
import time

import pytest
import redis
from pipeline import live, now_ms, payment, running, until, world
from service import free_port

from cerberus import feature_store, materializer, stack, transactions

pytestmark = [pytest.mark.anyio, pytest.mark.servers]
USERS = range(1000, 1030)
SLOTS = 16_384


@pytest.fixture
def cluster(machine, tmp_path):
    """Start three nodes that share the slots; yield the address of one."""
    program = stack.redis.find(machine)
    ports = [free_port() % 40_000 + 10_000 for _ in range(3)]
    nodes = []
    for port in ports:
        directory = tmp_path / str(port)
        directory.mkdir()
        options = f"--port {port} --bind 127.0.0.1 --cluster-enabled yes --save".split()
        nodes.append(
            subprocess.Popen(
                [program.path, *options, "", "--dir", directory],
                stdout=subprocess.DEVNULL,
            )
        )
    clients = [redis.Redis(port=port) for port in ports]
    try:
        for i, client in enumerate(clients):
            eventually(client.ping)
            mine = range(SLOTS * i // 3, SLOTS * (i + 1) // 3)
            client.execute_command("CLUSTER ADDSLOTS", *mine)
            client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        for client in clients:
            eventually(lambda c=client: c.cluster("info")["cluster_state"] == "ok" or 1 / 0)
        yield f"redis://127.0.0.1:{ports[0]}"
    finally:
        for client in clients:
            client.close()
        for node in nodes:
            node.kill()
            node.wait(timeout=10)


def eventually(call):
    end_s = time.monotonic() + 20
    while True:
        try:
            return call()
        except (redis.exceptions.RedisError, ZeroDivisionError):
            assert time.monotonic() < end_s
            time.sleep(0.05)


async def assert_rows_equal_the_log(here):
    oracles = await here.oracles()
    for user in USERS:
        told = oracles[transactions.partition_of(user, len(oracles))]
        row = await here.certain(user, told.frontier)
        [stats] = row.stats
        assert (stats.count, stats.total_minor) == told.stats(user, told.frontier)
        assert row.credit_score is not None


async def load(here):
    return await asyncio.to_thread(feature_store.materialize, here.config, now_ms())


async def test_rows_and_credit_scores_are_right_and_come_back_after_a_flush(environ, cluster):
    rng = random.Random(1)
    changes = {
        "REDIS_URL": cluster,
        "REDIS_CLUSTER": "1",
        "CERBERUS_PARTITIONS": "2",
        "CERBERUS_USERS": str(len(USERS)),
    }
    async with world(environ | changes) as here:
        await materializer.seed_credit_scores(here.config, here.offline)
        feature_store.apply(here.config)
        assert (await load(here)).full
        for i in range(300):
            user, at = rng.choice(USERS), now_ms() - rng.randrange(60_000)
            await here.publish([(user, payment(i, user, at, rng.randrange(1000) / 100), at)])
        async with running(one := here.consumer()):
            await until(lambda: live(one, partitions=2), "all is caught up")
            await assert_rows_equal_the_log(here)
            await here.redis.flushall(target_nodes=here.redis.PRIMARIES)
            assert await here.online.materialized_ms() is None
            assert (await load(here)).full

            async def restored():
                rows = [await here.read(user, now_ms()) for user in USERS]
                return all(row.degraded == () for row in rows)

            await until(restored, "the rows are back")
            await assert_rows_equal_the_log(here)


async def test_a_transaction_has_one_decision_also_after_a_node_has_lost_its_claims(
    environ, cluster
):
    async with world(environ | {"REDIS_URL": cluster, "REDIS_CLUSTER": "1"}) as here:
        for bucket in range(64):
            await here.redis.set(f"cerberus:claim:{here.config.kafka.prefix}{{{bucket}}}", 0)
        kept = []
        doors = [here.predictor(kept.append) for _ in range(2)]
        stamp = transactions.format_ms(now_ms())
        hands = [
            {"user_id": u, "transaction_id": f"t{i}", "amount": 10, "timestamp": stamp}
            for u in USERS
            for i in range(3)
        ]

        async def ask():
            asked = [door.predict(door.parse(hand)) for hand in hands for door in doors]
            return await asyncio.gather(*asked)

        first = await ask()
        names = {p.record.decision_id for p in first}
        assert len(names) == len(hands)
        assert len({(p.record.decision_id, p.record.trace_id) for p in first}) == len(hands)
        assert sum(p.replayed for p in first) == len(hands)
        keys = await here.redis.keys("cerberus:claim:*:" + "?" * 32, target_nodes="primaries")
        assert len(keys) == len(hands)
        await here.offline.ledger.write(kept)
        [node, *_] = here.redis.get_primaries()
        await here.redis.flushall(target_nodes=[node])
        left = await here.redis.keys("cerberus:claim:*:" + "?" * 32, target_nodes="primaries")
        assert 0 < len(left) < len(hands)
        assert [p.record for p in await ask()] == [p.record for p in first]
