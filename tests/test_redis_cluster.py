"""On a Redis Cluster of three nodes the same holds: a user is one key, so one node."""

import asyncio
import contextlib
import dataclasses
import gc
import pathlib
import random
import subprocess
import time

import pytest
import redis
import redis.asyncio
from pipeline import live, now_ms, payment, running, until, world
from service import free_port

from cerberus import claims, errors, settings, stack, transactions
from cerberus.jobs import feast as feast_store
from cerberus.jobs import materializer

pytestmark = [
    pytest.mark.anyio,
    # The client leaves connections to a node that was killed to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
USERS = range(1000, 1030)
SLOTS = 16_384
UNSEEN_S = 6
SMALL = {"CERBERUS_PARTITIONS": "2", "CERBERUS_USERS": str(len(USERS))}


@dataclasses.dataclass
class Cluster:
    """Three nodes that share the slots, without persistence of their own."""

    program: pathlib.Path
    directory: pathlib.Path
    ports: list[int]
    nodes: dict[int, subprocess.Popen] = dataclasses.field(default_factory=dict)

    @property
    def settings(self):
        return {"REDIS_URL": f"redis://127.0.0.1:{self.ports[0]}", "REDIS_CLUSTER": "1"}

    def start(self, port):
        directory = self.directory / str(port)
        directory.mkdir(exist_ok=True)
        options = f"--port {port} --bind 127.0.0.1 --cluster-enabled yes --save".split()
        self.nodes[port] = subprocess.Popen(
            [self.program, *options, "", "--dir", directory],
            stdout=subprocess.DEVNULL,
        )

    def kill(self, port):
        self.nodes[port].kill()
        self.nodes[port].wait(timeout=10)

    def restart(self, port):
        self.kill(port)
        self.start(port)


@pytest.fixture(autouse=True)
def _collected():
    """Leave no such connection to the tests that follow in this process."""
    yield
    gc.collect()


@pytest.fixture
def cluster(machine, tmp_path):
    ports = [free_port() % 40_000 + 10_000 for _ in range(3)]
    made = Cluster(stack.redis.find(machine).path, tmp_path, ports)
    for port in ports:
        made.start(port)
    clients = [redis.Redis(port=port) for port in ports]
    try:
        for i, client in enumerate(clients):
            eventually(client.ping)
            mine = range(SLOTS * i // 3, SLOTS * (i + 1) // 3)
            client.execute_command("CLUSTER ADDSLOTS", *mine)
            client.execute_command("CLUSTER MEET", "127.0.0.1", ports[0])
        for client in clients:
            eventually(lambda c=client: c.cluster("info")["cluster_state"] == "ok" or 1 / 0)
        yield made
    finally:
        for client in clients:
            client.close()
        for port in ports:
            made.kill(port)
        gc.collect()  # what the client has left open is this test's, not the next one's


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
    return await asyncio.to_thread(feast_store.materialize, here.config, now_ms())


async def test_rows_and_credit_scores_are_right_and_come_back_after_a_flush(environ, cluster):
    rng = random.Random(1)
    async with world(environ | cluster.settings | SMALL) as here:
        await materializer.seed_credit_scores(here.config, here.postgres)
        await asyncio.to_thread(feast_store.apply, here.config)
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
    async with world(environ | cluster.settings) as here:
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
        await here.postgres.ledger.write(kept)
        [node, *_] = here.redis.get_primaries()
        await here.redis.flushall(target_nodes=[node])
        left = await here.redis.keys("cerberus:claim:*:" + "?" * 32, target_nodes="primaries")
        assert 0 < len(left) < len(hands)
        assert [p.record for p in await ask()] == [p.record for p in first]


async def wrong_and_certain(here, count):
    """Say which users' rows are read without a doubt, and are not what they are."""
    rows = [await here.read(user, now_ms()) for user in USERS]
    told = {r.user_id: (r.stats[0].count, r.credit_score) for r in rows if r.degraded == ()}
    return {u: seen for u, seen in told.items() if seen[0] != count or seen[1] is None}, len(told)


@pytest.mark.parametrize(
    ("loss", "owners"), [("is emptied", 2), ("begins anew", 1), ("goes back", 1)]
)
async def test_what_one_node_has_lost_is_doubted_and_comes_back(environ, cluster, loss, owners):
    async with world(environ | cluster.settings | SMALL) as here, contextlib.AsyncExitStack() as on:
        await materializer.seed_credit_scores(here.config, here.postgres)
        await asyncio.to_thread(feast_store.apply, here.config)
        await load(here)
        consumers = [here.consumer() for _ in range(owners)]
        for one in consumers:
            await on.enter_async_context(running(one))
        count = 0

        async def pay():
            nonlocal count
            count += 1
            at = now_ms() - 1_000
            await here.publish([(u, payment(f"{count}-{u}", u, at), at) for u in USERS])

        async def right():
            with contextlib.suppress(errors.FeaturesUnavailable):
                return await wrong_and_certain(here, count) == ({}, len(USERS))

        await pay()
        await until(lambda: live(*consumers, partitions=2), "all is caught up")
        for port in cluster.ports:
            await until(right, "all is right")
            with redis.Redis(port=port) as node:
                if loss == "goes back":
                    node.save()
                    await pay()
                    await until(right, "all is right")
                    await asyncio.sleep(1.5)  # the owners have looked since
                if loss == "is emptied":
                    node.flushall()
                else:
                    cluster.restart(port)
                    eventually(node.ping)
            lost_s = time.monotonic()
            loads = 0
            while not (loads and await right()):
                assert time.monotonic() < lost_s + 60, "it is back"
                with contextlib.suppress(errors.FeaturesUnavailable):
                    wrong, _ = await wrong_and_certain(here, count)
                    # An owner looks each second; what it said before is stale 5 s later.
                    assert not wrong or time.monotonic() < lost_s + UNSEEN_S
                    if await here.online.materialized_ms() is None:
                        loads += (await load(here)).full
                await asyncio.sleep(0.02)
        assert {state.state for one in consumers for state in one.states().values()} == {"live"}


async def test_a_node_that_begins_anew_is_recognised_once_it_takes_part_again(environ, cluster):
    recognise = claims.recognise(settings.load(environ | cluster.settings))
    port = cluster.ports[0]
    cluster.restart(port)
    with redis.Redis(port=port) as node:
        eventually(node.ping)
        connection = redis.asyncio.Connection(port=port, redis_connect_func=recognise)

        async def connected():
            with contextlib.suppress(redis.exceptions.ClusterDownError):
                await connection.connect()
                return True

        await until(connected, "it takes part")
        await connection.disconnect()
        run = node.info("server")["run_id"].encode()
        names = node.keys("cerberus:claim:*:run")
        assert names
        assert {node.get(name).partition(b"#")[0] for name in names} == {run}


async def test_one_node_that_takes_no_writes_is_not_called_sound(environ, cluster):
    async with world(environ | cluster.settings | SMALL) as here:
        await here.online.prove(clustered=True)
        for port in cluster.ports:
            with redis.Redis(port=port) as node:
                node.config_set("min-replicas-to-write", 1)
                with pytest.raises(errors.FeaturesUnavailable, match="NOREPLICAS"):
                    await here.online.prove(clustered=True)
                node.config_set("min-replicas-to-write", 0)

            async def well():
                with contextlib.suppress(errors.FeaturesUnavailable):
                    return not await here.online.prove(clustered=True)

            await until(well, "it takes writes", 10)
