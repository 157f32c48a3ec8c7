"""Data that a store refuses: its row is set aside, and all others are stored."""

import asyncio
import random
import subprocess
import sys

import asyncpg
import orjson
import pytest
from asking import client
from faults import USERS, commits, drained, set_topic
from pipeline import now_ms, payment, running, until, world
from records import decided
from service import service

from cerberus import errors, kafka, labels, transactions
from cerberus.postgres import apart
from cerberus.postgres import pool as postgres_pool
from cerberus.stream import label_topic

pytestmark = pytest.mark.anyio
SMALL = {"CERBERUS_PARTITIONS": "1"}
REFUSALS = {
    "a check": "ALTER TABLE {} ADD CHECK ({} <> {})",
    "a trigger": """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF NEW.{1} = {2} THEN RAISE 'not this one'; END IF; RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON {0} FOR EACH ROW EXECUTE FUNCTION refuse();
""",
    "a number": """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ DECLARE small smallint; BEGIN
IF NEW.{1} = {2} THEN small := 100000; END IF; RETURN NEW; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON {0} FOR EACH ROW EXECUTE FUNCTION refuse();
""",
}


@pytest.fixture
async def here(environ):
    async with world(environ | SMALL) as opened:
        yield opened


def refuse(here, how, table, column, value):
    return here.pool.execute(REFUSALS[how].format(table, column, value))


async def dead_letters(here, topic=kafka.DEAD_LETTERS):
    return [r for records in (await here.log(topic)).values() for r in records]


@pytest.mark.parametrize("bad", [[], [0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
async def test_what_is_refused_is_told_apart_and_the_rest_is_stored_in_order(bad):
    kept = []

    async def store(rows):
        if any(row in bad for row in rows):
            raise errors.DataRefused(f"because of {[row for row in rows if row in bad]}")
        kept.extend(rows)

    refused = await apart.write(store, range(5))
    assert refused == {row: f"because of [{row}]" for row in bad}
    assert kept == [row for row in range(5) if row not in bad]


@pytest.mark.parametrize("how", REFUSALS)
@pytest.mark.parametrize("table", ["transactions", "decisions"])
async def test_a_record_that_postgres_refuses_is_a_dead_letter_and_the_others_are_stored(
    here, how, table
):
    await refuse(here, how, table, "user_id", 1003)
    at = now_ms() - 1_000
    async with running(one := here.consumer()):
        await here.publish([(u, payment(u, u, at), at) for u in USERS])
        await drained(here, one, 1)
        await asyncio.wait_for(stored_of(here, 1), 30)
        assert one.counts["refused"] == 1
        assert "refuses" in one.problems["refused"]
        [letter] = await dead_letters(here)
        assert orjson.loads(letter.value)["user_id"] == 1003
        assert b"Postgres refuses it" in dict(letter.headers)["cerberus-reason"]
        assert (await here.certain(1003, now_ms())).stats[0].count == 1
    for name in ("transactions", "decisions"):
        found = await here.pool.fetch(f"SELECT user_id FROM {name}")
        assert sorted(row["user_id"] for row in found) == sorted(set(USERS) - {1003})
    shown = [each["user_id"] for some in (await here.published()).values() for each in some]
    assert sorted(set(shown)) == sorted(set(USERS) - {1003})


def stored_of(here, partitions):
    async def committed():
        ends = {n: records[-1].offset + 1 for n, records in (await here.log()).items() if records}
        found = await commits(here, partitions)
        return all(found[number][0] >= end for number, end in ends.items())

    return until(committed, "all is committed")


async def test_a_label_that_postgres_refuses_is_invalid_and_the_others_are_stored(here):
    await refuse(here, "a check", "labels", "transaction_id", "'b'")

    def said(name):
        labelled = transactions.format_ms(now_ms())
        return {
            "transaction_id": name,
            "label": "fraud",
            "source": "bank",
            "labelled_at": labelled,
        }

    async with client(here.app(here.decision_log())) as http:
        answer = await http.post("/labels", json={"labels": [said(name) for name in "abc"]})
        assert answer.status_code == 200
        results = answer.json()["results"]
        assert [each["result"] for each in results] == ["stored", "invalid", "stored"]
        assert "Postgres refuses it" in results[1]["detail"]
        alone = await http.post("/labels", json=said("b"))
        assert (alone.status_code, alone.json()["code"]) == (422, "invalid")


async def test_a_label_on_the_topic_that_postgres_refuses_is_a_dead_letter(here):
    await refuse(here, "a check", "labels", "transaction_id", "'b'")
    topic = here.config.kafka.topic(kafka.LABELS)
    for name in "abc":
        label = labels.Label(name, "fraud", "bank", now_ms())
        await here.kafka.send_and_wait(topic, labels.encode(label))
    async with running(label_topic.LabelConsumer(here.config, here.postgres)):

        async def there():
            return await here.pool.fetchval("SELECT count(*) FROM labels") == 2

        await until(there, "the others are stored")
        letters = await until(
            lambda: dead_letters(here, kafka.LABEL_DEAD_LETTERS), "a dead letter is there"
        )
    assert [orjson.loads(each.value)["transaction_id"] for each in letters] == ["b"]


async def test_a_decision_that_postgres_refuses_is_counted_and_the_others_are_stored(here):
    await refuse(here, "a check", "decisions", "transaction_id", "'3'")
    log = here.decision_log()
    for n in range(5):
        log.put(decided(str(n), now_ms(), "1"))
    async with running(log):

        async def stored_all():
            return await here.pool.fetchval("SELECT count(*) FROM decisions") == 4

        await until(stored_all, "the others are stored")
        await until(lambda: log.report()["postgres"]["waiting"] == 0, "nothing waits")
        assert log.report()["postgres"]["dropped"] == 1
    await log.close()


@pytest.mark.parametrize(
    ("name", "value"), [("max.message.bytes", "5000"), ("cleanup.policy", "compact")]
)
async def test_a_dead_letter_that_its_topic_refuses_says_where_its_record_is(here, name, value):
    await set_topic(here, here.config.kafka.topic(kafka.DEAD_LETTERS), name, value)
    topic = here.config.kafka.topic(kafka.TRANSACTIONS)
    async with running(one := here.consumer()):
        large = random.Random(1).randbytes(20_000)
        await here.kafka.send_and_wait(topic, large)  # without a key
        at = now_ms()
        await here.publish([(1000, b"y", at), (1000, payment(1, 1000, at), at)])
        await drained(here, one, 1)
        await stored_of(here, 1)
    letters = {dict(r.headers)["cerberus-offset"]: r for r in await dead_letters(here)}
    assert letters.keys() == {b"0", b"1"}
    assert "cerberus-omitted" in dict(letters[b"0"].headers)
    assert not letters[b"0"].value
    assert letters[b"1"].value == b"y"


async def test_a_decision_too_large_for_its_topic_is_kept_by_postgres_and_counted(here):
    await set_topic(here, here.config.kafka.topic(kafka.DECISIONS), "max.message.bytes", "300")
    async with running(one := here.consumer()):
        at = now_ms()
        await here.publish([(u, payment(u, u, at), at) for u in USERS])
        await drained(here, one, 1)
        await stored_of(here, 1)
        assert one.counts["unpublished"] == len(USERS)
    assert await here.pool.fetchval("SELECT count(*) FROM decisions") == len(USERS)


@pytest.fixture
async def latin(environ, servers):
    """Make a database that is not UTF-8, and return the settings that name it."""
    name = f"{environ['DATABASE_URL'].rpartition('/')[2]}_latin"
    connection = await asyncpg.connect(servers.postgres.url)
    try:
        await connection.execute(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' "
            "TEMPLATE template0"
        )
        yield environ | {"DATABASE_URL": f"{servers.postgres.url.rpartition('/')[0]}/{name}"}
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@pytest.mark.parametrize(
    "command",
    ["migrate", "accuracy", "inspect 1", "materialize", "features apply", "features compile"],
)
async def test_a_database_that_is_not_utf_8_is_refused(latin, command):
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "cerberus", *command.split()],
        env=latin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78, done.stderr
    [line] = done.stderr.splitlines()
    assert "LATIN1" in line
    assert "ENCODING 'UTF8' TEMPLATE template0" in line


ROWS = {
    "transactions": ("transaction_id,user_id,amount,timestamp", "{0},{0},5,2026-01-0{0}T00:00:00Z"),
    "labels": ("transaction_id,label,labelled_at", "{0},fraud,2026-01-0{0}T00:00:00Z"),
    "credit_scores": ("user_id,credit_score,timestamp", "{0},700,2026-01-0{0}T00:00:00Z"),
}


@pytest.mark.parametrize("kind", ROWS)
async def test_an_imported_row_that_postgres_refuses_is_a_reject(here, environ, tmp_path, kind):
    column = "user_id" if kind == "credit_scores" else "transaction_id"
    await refuse(here, "a check", kind, column, "3" if kind == "credit_scores" else "'3'")
    head, row = ROWS[kind]
    file = tmp_path / "rows.csv"
    file.write_text("\n".join([head, *(row.format(n) for n in range(1, 6))]) + "\n")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "cerberus", "import", f"--{kind.replace('_', '-')}", file],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "4 added" in done.stdout, done.stderr
    [reject] = (tmp_path / "rows.csv.rejects.jsonl").read_text().splitlines()
    assert orjson.loads(reject)["line"] == 4
    assert "Postgres refuses it" in orjson.loads(reject)["reason"]
    assert await here.pool.fetchval(f"SELECT count(*) FROM {kind}") == 4


async def test_the_service_does_not_start_on_a_database_that_is_not_utf_8(latin):
    with service(latin) as started:
        assert await asyncio.to_thread(started.process.wait, 60) == 78
        assert "ENCODING 'UTF8' TEMPLATE template0" in started.written()


@pytest.mark.parametrize(
    "code",
    ["25P02", "25P03", "25P04", "40P01", "53100", "55P03", "57014", "57P05", "58030", "XX000"],
)
async def test_what_postgres_cannot_do_now_is_no_fault_of_the_data(here, code):
    with pytest.raises(errors.StoreUnavailable):
        async with postgres_pool.connection(here.pool) as connection:
            await connection.execute(f"DO $$ BEGIN RAISE 'no' USING ERRCODE = '{code}'; END $$")


async def test_a_postgres_that_has_no_transaction_ids_left_refuses_no_data(here):
    """It stops all writes, under the code of a row that is too large."""
    error = asyncpg.ProgramLimitExceededError("database is not accepting commands")
    error.server_source_function = "GetNewTransactionId"
    with pytest.raises(errors.StoreUnavailable, match="takes no writes"):
        async with postgres_pool.unavailable(here.pool):
            raise error


async def test_a_lock_timeout_that_the_database_sets_delays_the_stream_and_ends_nothing(
    here, database
):
    name = database.rpartition("/")[2]
    await here.pool.execute(f"ALTER DATABASE {name} SET lock_timeout = '100ms'")
    await here.pool.expire_connections()
    at = now_ms() - 1_000
    async with running(one := here.consumer()):
        await drained(here, one, 1)
        async with here.pool.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE")
            await here.publish([(u, payment(u, u, at), at) for u in USERS])
            await until(lambda: "lock timeout" in one.problems.get("store", ""), "it waits")
        await drained(here, one, 1)
    assert await here.pool.fetchval("SELECT count(*) FROM transactions") == len(USERS)
