"""The log of decisions on requests: no reply waits for it, and it says what it could not keep."""

import asyncio
import dataclasses
import signal
import socket
import threading
import time

import httpx
import orjson
import pytest
from pipeline import now_ms, running, until, world
from records import decided
from served import Served
from service import service

from cerberus import claims, settings
from cerberus.decisions import records as decision_records
from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import stores
from cerberus.serving import outbox

pytestmark = pytest.mark.anyio
QUIET = {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": "1", "CERBERUS_SESSION_TIMEOUT_S": "6"}


@pytest.fixture
async def here(environ):
    async with world(environ | QUIET) as opened:
        yield opened


def some(count, first=0):
    at_ms = now_ms()
    return [decided(i, at_ms + i) for i in range(first, first + count)]


def waiting(log):
    return {name: told["waiting"] for name, told in log.report().items()}


async def stored(here):
    return await here.pool.fetchval("SELECT count(*) FROM decisions")


async def assert_both_have(here, records):
    for record in records:
        assert await here.postgres.ledger.get(record.decision_id) == record
    assert await stored(here) == len(records)
    shown = await here.published()
    assert shown.keys() == {str(record.decision_id) for record in records}
    for told in shown.values():
        assert all(each == told[0] for each in told)


async def test_what_is_put_reaches_both_stores_with_the_model_that_took_it(here):
    records = some(1_200)
    async with running(log := here.decision_log()):
        for record in records:
            log.put(record)
        await until(lambda: not any(waiting(log).values()), "all is stored")
    await log.close()
    await assert_both_have(here, records)
    assert await here.postgres.ledger.model(here.model.sha256, here.model.policy.sha256)


async def test_what_is_left_is_stored_when_it_is_closed(here):
    records = some(30)
    log = here.decision_log()
    for record in records:
        log.put(record)
    await log.close()
    await assert_both_have(here, records)


async def test_a_full_buffer_takes_no_more_and_counts_what_it_did_not_take(here):
    log = here.decision_log(buffer=20)
    for record in some(25):
        log.put(record)
    assert [(told["waiting"], told["dropped"]) for told in log.report().values()] == [(20, 5)] * 2
    await log.close()
    assert await stored(here) == 20
    log.put(some(1)[0])
    assert waiting(log) == {"postgres": 1, "kafka": 1}  # there is room again
    await log.close()


async def test_what_is_asked_again_while_it_waits_takes_no_more_room(here):
    log = here.decision_log(buffer=2)
    records = some(2)
    for record in records * 3:
        log.put(record)
    assert [(told["waiting"], told["dropped"]) for told in log.report().values()] == [(2, 0)] * 2
    await log.close()
    await assert_both_have(here, records)


async def test_a_full_buffer_is_shown_and_no_reply_waits_for_it(environ):
    away = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "KAFKA_BROKER": "127.0.0.1:1"}
    served = Served(environ | away, buffer=3)
    await served.live()
    transport = httpx.ASGITransport(served.app(), client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for user_id in range(5):
            assert (await http.post("/predict", json={"user_id": user_id})).status_code == 200
        health = (await http.get("/health")).json()
        metrics = (await http.get("/metrics")).text.splitlines()
    await served.close()
    assert health["status"] == "degraded"
    for store in ("postgres", "kafka"):
        assert (health["decisions"][store]["waiting"], health["decisions"][store]["dropped"]) == (
            3,
            2,
        )
        assert any(r.startswith("2 decisions were not stored: " + store) for r in health["reasons"])
        assert f'cerberus_decisions_waiting{{store="{store}"}} 3.0' in metrics
        assert f'cerberus_decisions_dropped_total{{store="{store}"}} 2.0' in metrics


@pytest.mark.parametrize("frozen", [True, False])
async def test_while_postgres_is_away_decisions_wait_and_kafka_has_them(here, servers, frozen):
    records = some(40)
    async with running(log := here.decision_log()):
        log.put(records[0])
        await until(lambda: not any(waiting(log).values()), "the first is stored")
        if frozen:
            servers.postgres.kill(signal.SIGSTOP)
        else:
            await asyncio.to_thread(servers.postgres.stop)
        try:
            for record in records[1:]:
                log.put(record)
            await until(lambda: waiting(log) == {"postgres": 39, "kafka": 0}, "kafka has them")
            if not frozen:
                await until(lambda: log.report()["postgres"]["problem"], "the trouble is said")
                assert log.report()["postgres"]["oldest_s"] > 0
        finally:
            if frozen:
                servers.postgres.kill(signal.SIGCONT)
            else:
                await asyncio.to_thread(servers.postgres.start)
        await until(lambda: not any(waiting(log).values()), "all is stored")
        assert [told["problem"] for told in log.report().values()] == [None, None]
    await log.close()
    await assert_both_have(here, records)


async def test_while_postgres_is_away_the_claims_of_what_waits_do_not_run_out(here, servers):
    first, second = some(2)
    records = [first, dataclasses.replace(second, door=decision_records.STREAM)]
    names = [claims.key(here.config, record.decision_id) for record in records]
    await asyncio.to_thread(servers.postgres.stop)
    try:
        async with running(log := here.decision_log(claim_ms=3_000)):
            for record in records:
                log.put(record)
            for _ in range(2):

                async def alive():
                    return all([await here.redis.pttl(name) > 30_000 for name in names])

                await until(alive, "the claims have all their life")
                for name, record in zip(names, records, strict=True):
                    assert decision_records.unpack(await here.redis.get(name)) == record
                    await here.redis.pexpire(name, 2_000)
    finally:
        await asyncio.to_thread(servers.postgres.start)
    await log.close()
    await assert_both_have(here, records)


async def test_while_kafka_is_away_decisions_wait_and_postgres_has_them(here, servers):
    records = some(40)
    async with running(log := here.decision_log()):
        log.put(records[0])
        await until(lambda: not any(waiting(log).values()), "the first is stored")
        servers.kafka.kill(signal.SIGSTOP)
        try:
            for record in records[1:]:
                log.put(record)
            await until(lambda: waiting(log) == {"postgres": 0, "kafka": 39}, "postgres has them")
            assert await stored(here) == 40
        finally:
            servers.kafka.kill(signal.SIGCONT)
        await until(lambda: not any(waiting(log).values()), "all is published")
    await log.close()
    await assert_both_have(here, records)


async def test_what_cannot_be_stored_at_the_end_is_told_within_bounds(environ, caplog):
    away = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}
    async with world(environ | QUIET) as here, asyncio.timeout(20):
        async with postgres_pool.connect(settings.load(environ | away)) as pool:
            postgres = stores.on(pool, here.config.windows.spans)
            claimed = claims.Claims(
                here.config, here.redis, postgres.ledger, lambda: here.online.spoken
            )
            log = outbox.DecisionLog(here.config, here.model, postgres, claimed)
            for record in some(3):
                log.put(record)
            await log.close()
        assert len(await here.published()) == 3
    lost = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert [said.partition(": ")[0] for said in lost] == ["3 decisions did not reach postgres"]


# The whole service.


class Clients:
    """Ask for predictions, several at once, until nobody answers any more.

    Attributes:
        answered: The decisions that were told with status 200, with the wall clock, ms.
    """

    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}/predict"
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(3)]
        self.answered = []

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        for thread in self._threads:
            thread.join(30)

    def _ask(self, number):
        with httpx.Client(timeout=5) as http:
            try:
                for user_id in range(number, 10**6, 3):
                    response = http.post(self._url, json={"user_id": user_id})
                    if response.status_code == 200:
                        self.answered.append((response.json()["decision_id"], now_ms()))
                    time.sleep(0.005)
            except httpx.TransportError:
                return


async def missing(here, answered):
    """Return when those were answered that Postgres does not have, ms."""
    rows = await here.pool.fetch("SELECT decision_id FROM decisions")
    known = {str(row["decision_id"]) for row in rows}
    return [at_ms for name, at_ms in answered if name not in known]


class Slow:
    """A request whose body ends only after the service was told to end."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        head = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 15\r\n\r\n{"
        self._socket.sendall(head.encode())

    def end(self):
        with self._socket:
            self._socket.sendall(b'"user_id":123}')
            answer = b"".join(iter(lambda: self._socket.recv(65_536), b""))
            return orjson.loads(answer.partition(b"\r\n\r\n")[2])


async def test_sigterm_leaves_no_answered_decision_behind(environ, here):
    environ |= QUIET | {"CERBERUS_DECISION_FLUSH_MS": "10000"}
    with service(environ) as one:
        await asyncio.to_thread(one.wait_until_ready)
        slow = await asyncio.to_thread(Slow, one.port)
        with Clients(one.port) as clients:
            await asyncio.sleep(1)
            assert len(await missing(here, clients.answered)) > 20  # only the end stores them
            one.process.send_signal(signal.SIGTERM)

        async def flushed():
            return not await missing(here, clients.answered)

        await until(flushed, "its tasks have stopped")
        late = await asyncio.to_thread(slow.end)
        await asyncio.to_thread(one.process.wait, 30)
        clients.answered.append((late["decision_id"], now_ms()))
        assert await missing(here, clients.answered) == []
    assert (await here.published()).keys() >= {name for name, _ in clients.answered}


async def test_a_kill_loses_no_more_than_the_last_moment_s_decisions(environ, here):
    slow_machine_ms = 2_000
    with service(environ | QUIET) as one:
        await asyncio.to_thread(one.wait_until_ready)
        with Clients(one.port) as clients:
            await asyncio.sleep(4)
            killed_ms = now_ms()
            await asyncio.to_thread(one.end, signal.SIGKILL)
    lost = await missing(here, clients.answered)
    bound_ms = killed_ms - here.config.decisions.flush_ms - slow_machine_ms
    assert min(at_ms for _, at_ms in clients.answered) < bound_ms
    assert [at_ms for at_ms in lost if at_ms < bound_ms] == []
