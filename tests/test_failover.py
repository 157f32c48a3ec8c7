"""Servers that answer but take no writes: replicas, standbys, full and moved ones."""

import asyncio
import contextlib
import logging
import subprocess
import time

import asyncpg
import orjson
import pytest
import redis
import redis.exceptions
from asking import client
from faults import USERS, drained, stored
from pipeline import now_ms, payment, running, until, world
from service import free_port

from cerberus import errors, stack
from cerberus.online import pool as redis_pool
from chaos import forwarder

pytestmark = pytest.mark.anyio
LAW_S = 10
SMALL = {"CERBERUS_PARTITIONS": "1"}


@pytest.mark.parametrize("word", sorted(redis_pool.REFUSALS))
@pytest.mark.parametrize(
    "answer",
    [
        "{} You can't do this.",
        "ERR Error running script (call to f_6b1b): @user_script:3: @user_script: 3: -{} You can't",
        "{} You can't do this. script: 6b1b, on @user_script:3.",
    ],
)
def test_a_refusal_is_recognised_also_within_a_script(word, answer):
    error = redis.connection.DefaultParser.parse_error(answer.format(word))
    assert redis_pool.refusal(error) == word


def test_a_refusal_is_not_read_out_of_the_command():
    text = "Command # 1 (SET x OOM READONLY) of pipeline caused error: ('ERR no such thing',)"
    assert redis_pool.refusal(redis.exceptions.ResponseError(text)) is None


class Pair:
    """Two Redis servers; `first` holds the data."""

    def __init__(self, program, directory):
        self.ports = [free_port(), free_port()]
        self.servers = []
        for port in self.ports:
            home = directory / str(port)
            home.mkdir()
            options = f"--port {port} --bind 127.0.0.1 --repl-diskless-sync-delay 0 --save".split()
            self.servers.append(
                subprocess.Popen([program, *options, "", "--dir", home], stdout=subprocess.DEVNULL)
            )
        self.clients = [redis.Redis(port=port) for port in self.ports]

    def hand_over(self, old, new):
        """Make `new` the primary and `old` its replica; no connection ends."""
        self.clients[new].replicaof("127.0.0.1", self.ports[old])
        _eventually(lambda: self.clients[new].info("replication")["master_link_status"] == "up")
        self.clients[new].execute_command("REPLICAOF", "NO", "ONE")
        self.clients[old].replicaof("127.0.0.1", self.ports[new])

    def end(self):
        for one, server in zip(self.clients, self.servers, strict=True):
            one.close()
            server.kill()
            server.wait(timeout=10)


@pytest.fixture
def pair(machine, tmp_path, request):
    request.node.add_marker(pytest.mark.servers)
    made = Pair(stack.redis.find(machine).path, tmp_path)
    try:
        for one in made.clients:
            _eventually(one.ping)
        yield made
    finally:
        made.end()


def _eventually(call):
    for _ in range(400):
        with contextlib.suppress(redis.exceptions.RedisError):
            if call():
                return
        time.sleep(0.05)
    raise AssertionError("Redis does not do it")


@contextlib.asynccontextmanager
async def serving(environ, pair):
    """Run a consumer and the routes on the first of two servers, behind one address."""
    with forwarder.Forwarder(pair.ports[0]) as front:
        url = {"REDIS_URL": f"redis://127.0.0.1:{front.address}/0"}
        async with world(environ | SMALL | url) as here:
            one = here.another().consumer
            async with running(one), client(here.app(here.decision_log(), consumed=one)) as http:
                await drained(here, one, 1)
                yield front, here, one, http


async def paid(http, number):
    body = {"user_id": 1000, "transaction_id": f"h{number}", "amount": 5}
    return (await http.post("/predict", json=body)).status_code


async def health(http):
    answer = await http.get("/health")
    return answer.status_code, answer.json()


async def all_well(here, one, http, number):
    async def well():
        status, told = await health(http)
        return (
            status == 200
            and told["servers"]["redis"] is None
            and await paid(http, number) == 200
            and not one.problems
        )

    await until(well, "all is well", LAW_S)
    at = now_ms()
    await here.publish([(u, payment(f"{number}-{u}", u, at), at) for u in USERS])
    await until(lambda: drained(here, one, 1), "the log is read", LAW_S)
    await stored(here)


async def test_after_a_planned_failover_all_is_well_though_old_connections_stay(environ, pair):
    async with serving(environ, pair) as (front, here, one, http):
        await all_well(here, one, http, 1)
        for old, new in ((0, 1), (1, 0)):
            front.port = pair.ports[new]
            pair.hand_over(old, new)
            await all_well(here, one, http, 2 + old)


async def test_a_replica_that_takes_writes_is_left_too(environ, pair):
    """It refuses nothing, and its primary overwrites what it was told."""
    for one in pair.clients:
        one.config_set("replica-read-only", "no")
    async with serving(environ, pair) as (front, here, one, http):
        await all_well(here, one, http, 1)
        front.port = pair.ports[1]
        pair.hand_over(0, 1)
        handed_ms = now_ms()

        def told_to_the_primary():
            state = pair.clients[1].hget(here.online._partitions.key, "0")
            return state and orjson.loads(state)["caught_up_ms"] > handed_ms + 500

        await until(told_to_the_primary, "the owner writes to the primary", LAW_S)
        await all_well(here, one, http, 2)


async def test_where_info_is_forbidden_the_states_are_read_all_the_same(environ, servers):
    with redis.Redis.from_url(servers.redis.url) as admin:
        admin.execute_command("ACL", "SETUSER", "blind", "on", ">x", "~*", "+@all", "-info")
    url = environ["REDIS_URL"].replace("redis://", "redis://blind:x@")
    try:
        async with world(environ | SMALL | {"REDIS_URL": url}) as here:
            async with running(one := here.consumer()):
                await drained(here, one, 1)
            assert await here.online._partitions.prove(clustered=False)
    finally:
        with redis.Redis.from_url(servers.redis.url) as admin:
            admin.execute_command("ACL", "DELUSER", "blind")


async def test_while_the_address_leads_to_a_replica_health_says_so_and_the_log_once(
    environ, pair, caplog
):
    async with serving(environ, pair) as (front, here, one, http):
        await all_well(here, one, http, 1)
        caplog.clear()
        pair.hand_over(0, 1)

        async def said():
            status, told = await health(http)
            return status == 503 and "READONLY" in told["servers"]["redis"]

        await until(said, "health says it", 3)
        for number in range(10):
            assert await paid(http, f"r{number}") == 503
            await asyncio.sleep(0.3)
        assert any("READONLY" in sentence for sentence in one.problems.values())
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(lines) == len(set(lines)) <= 3, lines
        front.port = pair.ports[1]
        await all_well(here, one, http, 2)


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [("maxmemory", "1", "OOM"), ("min-replicas-to-write", "1", "NOREPLICAS")],
)
async def test_a_redis_that_takes_no_writes_is_not_called_sound(
    environ, pair, setting, value, word
):
    async with serving(environ, pair) as (_, here, one, http):
        await all_well(here, one, http, 1)
        before = pair.clients[0].config_get(setting)[setting]
        pair.clients[0].config_set(setting, value)

        async def said():
            status, told = await health(http)
            return status == 503 and word in told["servers"]["redis"]

        await until(said, "health says it", 3)
        pair.clients[0].config_set(setting, before)
        await all_well(here, one, http, 2)


async def set_read_only(database, state):
    """Make new sessions read-only, or writable again; end the open ones only for the former."""
    name = database.rpartition("/")[2]
    connection = await asyncpg.connect(database)
    await connection.execute("SET default_transaction_read_only = off")
    await connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {state}")
    if state == "on":
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1"
        await connection.execute(f"{others} AND pid <> pg_backend_pid()", name)
    await connection.close()


async def test_a_postgres_that_takes_no_writes_is_left_when_another_takes_over(environ, database):
    async with world(environ | SMALL) as here:
        probes = {"postgres": here.postgres.schema.check}
        one = here.another().consumer
        async with (
            running(one),
            client(here.app(here.decision_log(), probes, consumed=one)) as http,
            contextlib.AsyncExitStack() as held,
        ):
            await drained(here, one, 1)
            still_held = await held.enter_async_context(here.postgres.locks.singleton("x"))
            await still_held()
            await set_read_only(database, "on")
            with pytest.raises(errors.StoreUnavailable):
                await still_held()
            at = now_ms()
            await here.publish([(u, payment(f"a{u}", u, at), at) for u in USERS])

            async def said():
                status, told = await health(http)
                return status == 200 and "takes no writes" in (told["servers"]["postgres"] or "")

            await until(said, "health says it", 5)
            await until(lambda: "takes no writes" in one.problems.get("store", ""), "it waits")
            with pytest.raises(errors.StoreUnavailable):
                async with here.postgres.locks.singleton("x"):
                    pass
            await set_read_only(database, "off")  # as on the server that took over

            async def well():
                _, told = await health(http)
                return told["servers"]["postgres"] is None and not one.problems

            await until(well, "all is well", LAW_S)
            await drained(here, one, 1)
            await stored(here)
            async with here.postgres.locks.singleton("x") as lock:
                assert lock is not None


async def test_a_standby_is_not_believed_about_earlier_decisions(environ, database):
    async with world(environ | SMALL) as here:
        predictor = here.predictor(lambda record: None)
        asked = predictor.parse({"user_id": 1000, "transaction_id": "a", "amount": 5})
        assert await here.postgres.ledger.find([asked.in_hand]) == {}
        await set_read_only(database, "on")

        async def refused():
            try:
                await here.postgres.ledger.find([asked.in_hand])
            except errors.StoreUnavailable as error:  # the first call finds its connection closed
                return "takes no writes" in str(error)

        await until(refused, "it is refused", LAW_S)
