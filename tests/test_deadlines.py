"""Deadlines hold while a server is frozen: it accepts connections and answers nothing."""

import asyncio
import contextlib
import signal
import time

import pytest
from asking import client
from pipeline import now_ms, until, world

from cerberus import transactions
from cerberus.api import health, routes
from cerberus.serving import lookups

pytestmark = pytest.mark.anyio
BUSY_S = 1.5  # what a busy machine may add
OLD_MS = 3_600_000


@pytest.fixture
async def here(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as opened:
        yield opened


@contextlib.contextmanager
def frozen(server):
    server.kill(signal.SIGSTOP)
    try:
        yield
    finally:
        server.kill(signal.SIGCONT)


async def took_s(asking, status):
    began_s = time.monotonic()
    answer = await asking
    assert answer.status_code == status, answer.text
    return time.monotonic() - began_s, answer.json()


@pytest.mark.parametrize("name", ["postgres", "redis", "kafka"])
async def test_health_is_answered_in_time_while_a_server_is_frozen(here, servers, name):
    probes = health.probes(here.service)
    async with client(here.app(here.decision_log(), probes)) as http:
        _, told = await took_s(http.get("/health"), 200)
        assert told["servers"] == {"redis": None, "postgres": None, "kafka": None}
        with frozen(getattr(servers, name)):
            for _ in range(4):
                await asyncio.sleep(1.1)
                took, told = await took_s(http.get("/health"), 503 if name == "redis" else 200)
                assert took < health.PROBE_S + BUSY_S
                down = {server for server, why in told["servers"].items() if why}
                assert down == {name}

        async def sound():
            return not any((await http.get("/health")).json()["servers"].values())

        await until(sound, "all answer again", 10)


async def test_every_route_holds_its_deadline_while_postgres_is_frozen(here, servers):
    stamp = transactions.format_ms(now_ms() - OLD_MS)
    label = {"transaction_id": "a", "label": "fraud", "source": "b", "labelled_at": stamp}
    old = {"user_id": 1, "transaction_id": "a", "amount": 1, "timestamp": stamp}
    look_ups = ("/decisions?user_id=1", "/decisions?transaction_id=a", "/users/1")
    async with client(here.app(here.decision_log())) as http:
        for _ in range(3):  # so that there are connections to freeze
            await http.post("/labels", json=label)
        with frozen(servers.postgres):
            for _ in range(2):
                asked = [(http.get(path), 503, lookups.DEADLINE_S) for path in look_ups]
                asked.append((http.post("/labels", json=label), 503, routes.LABELS_S))
                asked.append((http.post("/predict", json=old), 503, 2 * lookups.DEADLINE_S))
                asked.append((http.get("/metrics"), 200, 1))
                for asking, status, deadline_s in asked:
                    began_s = time.monotonic()
                    assert (await asking).status_code == status
                    assert time.monotonic() - began_s < deadline_s + BUSY_S


async def test_every_route_holds_its_deadline_while_redis_is_frozen(here, servers):
    read_s = here.config.serving.read_timeout_ms / 1000
    async with client(here.app(here.decision_log())) as http:
        await http.post("/predict", json={"user_id": 1})
        with frozen(servers.redis):
            for _ in range(3):
                for asking in (http.post("/predict", json={"user_id": 1}), http.get("/users/1")):
                    took, _ = await took_s(asking, 503)
                    assert took < 3 * read_s + BUSY_S
