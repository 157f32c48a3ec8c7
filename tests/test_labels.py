"""The truth about transactions, told late and in any order; and what was known at any moment."""

import asyncio
import contextlib
import itertools
import json
import pathlib
import random
import re
import statistics

import asyncpg
import jsonschema
import orjson
import pytest
from asking import client, is_problem
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pipeline import now_ms, until
from served import NOW_MS, Served
from truth import (
    DAY_MS,
    GOOD,
    POSITIVE,
    Told,
    decided,
    kept,
    key,
    label,
    matured,
    truth,
)

from cerberus import errors, labels, synthetic, transactions
from cerberus.api import bodies, openapi
from cerberus.postgres import stores

pytestmark = pytest.mark.anyio
ROOT = pathlib.Path(__file__).parent.parent
RULES = labels.Rules(30 * DAY_MS, False)
texts = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=128)


# Pure.


@given(
    st.builds(
        labels.Label,
        transaction_id=texts,
        label=st.sampled_from(labels.VOCABULARY),
        source=texts,
        labelled_ms=st.integers(31_536_000_000, 7_258_118_399_999),
        user_id=st.none() | st.integers(0, transactions.MAX_USER_ID),
    )
)
def test_a_label_that_is_written_is_read_back(told):
    assert labels.decode(labels.encode(told), told.labelled_ms) == told


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"transaction_id": None}, "transaction_id"),
        ({"transaction_id": ""}, "transaction_id"),
        ({"transaction_id": "x" * 129}, "transaction_id"),
        ({"label": None}, "label"),
        ({"label": "FRAUD"}, "label"),
        ({"label": ["fraud"]}, "label"),
        ({"source": None}, "source"),
        ({"source": ""}, "source"),
        ({"source": "x" * 129}, "source"),
        ({"source": "a\0b"}, "source"),
        ({"labelled_at": None}, "labelled_at"),
        ({"labelled_at": "2026-01-31"}, "labelled_at"),
        ({"labelled_at": transactions.format_ms(NOW_MS + 1)}, "labelled_at"),
        ({"user_id": "7"}, "user_id"),
        ({"user_id": -1}, "user_id"),
        ({"user_id": 2.0**53}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"transaction_id": 1.5}, "transaction_id"),
        ({"transaction_id": 1e21}, "transaction_id"),
        ({"source": True}, "source"),
    ],
)
def test_what_is_wrong_with_a_label_is_named(change, field):
    with pytest.raises(errors.InvalidInput) as caught:
        labels.parse(GOOD | change, NOW_MS)
    assert caught.value.field == field
    assert len(caught.value.reason) > 8


def test_a_label_may_write_its_ids_as_numbers():
    written = orjson.dumps(GOOD | {"transaction_id": 4711, "source": 7.0, "user_id": 325.0})
    read = labels.decode(written, NOW_MS)
    assert (read.transaction_id, read.source, read.user_id) == ("4711", "7", 325)
    assert labels.parse_request({"labels": [orjson.loads(written)]}, NOW_MS) == [read]


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b'"fraud"'])
def test_a_record_that_holds_no_object_is_refused(value):
    with pytest.raises(errors.InvalidInput, match="value"):
        labels.decode(value, NOW_MS)


def test_frauds_are_found_out_exponentially_late_and_each_always_the_same():
    people = synthetic.Population(100, 0, "USD", 3)
    paid = [
        labelled.transaction
        for labelled, _ in zip(people.traffic(0, 50.0), range(4000), strict=False)
    ]
    found = [synthetic.found_out(each, 3, 600.0) for each in paid]
    late_s = [(f.labelled_ms - p.event_ms) / 1000 for f, p in zip(found, paid, strict=True)]
    assert min(late_s) >= 0
    # Of an exponential, mean and deviation are one; half of it lies below 0.69 of the mean.
    assert statistics.mean(late_s) == pytest.approx(600, rel=0.1)
    assert statistics.stdev(late_s) == pytest.approx(600, rel=0.1)
    assert statistics.median(late_s) == pytest.approx(416, rel=0.1)
    share = sum(f.label == "chargeback" for f in found) / len(found)
    assert share == pytest.approx(synthetic.CHARGEBACK_SHARE, abs=0.03)
    assert {f.label for f in found} == {"fraud", "chargeback"}
    assert [synthetic.found_out(each, 3, 600.0) for each in reversed(paid)] == found[::-1]
    assert synthetic.found_out(paid[0], 4, 600.0) != found[0]
    assert synthetic.found_out(paid[0], 3, 0.0).labelled_ms == paid[0].event_ms


# In Postgres.


@contextlib.asynccontextmanager
async def opened(database, rules=RULES):
    async with asyncpg.create_pool(database, min_size=0, max_size=8) as pool:
        postgres = stores.on(pool, ("10m",), rules)
        await postgres.schema.migrate()
        yield pool, postgres


@pytest.fixture
async def pool_and_store(database):
    async with opened(database) as both:
        yield both


@pytest.fixture
def pool(pool_and_store):
    return pool_and_store[0]


@pytest.fixture
def postgres(pool_and_store):
    return pool_and_store[1]


async def training_rows(pool, t_ms):
    rows = await pool.fetch("SELECT * FROM training_rows_as_of($1)", t_ms)
    assert len({row["decision_id"] for row in rows}) == len(rows)
    return {
        row["decision_id"]: (
            (row["label"], row["label_source"], row["labelled_ms"], row["label_seen_ms"]),
            row["matured"],
            row["truth"],
        )
        for row in rows
    }


def expected(records, told, t_ms, rules):
    found = {}
    for record in records:
        if record.transaction is None or record.decided_ms > t_ms:
            continue
        known = told.of(record, t_ms)
        shown = (None,) * 4
        if known is not None:
            shown = (known.label, known.source, known.labelled_ms, told.seen[known])
        found[record.decision_id] = (
            shown,
            matured(record, t_ms, rules.maturity_ms),
            truth(record, known, t_ms, rules),
        )
    return found


# Few values each, so that ids, users, moments and sources meet.
tellings = st.builds(
    labels.Label,
    transaction_id=st.sampled_from(["a", "b"]),
    label=st.sampled_from(labels.VOCABULARY),
    source=st.sampled_from(["bank", "Bank", "desk"]),
    labelled_ms=st.integers(100, 103),
    user_id=st.sampled_from([None, 1, 2]),
)
decided_once = st.builds(
    decided,
    st.sampled_from(["a", "b", "c", None]),
    st.integers(90, 110),
    user_id=st.sampled_from([1, 2]),
    action=st.sampled_from(["approve", "review", "decline"]),
    late_ms=st.integers(0, 8),
)


@hypothesis_settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(st.lists(tellings, max_size=6), max_size=6),
    records=st.lists(decided_once, max_size=8, unique_by=lambda r: r.decision_id),
    again=st.randoms(use_true_random=False),
    friendly=st.booleans(),
)
async def test_at_any_moment_the_newest_label_that_had_reached_us_stands_for_ever(
    database, arrivals, records, again, friendly
):
    rules = labels.Rules(10, friendly)
    async with opened(database, rules) as (pool, postgres):
        await pool.execute("TRUNCATE labels, decisions")
        await postgres.ledger.write(records)
        told, answers = Told(), {}
        for at, batch in enumerate(arrivals):
            seen_ms = 100 + 3 * at
            assert await postgres.labels.write(batch, seen_ms) == told.tell(batch, seen_ms)
            repeated = again.choices(list(told.seen), k=3) if told.seen else []
            assert not any(await postgres.labels.write(repeated, seen_ms + 1))
            answers[seen_ms + 2] = await training_rows(pool, seen_ms + 2)
        assert await kept(pool) == {key(each): seen for each, seen in told.seen.items()}
        for t_ms, then in answers.items():
            # What came later has not changed what was known at t.
            assert await training_rows(pool, t_ms) == then
        for t_ms in range(98, 126, 3):
            assert await training_rows(pool, t_ms) == expected(records, told, t_ms, rules)


async def test_the_newest_label_wins_whatever_the_order_in_which_they_arrive(pool, postgres):
    record = decided("order-1", NOW_MS)
    await postgres.ledger.write([record])
    rng = random.Random(2)
    history = [label(what=rng.choice(labels.VOCABULARY), at=NOW_MS - i) for i in range(8)]
    for _ in range(10):
        await pool.execute("TRUNCATE labels")
        rng.shuffle(history)
        for i, each in enumerate(history):
            await postgres.labels.write([each], NOW_MS + i)
        [(shown, _, _)] = (await training_rows(pool, NOW_MS + 100)).values()
        newest = max(history, key=lambda each: each.labelled_ms)
        assert shown[:3] == (newest.label, "bank", NOW_MS)


async def test_one_who_shares_an_id_with_another_is_not_labelled_with_him(pool, postgres):
    mine, other = (decided("order-1", NOW_MS, user_id=user) for user in (1, 2))
    await postgres.ledger.write([mine, other])
    await postgres.labels.write([label(user_id=1)], NOW_MS)
    rows = await training_rows(pool, NOW_MS)
    assert (rows[mine.decision_id][2], rows[other.decision_id][2]) == (True, None)
    # A newer one that names nobody is about both.
    await postgres.labels.write([label(what="legitimate", at=NOW_MS + 1)], NOW_MS + 2)
    rows = await training_rows(pool, NOW_MS + 2)
    assert {row[2] for row in rows.values()} == {False}


async def test_a_label_waits_for_a_decision_that_comes_later(pool, postgres):
    await postgres.labels.write([label(at=NOW_MS - 500)], NOW_MS - 400)
    await postgres.ledger.write([record := decided("order-1", NOW_MS)])
    assert (await training_rows(pool, NOW_MS))[record.decision_id][2] is True


async def test_writers_side_by_side_store_each_label_once(postgres):
    some = [label(f"order-{i % 300}", at=NOW_MS - i) for i in range(3_000)]
    rng = random.Random(1)
    await asyncio.gather(
        *(postgres.schema.check() for _ in range(6))
    )  # connections first, then a race
    new = await asyncio.gather(
        *(postgres.labels.write(rng.sample(some, 3_000), NOW_MS) for _ in range(6))
    )
    assert sum(map(sum, new)) == 3_000
    assert postgres.labels.counts == {"stored": 3_000, "known": 5 * 3_000}


async def test_rules_are_told_once_and_again_where_the_tables_are_made_anew(database):
    async with asyncpg.create_pool(database) as pool:

        async def maturity_ms():
            return await pool.fetchval("SELECT maturity_ms FROM label_rules")

        serving = [stores.on(pool, ("10m",), labels.Rules(i, True)) for i in (1, 2)]
        for postgres in serving:
            await postgres.schema.migrate()
        await stores.on(pool, ("10m",)).schema.migrate()
        await serving[0].schema.migrate()  # as each hour: who started last is right
        assert await maturity_ms() == 2
        await pool.execute("DROP SCHEMA public CASCADE")
        await pool.execute("CREATE SCHEMA public")
        await serving[0].schema.migrate()
        assert await maturity_ms() == 1


@pytest.mark.parametrize("friendly", [False, True])
async def test_every_label_is_true_or_false_and_silence_counts_only_when_mature(database, friendly):
    rules = labels.Rules(5 * DAY_MS, friendly)
    async with opened(database, rules) as (pool, postgres):
        said = (*labels.VOCABULARY, None)
        actions = ("approve", "review", "decline")
        records = {
            (what, action): decided(f"{what} {action}", NOW_MS, action=action)
            for what, action in itertools.product(said, actions)
        }
        await postgres.ledger.write(list(records.values()))
        await postgres.labels.write(
            [label(f"{what} {action}", what) for what, action in records if what], NOW_MS
        )
        positive = POSITIVE | ({"friendly_fraud"} if friendly else set())
        for t_ms, mature in ((NOW_MS + 5 * DAY_MS - 1, False), (NOW_MS + 5 * DAY_MS, True)):
            rows = await training_rows(pool, t_ms)
            for (what, action), record in records.items():
                _, matured, is_fraud = rows[record.decision_id]
                silent = False if mature and action != "decline" else None
                assert matured == mature
                assert is_fraud == (silent if what is None else what in positive), (what, action)


async def test_postgres_takes_the_vocabulary_and_nothing_else(pool):
    insert = "INSERT INTO labels VALUES ('t', NULL, $1, 's', 1, 1)"
    for what in labels.VOCABULARY:
        await pool.execute(insert, what)
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute(insert, "FRAUD")


async def test_the_views_follow_the_settings_of_the_last_migration(database):
    ago_ms = now_ms() - 3 * DAY_MS
    record = decided("order-1", ago_ms)
    for days, mature in ((30, False), (2, True)):
        async with opened(database, labels.Rules(days * DAY_MS, False)) as (pool, postgres):
            await postgres.ledger.write([record])
            # One who was told nothing of the rules changes none.
            await stores.on(pool, ("10m",)).schema.migrate()
            assert await pool.fetchval("SELECT matured FROM training_rows") == mature
            assert await pool.fetchval("SELECT count(*) FROM matured_decisions") == mature


async def test_decisions_that_were_there_before_labels_can_be_judged(database):
    ours = ROOT / "cerberus" / "postgres" / "migrations"
    async with asyncpg.create_pool(database, min_size=0, max_size=2) as pool:
        await pool.execute(
            "CREATE TABLE schema_migrations (name text PRIMARY KEY, "
            "applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
        )
        for name in ("001_initial.sql", "002_decisions.sql"):
            await pool.execute((ours / name).read_text())
            await pool.execute("INSERT INTO schema_migrations (name) VALUES ($1)", name)
        postgres = stores.on(pool, ("10m",), RULES)
        await postgres.ledger.write([record := decided("order-1", NOW_MS)])
        assert "003_labels.sql" in await postgres.schema.migrate()
        await postgres.labels.write([label()], NOW_MS)
        assert (await training_rows(pool, NOW_MS))[record.decision_id][2] is True


async def test_every_query_of_the_documentation_runs(pool, postgres):
    ago_ms = now_ms() - 40 * DAY_MS
    await postgres.ledger.write([decided(f"order-{i}", ago_ms + i) for i in range(3)])
    await postgres.labels.write([label("order-1", at=ago_ms)], ago_ms)
    page = (ROOT / "docs" / "labels.md").read_text()
    queries = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for name in ("labels_as_of(", "training_rows", "training_rows_as_of(", "matured_decisions"):
        assert any(name in query for query in queries), name
    for query in queries:
        assert await pool.fetch(query) != [], query


# POST /labels, through the real routes.


def operation():
    return openapi.document(("10m",), "USD")["paths"]["/labels"]["post"]


def validate(schema, body):
    components = openapi.document(("10m",), "USD")["components"]
    jsonschema.Draft202012Validator({**schema, "components": components}).validate(body)


def of(content):
    return content["content"]["application/json"]["schema"]


async def test_each_item_of_a_request_is_told_what_became_of_it(served, http):
    await served.postgres.labels.write([label("known")], NOW_MS - 5)
    later = {"labelled_at": transactions.format_ms(NOW_MS + 60_001)}
    items = [
        GOOD,
        GOOD | {"transaction_id": "known"},
        GOOD | {"label": "suspicious"},
        GOOD,
        GOOD | later,
        "fraud",
        GOOD | {"transaction_id": "order-2", "user_id": 7, "note": "of no interest"},
        GOOD | {"labelled_at": transactions.format_ms(NOW_MS + 60_000)},
    ]
    response = await http.post("/labels", json={"labels": items})
    assert response.status_code == 200
    body = response.json()
    validate(of(operation()["responses"]["200"]), body)
    assert [(r["result"], r.get("field")) for r in body["results"]] == [
        ("stored", None),
        ("known", None),
        ("invalid", "label"),
        ("known", None),
        ("invalid", "labelled_at"),
        ("invalid", "labels"),
        ("stored", None),
        ("stored", None),
    ]
    assert (body["stored"], body["known"], body["invalid"]) == (3, 2, 3)
    assert await kept(served.pool) == {
        key(label("known")): NOW_MS - 5,
        key(label()): NOW_MS,
        key(label("order-2", user_id=7)): NOW_MS,
        key(label(at=NOW_MS + 60_000)): NOW_MS,
    }
    scraped = (await http.get("/metrics")).text
    for outcome, count in (("stored", 4), ("known", 2), ("invalid", 3)):
        assert f'cerberus_labels_total{{outcome="{outcome}"}} {count}.0' in scraped


async def test_one_label_alone_is_stored_or_refused_as_a_whole(served, http):
    validate(of(operation()["requestBody"]), GOOD)
    assert (await http.post("/labels", json=GOOD)).json()["results"] == [{"result": "stored"}]
    assert (await http.post("/labels", json=GOOD)).json()["results"] == [{"result": "known"}]
    refused = await http.post("/labels", json=GOOD | {"label": "suspicious"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
    assert refused.json()["field"] == "label"
    assert "account_takeover" in refused.json()["detail"]


async def test_a_request_holds_up_to_a_thousand_labels_and_a_mebibyte(served, http):
    many = [GOOD | {"transaction_id": "ä" * 120 + f"{i:08d}"} for i in range(1_000)]
    body = orjson.dumps({"labels": many})
    assert bodies.MAX_BYTES < len(body) < 2**20
    assert (await http.post("/labels", content=body)).json()["stored"] == 1_000
    assert (await http.post("/predict", content=body)).status_code == 413
    for items in ([], [GOOD] * 1_001, {}, "fraud", None):
        refused = await http.post("/labels", json={"labels": items})
        assert (refused.status_code, refused.json()["field"]) == (422, "labels")
    huge = await http.post("/labels", content=b'{"labels": [' + b" " * 2**20 + b"]}")
    assert (huge.status_code, huge.json()["code"]) == (413, "too_large")
    for broken in (b"{", b"[]", b"1"):
        assert (await http.post("/labels", content=broken)).json()["code"] == "not_json"


async def test_while_postgres_is_away_labels_are_refused_and_may_be_sent_again(environ):
    away = Served(environ | {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x"})
    await away.pool
    try:
        async with client(away.app()) as http:
            refused = await http.post("/labels", json={"labels": [GOOD]})
    finally:
        await away.close()
    told = is_problem(refused, "labels_unavailable")
    assert refused.headers["retry-after"] == "1"
    assert "send the whole request again in a second" in told["detail"]


async def test_the_label_of_the_readme_is_taken(served, http):
    readme = (ROOT / "README.md").read_text()
    [body] = re.findall(r"localhost:8000/labels .*--data '([^']+)'", readme)
    served.now_ms = now_ms()
    assert (await http.post("/labels", json=json.loads(body))).json()["stored"] == 1


async def test_a_flood_of_labels_is_refused_at_once_and_leaves_connections(environ, served, http):
    other = await asyncpg.connect(environ["DATABASE_URL"])
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'labels'::regclass"
    async with other.transaction():
        await other.execute("LOCK TABLE labels")
        asking = [asyncio.create_task(http.post("/labels", json=GOOD)) for _ in range(300)]

        async def refused():
            held = await other.fetchval(waiting)
            assert held <= 2
            return held == 2 and sum(task.done() for task in asking) == 100

        await until(refused, "those too many are refused, and two have a connection")
    answers = await asyncio.gather(*asking)
    assert sum(answer.status_code == 200 for answer in answers) == 200
    for answer in answers:
        if answer.status_code != 200:
            is_problem(answer, "overloaded")
            assert answer.headers["retry-after"] == "1"
    await other.close()
