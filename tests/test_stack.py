import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import asyncpg
import orjson
import psutil
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from cerberus import errors, stack
from cerberus.stack import jars, ports

ELSEWHERE = {
    "KAFKA_BROKER": "kafka.example:9092",
    "REDIS_URL": "redis://:sesame@redis.example:6379/0",
    "DATABASE_URL": "postgres://u:sesame@db.example/x",
}
SERVERS = {"redis": "REDIS_URL", "postgres": "DATABASE_URL", "kafka": "KAFKA_BROKER"}

pytestmark = pytest.mark.servers


def only(name, machine):
    """Return an environment in which one server alone must be started."""
    return machine | {k: v for k, v in ELSEWHERE.items() if k != SERVERS[name]}


@contextlib.contextmanager
def started(directory, environ, **options):
    said = []
    with contextlib.ExitStack() as undo:
        try:
            opened = stack.servers(directory, environ, say=said.append, **options)
            running = undo.enter_context(opened)
        except errors.ServerUnavailable as error:
            if "CI" in os.environ or "found" not in str(error):
                raise
            pytest.skip(str(error))
        yield running, said


@pytest.fixture
def directory(new_directory):
    return new_directory()


def processes_in(directory):
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(str(directory)):
                found.add(process.pid)
    return found


def read_and_write(servers, value):
    """Return what each server has kept, then leave a value in it."""
    return asyncio.run(_read_and_write(servers, value))


async def _read_and_write(servers, value):
    with redis.Redis.from_url(servers.redis.url) as client:
        kept = [client.getset("law", value)]
    database = await asyncpg.connect(servers.postgres.url, timeout=10)
    await database.execute("CREATE TABLE IF NOT EXISTS law (value text)")
    kept.append(await database.fetchval("SELECT value FROM law"))
    await database.execute("DELETE FROM law")
    await database.execute("INSERT INTO law VALUES ($1)", value)
    await database.close()
    return [*kept, *await _read_and_write_kafka(servers.kafka.url, value)]


async def _read_and_write_kafka(address, value):
    admin = AIOKafkaAdminClient(bootstrap_servers=address)
    await admin.start()
    cluster = (await admin.describe_cluster())["cluster_id"]
    if "law" not in await admin.list_topics():
        await admin.create_topics([NewTopic("law", 1, 1)])
    await admin.close()
    async with AIOKafkaConsumer(
        "law", bootstrap_servers=address, auto_offset_reset="earliest"
    ) as c:
        records = await c.getmany(timeout_ms=5_000) if await _length(c) else {}
    async with AIOKafkaProducer(bootstrap_servers=address) as producer:
        await producer.send_and_wait("law", value.encode())
    return [[r.value.decode() for batch in records.values() for r in batch], cluster]


async def _length(consumer):
    return sum((await consumer.end_offsets(consumer.assignment())).values())


def test_an_address_in_the_environment_starts_nothing_and_keeps_its_secrets(directory, machine):
    before = {child.pid for child in psutil.Process().children()}
    with started(directory, machine | ELSEWHERE) as (servers, said):
        assert servers.environ == ELSEWHERE
        assert {child.pid for child in psutil.Process().children()} <= before
        assert servers.redis.origin == "REDIS_URL in the environment"
        with pytest.raises(errors.ServerUnavailable, match="not started here"):
            servers.redis.kill(signal.SIGKILL)
    assert any("db.example" in line for line in said)
    assert not any("sesame" in line for line in said)


def test_a_platform_s_variables_count_as_addresses(directory, machine):
    given = {"KAFKA_URL": "kafka+ssl://a:1,kafka+ssl://b:2", "REDIS_TLS_URL": "rediss://:s@r:1"}
    environ = machine | given | {"DATABASE_URL": "postgres://h/x"}
    with started(directory, environ) as (servers, said):
        assert servers.kafka.url == given["KAFKA_URL"]
        assert servers.redis.url == given["REDIS_TLS_URL"]
    assert any("a:1,b:2" in line for line in said)


def test_data_cluster_and_ports_survive_a_restart(directory, machine):
    with started(directory, machine, durable=False) as (servers, said):
        first = servers.environ
        redis_kept, postgres_kept, records, cluster = read_and_write(servers, "one")
        assert (redis_kept, postgres_kept, records) == (None, None, [])
        assert servers.kafka.created
        assert servers.postgres.created
        assert {"kafka", "redis", "postgres"} <= {line.split()[0] for line in said}
    with started(directory, machine, durable=False) as (servers, _):
        assert servers.environ == first
        assert read_and_write(servers, "two") == [b"one", "one", ["one"], cluster]
        assert not servers.kafka.created
        for server in (servers.redis, servers.postgres):
            server.kill(signal.SIGKILL)
            server.restart()
        servers.kafka.restart()
        assert servers.environ == first
        assert read_and_write(servers, "three") == [b"two", "two", ["one", "two"], cluster]


def test_a_frozen_server_is_silent_goes_on_and_can_be_stopped(directory, machine):
    with started(directory, only("redis", machine), durable=False) as (servers, _):
        client = redis.Redis.from_url(servers.redis.url, socket_timeout=0.3)
        client.set("k", "v")
        servers.redis.kill(signal.SIGSTOP)
        with pytest.raises(redis.TimeoutError):
            client.get("k")
        servers.redis.kill(signal.SIGCONT)
        assert client.get("k") == b"v"
        servers.redis.kill(signal.SIGSTOP)
        client.close()
    assert not processes_in(directory)
    assert "ready to exit" in (directory / "redis.log").read_text()


def test_a_frozen_postgres_is_silent_on_open_connections_too(directory, machine):
    async def ask(server):
        connection = await asyncpg.connect(server.url, timeout=10)
        server.kill(signal.SIGSTOP)
        try:
            await connection.fetchval("SELECT 1", timeout=0.3)
        finally:
            server.kill(signal.SIGCONT)
            await connection.close(timeout=10)

    with started(directory, only("postgres", machine), durable=False) as (servers, _):
        with pytest.raises(TimeoutError):
            asyncio.run(ask(servers.postgres))


def test_a_port_of_somebody_else_is_not_taken_and_said(directory, machine):
    with contextlib.ExitStack() as undo:
        if ports.free(6379):
            undo.enter_context(socket.create_server(("0.0.0.0", 6379)))  # noqa: S104 - the law
        with started(directory, only("redis", machine)) as (servers, said):
            assert servers.redis.url != "redis://127.0.0.1:6379/0"
            assert "port 6379 is in use by another" in said[-1]
            url = servers.redis.url
        theirs = undo.enter_context(socket.create_server(("127.0.0.1", servers.redis.port)))
        with started(directory, only("redis", machine)) as (servers, _):
            assert servers.redis.url != url
        theirs.listen()


@pytest.mark.parametrize("name", ["redis", "postgres"])
def test_stopping_leaves_no_process_and_touches_no_other(name, directory, new_directory, machine):
    with started(new_directory(), only("redis", machine), durable=False) as (others, _):
        with started(directory, only(name, machine), durable=False):
            # Ctrl-C in a terminal reaches all of its session.
            sessions = {os.getsid(pid) for pid in processes_in(directory)}
            assert sessions
            assert os.getsid(0) not in sessions
        assert not processes_in(directory)
        with redis.Redis.from_url(others.redis.url) as client:
            assert client.ping()


def test_a_failure_half_way_stops_what_was_started(directory, machine):
    environ = only("kafka", machine)
    del environ["REDIS_URL"]
    broken = {"log.segment.bytes": "not a number"}
    with pytest.raises(errors.ServerUnavailable, match=r"kafka\S* ended with status") as caught:
        with started(directory, environ, kafka_properties=broken, durable=False):
            pass
    assert str(directory) in str(caught.value)
    assert "log.segment.bytes" in str(caught.value)
    assert not processes_in(directory)


OWNER = """
import pathlib, sys, time
from cerberus import stack
import os
with stack.servers(pathlib.Path(sys.argv[1]), os.environ, durable=False, say=lambda line: None):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("name", "lost"), [("redis", ""), ("postgres", ""), ("postgres", "postgres.pid")]
)
def test_a_start_ends_what_a_killed_run_left_behind(name, lost, directory, machine):
    environ = only(name, machine)
    command = [sys.executable, "-c", OWNER, str(directory)]
    with started(directory, environ, durable=False):
        pass  # skips where the server cannot be had
    owner = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"up\n"
        with pytest.raises(errors.ServerUnavailable, match=f"in use by process {owner.pid}"):
            with started(directory, environ, durable=False):
                pass
    finally:
        owner.kill()
        owner.wait(10)
        owner.stdout.close()
    left = processes_in(directory)
    assert left
    if lost:
        (directory / lost).unlink()
    with started(directory, environ, durable=False) as (_, said):
        assert "left by a run that was killed" in said[0]
        assert processes_in(directory)
        assert not left & processes_in(directory)
    assert not processes_in(directory)


@pytest.mark.parametrize(
    ("name", "file"), [("redis", "redis.pid"), ("postgres", "postgres/data/postmaster.pid")]
)
def test_a_process_that_only_has_the_number_of_a_leftover_is_spared(name, file, directory, machine):
    with started(directory, only(name, machine), durable=False):
        pass
    user = 65534 if os.geteuid() == 0 else None  # as Postgres itself, or it would not mind
    bystander = subprocess.Popen(["sleep", "60"], user=user)
    try:
        (directory / file).write_text(f"{bystander.pid}\n")
        with started(directory, only(name, machine), durable=False) as (_, said):
            assert not any("left by" in line for line in said)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(10)


def test_where_nothing_can_be_had_every_missing_server_is_named(directory):
    environ = {"PATH": "", "CERBERUS_STACK": "system", "DATABASE_URL": ELSEWHERE["DATABASE_URL"]}
    with pytest.raises(errors.ServerUnavailable) as caught, stack.servers(directory, environ):
        pass
    sentences = str(caught.value).splitlines()
    for sentence, variable in zip(sentences, ("KAFKA_BROKER", "REDIS_URL"), strict=True):
        assert variable in sentence
        assert "install" in sentence
        assert "docker compose" in sentence


def test_a_program_that_is_too_old_is_passed_over(directory, new_directory):
    old = new_directory()
    for name, line in (("java", 'openjdk version "11.0.2"'), ("redis-server", "Redis v=5.0.7")):
        (old / name).write_text(f"#!/bin/sh\necho '{line}'\n")
        (old / name).chmod(0o755)
    environ = {"PATH": str(old), "CERBERUS_STACK": "system", "DATABASE_URL": "postgres://h/x"}
    with pytest.raises(errors.ServerUnavailable, match=r"Java 17(.|\n)*Redis or Valkey of 6.2"):
        with stack.servers(directory, environ):
            pass


def test_another_way_of_finding_servers_is_refused(directory):
    with pytest.raises(errors.ConfigError, match="CERBERUS_STACK"):
        with stack.servers(directory, ELSEWHERE | {"CERBERUS_STACK": "docker"}):
            pass


def test_a_jar_that_is_not_the_locked_one_is_refused_and_deleted(directory, new_directory, machine):
    home = new_directory()
    environ = only("kafka", machine) | {"XDG_CACHE_HOME": str(home)}
    jar = jars.cache(environ) / f"kafka-clients-{jars.VERSION}.jar"
    jar.parent.mkdir(parents=True)
    jar.write_bytes(b"not Kafka")
    with pytest.raises(errors.ServerUnavailable, match=r"kafka-clients.*SHA-256"):
        with started(directory, environ, durable=False):
            pass
    assert not jar.exists()


def test_ports_are_remembered_and_a_broken_memory_is_replaced(directory):
    saved = directory / "ports.json"
    first = ports.assign({"a": 0, "b": 0}, saved)
    assert len(set(first.values())) == 2
    assert ports.assign({"a": 0, "b": 0}, saved) == first
    assert ports.assign({"c": 0}, saved).keys() == {"c"}
    assert ports.assign({"a": 0}, saved) == {"a": first["a"]}
    for broken in (b"{", b"[]", orjson.dumps({"a": "x"})):
        saved.write_bytes(broken)
        assert ports.assign({"a": 0}, saved).keys() == {"a"}


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])  # noqa: S104 - the law
def test_a_port_with_a_listener_is_not_free(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        assert not ports.free(taken.getsockname()[1])
