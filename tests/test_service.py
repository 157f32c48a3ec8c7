"""The whole service in its own process, on real servers, under real signals."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys

import oracle
import pytest
from pipeline import now_ms, payment, world
from service import ROOT, service

from cerberus import kafka, settings, transactions

pytestmark = pytest.mark.anyio
QUIET = {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": "3", "CERBERUS_SESSION_TIMEOUT_S": "6"}
USERS = range(1000, 1008)


@pytest.fixture
def quiet(environ):
    return environ | QUIET


async def publish(environ, records):
    async with world(environ) as here:
        await here.publish(records)
        return await here.oracles()


def assert_predicts(running, oracles, as_of_ms):
    """Compare what /predict says of every user with the oracle of the whole log."""
    for user in USERS:
        answer = running.predict(user, timestamp=transactions.format_ms(as_of_ms)).json()
        count, cents = oracles[transactions.partition_of(user, len(oracles))].stats(user, as_of_ms)
        found = answer["features"]
        assert (found["txn_count_10m"], round(found["total_amount_10m"] * 100)) == (count, cents)
        assert answer["degraded"] == []


def until_counted(running, oracles):
    total = sum(len(told.records) for told in oracles.values())

    def counted():
        health = running.health()
        return (
            health
            and health["status"] == "ready"
            and sum(p["offset"] for p in health["partitions"].values()) == total
        )

    running.wait(counted, f"{total} records are consumed")


def some(rng, count, first=0):
    """Return payments of the last nine minutes, out of order, some of them twice."""
    records = []
    for i in range(count):
        user, at = rng.choice(USERS), now_ms() - rng.randrange(40_000)
        record = (user, payment(first + i, user, at, rng.randrange(10_000) / 100), at)
        records += [record] * rng.choice((1, 1, 1, 2))
    return records


async def test_predictions_equal_the_oracle_also_after_kill_and_restart(quiet):
    rng = random.Random(11)
    oracles = await publish(quiet, some(rng, 200))
    with service(quiet) as running:
        until_counted(running, oracles)
        assert_predicts(running, oracles, now_ms())
        oracles = await publish(quiet, some(rng, 400, 1000))
        running.end(signal.SIGKILL)
    oracles = await publish(quiet, some(rng, 100, 2000))
    with service(quiet) as running:
        until_counted(running, oracles)
        for back_ms in (0, 5_000, 20_000):
            assert_predicts(running, oracles, now_ms() - back_ms)
        status, _ = running.end()
        assert status in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


async def test_a_transaction_in_hand_is_counted_once_whichever_door_saw_it_first(quiet):
    at = now_ms() - 2_000
    hand = {
        "transaction_id": "t1",
        "amount": 12.5,
        "timestamp": transactions.format_ms(at),
    }
    with service(quiet) as running:
        running.wait_until_ready()
        asked = running.predict(1005, **hand).json()
        paid = [(user, payment(1, user, at, 12.5), at) for user in (1005, 1006)]
        until_counted(running, await publish(quiet, paid))
        streamed = running.predict(1006, **hand).json()
        assert (asked["replayed"], streamed["replayed"]) == (False, True)
        assert asked["features"] == streamed["features"]
        assert (asked["features"]["txn_count_10m"], asked["features"]["total_amount_10m"]) == (
            1,
            12.5,
        )
        again = running.predict(1005, **hand).json()
        assert again["decision_id"] == asked["decision_id"]
        assert again["fence"] is None


async def test_the_single_command_on_empty_servers_shows_a_living_system(environ):
    environ |= {"CERBERUS_RATE": "50", "CERBERUS_USERS": "20", "CERBERUS_MATERIALIZE_S": "1"}
    with service(environ) as running:
        health = running.wait_until_ready()
        assert health["producer"]["rate"] == 50
        answer = running.wait(
            lambda: (
                (a := running.predict(1005).json())
                and a["features"]["txn_count_10m"]
                and a["features"]["credit_score"]
                and a
            ),
            "user 1005 has paid and has a credit score",
        )
        assert set(answer) >= {
            "user_id",
            "prediction",
            "probability",
            "features",
            "latency_stats",
        }
        assert running.http.get("/health/live").status_code == 200
        _, written = running.end()
    lines = [json.loads(line) for line in written.splitlines()]
    assert all(line["task"] for line in lines)
    assert {"producer", "consumer", "materializer"} <= {line["task"] for line in lines}


async def test_two_workers_share_the_partitions_and_one_of_them_produces(environ):
    environ |= {"CERBERUS_RATE": "50", "CERBERUS_PARTITIONS": "4"}
    with service(environ, "--workers", "2") as running:
        owned = set()

        def shared():
            health = running.health()
            if health and health["status"] == "ready":
                owned.add(frozenset(health["partitions"]))
            pairs = itertools.combinations(filter(None, owned), 2)
            return any(one ^ other == one | other == {"0", "1", "2", "3"} for one, other in pairs)

        def producing():
            return running.written().count('"action":"producer_starts"')

        running.wait(shared, "both workers own partitions, and none of them the same")
        running.wait(producing, "one worker produces")
        running.wait(
            lambda: running.predict(1005).json().get("degraded") == [], "predictions are sound"
        )
        assert producing() == 1


async def test_parts_run_apart(quiet):
    oracles = await publish(quiet, some(random.Random(3), 50))
    with (
        service(quiet | {"CERBERUS_TASKS": "api"}) as api,
        service(quiet | {"CERBERUS_TASKS": "consumer"}) as worker,
    ):
        until_counted(worker, oracles)
        api.wait_until_ready()
        assert_predicts(api, oracles, now_ms())
        assert worker.predict(1005).status_code != 200


@pytest.mark.parametrize("name", ["KAFKA_BROKER", "REDIS_URL", "DATABASE_URL"])
def test_a_missing_setting_ends_the_start_with_one_sentence(environ, name):
    with service({k: v for k, v in environ.items() if k != name}) as running:
        assert running.process.wait(timeout=30) == 78
        [line] = [line for line in running.written().splitlines() if name in line]
        assert line.startswith("cerberus:")
        assert "Traceback" not in running.written()


def test_serving_never_imports_feast():
    code = "import cerberus.app, sys; sys.exit('feast' in sys.modules or 'pandas' in sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, timeout=60).returncode == 0


async def test_a_file_of_transactions_is_sent_whole_or_not_at_all(quiet, tmp_path):
    at = now_ms() - 1_000
    lines = [payment(i, 1005, at + i, 1.25) for i in range(3)]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_bytes(b"\n".join(lines))
    bad.write_bytes(b"\n".join([lines[0], b'{"user_id": 1}']))

    def send(path):
        return subprocess.run(
            [sys.executable, "-m", "cerberus", "send", str(path)],
            env=os.environ | quiet,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    wrong = send(bad)
    assert wrong.returncode == 1
    assert "line 2" in wrong.stderr
    assert send(good).returncode == 0
    async with world(quiet) as here:
        records = [r for rs in (await here.log()).values() for r in rs]
        assert [r.value for r in records] == [
            transactions.encode(transactions.decode(line, "USD")) for line in lines
        ]
        assert all(r.timestamp > at + 2 for r in records)
        assert settings.load(quiet).kafka.topic(kafka.TRANSACTIONS) == records[0].topic
    assert oracle.to_ms(transactions.format_ms(at)) == at
