import asyncio
import itertools
import os
import pathlib
import secrets
import shutil
import sys
import tempfile

import asyncpg
import pytest
import redis
from asking import client
from served import Served

from cerberus import endpoints, errors, kafka, stack

SCRUBBED = ("CERBERUS_", "KAFKA_", "REDIS_", "DATABASE_URL")
AS_CALLED = dict(os.environ)
REDIS_DATABASES = 16
SERVERS = {"java", "redis-server", "valkey-server", "initdb", "postgres"}
_worlds = itertools.count()
_allowed = [False]  # to start servers, now


def without_settings(environ):
    return {k: v for k, v in environ.items() if not k.startswith(SCRUBBED)}


def pytest_itemcollected(item):
    """Mark what asks for the servers; a test that starts some of its own says so itself."""
    if "servers" in item.fixturenames:
        item.add_marker(pytest.mark.servers)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let only a test that is marked so start servers."""
    _allowed[0] = item.get_closest_marker("servers") is not None
    try:
        return (yield)
    finally:
        _allowed[0] = False


def _watch(event, arguments):
    if event == "subprocess.Popen" and not _allowed[0]:
        program, *options = map(os.fsdecode, arguments[1])
        asked = {"-version", "--version"}.intersection(options)
        if pathlib.Path(program).name in SERVERS and not asked:
            raise RuntimeError(f"a test without the mark `servers` starts {program}")


sys.addaudithook(_watch)


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch):
    for name in set(os.environ) - set(without_settings(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def new_directory():
    """Make directories that the unprivileged user of Postgres can reach, also for root."""
    made = []

    def make():
        made.append(pathlib.Path(tempfile.mkdtemp(prefix="cerberus-")).resolve())
        made[-1].chmod(0o755)
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def machine():
    """Return the environment of a machine where no address of a server is set."""
    wanted = {k: v for k, v in AS_CALLED.items() if k == "CERBERUS_STACK"}
    return without_settings(AS_CALLED) | wanted


@pytest.fixture(scope="session")
def servers(new_directory, machine):
    """Kafka, Redis and Postgres of our own, for the whole run; a test may kill and restart them."""
    often = {"log.cleaner.backoff.ms": "500", "log.retention.check.interval.ms": "500"}
    opened = stack.servers(new_directory(), machine, kafka_properties=often, durable=False)
    try:
        running = opened.__enter__()
    except errors.ServerUnavailable as error:
        if "CI" in AS_CALLED:
            raise
        pytest.skip(str(error))
    yield running
    opened.__exit__(None, None, None)


@pytest.fixture
def database(servers):
    """Make an empty database that no other test has seen, and return its address."""
    name = f"t{secrets.token_hex(6)}"
    asyncio.run(_sql(servers, f"CREATE DATABASE {name}"))
    yield f"{servers.postgres.url.rpartition('/')[0]}/{name}"
    asyncio.run(_sql(servers, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def environ(servers, database):
    """Set up a world that no other test has seen: topics, a database, a Redis database."""
    name = database.rpartition("/")[2]
    redis_url = f"{servers.redis.url.rpartition('/')[0]}/{next(_worlds) % REDIS_DATABASES}"
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    yield {
        **servers.environ,
        "KAFKA_PREFIX": f"{name}.",
        "REDIS_URL": redis_url,
        "DATABASE_URL": database,
        "CERBERUS_OPEN": "loopback",
    }
    asyncio.run(_delete_topics(servers, f"{name}."))


@pytest.fixture
async def served(environ):
    """Serve from stores of the test's own, which have tables and a live owner."""
    async with Served(environ) as served:
        await served.migrated()
        await served.live()
        yield served


@pytest.fixture
async def http(served):
    """Ask what is served by HTTP, from this machine."""
    async with client(served.app()) as http:
        yield http


async def _sql(servers, statement):
    connection = await asyncpg.connect(servers.postgres.url, timeout=10)
    await connection.execute(statement, timeout=30)
    await connection.close()


async def _delete_topics(servers, prefix):
    async with kafka.admin(endpoints.Kafka((servers.kafka.url,))) as client:
        ours = [topic for topic in await client.list_topics() if topic.startswith(prefix)]
        if ours:
            await client.delete_topics(ours)
