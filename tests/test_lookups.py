"""Looking decisions up, through the real routes on a real Postgres and Redis."""

import asyncio
import collections
import dataclasses
import datetime
import itertools
import signal
import uuid

import asyncpg
import orjson
import pytest
from asking import client, is_problem, validate
from pipeline import now_ms, payment, until, world
from records import decided
from served import NOW_MS, Served, transaction
from service import service
from truth import GOOD

from cerberus import transactions
from cerberus.api import openapi
from cerberus.decisions import records
from cerberus.postgres import ledger
from cerberus.serving import lookups

pytestmark = pytest.mark.anyio
PATHS = (
    f"/decisions/{uuid.uuid4()}",
    "/decisions?user_id=1",
    "/decisions?transaction_id=a",
    "/users/1",
)


def of_user(record, user_id):
    """Return a record as if another user had paid; its name is drawn from the same."""
    paid = dataclasses.replace(record.transaction, user_id=user_id)
    row = dataclasses.replace(record.decision.row, user_id=user_id)
    return dataclasses.replace(
        record,
        decision_id=records.of_transaction(paid),
        transaction=paid,
        decision=dataclasses.replace(record.decision, row=row),
    )


def public(record):
    return orjson.loads(orjson.dumps(record.public()))


async def test_what_was_predicted_is_found_by_its_id_its_transaction_and_its_user(served, http):
    await served.stream(transaction("a", user_id=7, at_ms=NOW_MS - 2_000))
    await served.credit(7, 640)
    hand = {"user_id": 7, "transaction_id": "b", "amount": 12.5, "merchant_id": "m"}
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    answers = [
        (await http.post("/predict", json=body, headers={"traceparent": trace})).json()
        for body in (hand, {"user_id": 7})
    ]
    predicted = [await served.ask(**hand), await served.ask(user_id=7)]
    await served.postgres.ledger.write([p.record for p in predicted])
    found = (await http.get(f"/decisions/{answers[0]['decision_id']}")).json()
    assert found == public(predicted[0].record)
    assert (found["trace_id"], found["door"]) == (trace.split("-")[1], "http")
    assert found["latency_ms"].keys() == {"wait", "features", "model"}
    for name in ("probability", "decision", "features", "as_of", "fence", "model_version"):
        assert found[name] == answers[0][name]
    page = (await http.get("/decisions", params={"transaction_id": "b"})).json()
    assert page == {"decisions": [found], "next": None}
    page = (await http.get("/decisions", params={"user_id": 7})).json()
    assert {d["decision_id"] for d in page["decisions"]} == {
        str(p.record.decision_id) for p in predicted
    }
    user = (await http.get("/users/7")).json()
    assert user["decisions"] == page["decisions"]
    document = openapi.document(("10m",), "USD")
    validate(document, "Decision", found)
    validate(document, "User", user)


async def test_a_user_is_shown_as_the_window_is_now(served, http):
    seen = [
        transaction(f"t{i}", user_id=7, amount_minor=100 + i, at_ms=NOW_MS - 600_000 + i * 9_000)
        for i in range(70)
    ]
    edge = [transaction("e", user_id=9, at_ms=NOW_MS - 600_000 + i) for i in (0, 1)]
    await served.stream(*edge, *seen)
    await served.credit(7, 640)
    told = [of_user(decided(i, NOW_MS - i), 7) for i in range(12)]
    await served.postgres.ledger.write(told)
    body = (await http.get("/users/7")).json()
    inside = [t for t in seen if NOW_MS - 600_000 < t.event_ms <= NOW_MS]
    assert body["features"] == {
        "txn_count_10m": len(inside),
        "total_amount_10m": sum(t.amount_minor for t in inside) / 100,
        "credit_score": 640,
    }
    assert body["fence"] == {"epoch": 1, "offset": 72, "partition": 0}
    assert (body["partition"], body["degraded"], body["approximate"]) == (0, [], False)
    assert body["as_of"] == transactions.format_ms(NOW_MS)
    assert body["events"] == [
        {"at": transactions.format_ms(t.event_ms), "amount": t.amount_minor / 100}
        for t in inside[::-1][:50]
    ]
    assert body["decisions"] == [public(record) for record in told[:10]]
    validate(openapi.document(("10m",), "USD"), "User", body)
    [event] = (await http.get("/users/9")).json()["events"]
    assert event["at"] == transactions.format_ms(NOW_MS - 599_999)
    nobody = (await http.get("/users/8")).json()
    assert (nobody["features"]["txn_count_10m"], nobody["events"], nobody["fence"]) == (0, [], None)
    validate(openapi.document(("10m",), "USD"), "User", nobody)


def of_one(key, number, at_ms):
    """Return one of many decisions on user 7, or on a transaction `same` of many users."""
    if key == "user_id":
        return of_user(decided(number, at_ms), 7)
    return of_user(decided("same", at_ms), number)


WANTED = {"user_id": 7, "transaction_id": "same"}


@pytest.mark.parametrize("key", WANTED)
@pytest.mark.parametrize("limit", [1, 7, 50, 200])
async def test_pages_hold_each_decision_once_also_at_equal_times_and_while_more_come(
    served, http, limit, key
):
    mine = [of_one(key, 100 + i, NOW_MS - i // 9) for i in range(57)]
    others = [of_user(decided(i, NOW_MS - i), 8) for i in range(57)]
    await served.postgres.ledger.write(mine + others)
    late, found, query = itertools.count(1), [], {key: WANTED[key], "limit": limit}
    while True:
        page = (await http.get("/decisions", params=query)).json()
        found += page["decisions"]
        assert len(page["decisions"]) <= limit
        assert len(found) <= len(mine)
        if page["next"] is None:
            break
        assert len(page["decisions"]) == limit
        query["before"] = page["next"]
        number = next(late)
        await served.postgres.ledger.write([of_one(key, 1_000 + number, NOW_MS + number)])
    wanted = sorted(mine, key=lambda r: (r.decision.row.as_of_ms, r.decision_id), reverse=True)
    assert found == [public(record) for record in wanted]


@pytest.mark.parametrize("key", WANTED)
async def test_before_may_be_a_time_which_is_itself_outside(served, http, key):
    mine = [of_one(key, i, NOW_MS - i) for i in range(4)]
    await served.postgres.ledger.write(mine)
    query = {key: WANTED[key], "before": transactions.format_ms(NOW_MS - 1)}
    page = (await http.get("/decisions", params=query)).json()
    assert page["decisions"] == [public(record) for record in mine[2:]]


async def test_the_decisions_on_all_transactions_of_an_id_are_shown_newest_first(served, http):
    mine = [of_user(decided("same", NOW_MS + at), user) for at in (0, 5, 3) for user in (7, 8)]
    await served.postgres.ledger.write([*mine, decided("other", NOW_MS)])
    page = (await http.get("/decisions", params={"transaction_id": "same"})).json()
    names = collections.Counter(d["decision_id"] for d in page["decisions"])
    assert names == collections.Counter(str(record.decision_id) for record in mine)
    times = [d["as_of"] for d in page["decisions"]]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("key", WANTED)
async def test_a_page_has_fifty_unless_told(served, http, key):
    await served.postgres.ledger.write([of_one(key, i, NOW_MS + i) for i in range(260)])
    for query, count in (({}, 50), ({"limit": 200}, 200)):
        page = (await http.get("/decisions", params={key: WANTED[key]} | query)).json()
        assert len(page["decisions"]) == count
        assert page["next"] is not None


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("", "transaction_id"),
        ("user_id=1&transaction_id=a", "user_id"),
        ("user_id=1&user_id=2", "user_id"),
        ("limit=5", "transaction_id"),
        ("user_id=1&limit=0", "limit"),
        ("user_id=1&limit=201", "limit"),
        ("user_id=1&limit=00000000000000000000000201", "limit"),
        ("user_id=1&limit=x", "limit"),
        ("user_id=1&limit=", "limit"),
        ("user_id=-1", "user_id"),
        ("user_id=a", "user_id"),
        ("user_id=1.5", "user_id"),
        ("user_id=1.", "user_id"),
        ("user_id=9007199254740993.0", "user_id"),
        ("user_id=9223372036854775808", "user_id"),
        ("user_id=" + "0" * 20 + "9" * 20, "user_id"),
        ("user_id=" + "1" * 5_000, "user_id"),
        ("user_id=%D9%A1", "user_id"),
        ("user_id=1&before=yesterday", "before"),
        ("user_id=1&before=2026-09-21", "before"),
        ("user_id=1&before=2026-09-21T00:00:00Z_x", "before"),
        ("transaction_id=a&before=2026-09-21", "before"),
        ("transaction_id=a&limit=201", "limit"),
        ("transaction_id=", "transaction_id"),
        ("transaction_id=%00", "transaction_id"),
        ("transaction_id=" + "x" * 129, "transaction_id"),
        ("user_id=1&after=2026-09-21T00:00:00Z", "after"),
    ],
)
async def test_a_wrong_parameter_is_named(http, query, field):
    is_problem(await http.get(f"/decisions?{query}"), "invalid", field)


async def test_a_wrong_or_unknown_name_is_told_apart(http):
    for name in ("1", "x" * 36, "%00", str(uuid.uuid4()) + "0"):
        is_problem(await http.get(f"/decisions/{name}"), "invalid", "decision_id")
    is_problem(await http.get(f"/decisions/{uuid.uuid4()}"), "unknown_decision")
    for name in ("-1", "x", "9223372036854775808", "0" * 20 + "9" * 20):
        is_problem(await http.get(f"/users/{name}"), "invalid", "user_id")
    for query in ({"user_id": 5}, {"transaction_id": "unknown"}):
        page = (await http.get("/decisions", params=query)).json()
        assert page == {"decisions": [], "next": None}


async def test_ids_that_are_written_as_numbers_are_found_by_their_digits(served, http):
    hand = {"user_id": 325.0, "transaction_id": 4711, "merchant_id": 77.0, "amount": 9}
    made = (await http.post("/predict", json=hand)).json()
    assert (made["user_id"], made["transaction_id"]) == (325, "4711")
    as_text = hand | {"user_id": 325, "transaction_id": "4711", "merchant_id": "77"}
    again = await http.post("/predict", json=as_text | {"timestamp": made["as_of"]})
    assert again.json()["decision_id"] == made["decision_id"]
    label = {"transaction_id": 4711, "label": "fraud", "source": 9, "labelled_at": made["as_of"]}
    assert (await http.post("/labels", json={"labels": [label]})).json()["stored"] == 1
    as_text = label | {"transaction_id": "4711", "source": "9"}
    assert (await http.post("/labels", json=as_text)).json()["known"] == 1
    await served.ask(**hand, timestamp=made["as_of"])  # what is answered over HTTP is stored later
    await served.postgres.ledger.write(served.kept)
    for path in (
        "/decisions?transaction_id=4711",
        "/decisions?user_id=325.0",
        "/users/325.0/decisions?limit=5.0",
        "/users/325.00",
    ):
        [found] = (await http.get(path)).json()["decisions"]
        assert (found["transaction_id"], found["merchant_id"]) == ("4711", "77")


async def test_a_store_that_is_away_is_told_with_when_to_come_back(environ, served, http):
    away = Served(environ | {"DATABASE_URL": "postgresql://secret@127.0.0.1:1/x"})
    await away.pool
    async with client(away.app()) as asked:
        for path in (*PATHS, "/accuracy"):
            refused = await asked.get(path)
            told = is_problem(refused, "decisions_unavailable")
            assert refused.headers["retry-after"] == "1"
            assert "try again in a second" in told["detail"]
            assert "secret" not in told["detail"]
    await away.close()
    blind = Served(environ | {"REDIS_URL": "redis://127.0.0.1:1/0"}, read_timeout_ms=50)
    await blind.migrated()
    async with client(blind.app()) as asked:
        refused = await asked.get("/users/1")
        is_problem(refused, "features_unavailable")
        assert refused.headers["retry-after"] == "1"
        assert (await asked.get("/decisions?user_id=1")).status_code == 200
    await blind.close()


async def test_a_database_that_refuses_us_is_told_with_when_to_come_back(environ, served, caplog):
    wrong = Served(environ | {"DATABASE_URL": f"{environ['DATABASE_URL']}_secret"})
    await wrong.pool
    async with client(wrong.app()) as asked:
        for path in (*PATHS, "/accuracy"):
            refused = await asked.get(path)
            told = is_problem(refused, "decisions_unavailable")
            assert refused.headers["retry-after"] == "1"
            assert "DATABASE_URL" in told["detail"]
            assert "secret" not in told["detail"]
            assert f"/{path.split('/')[1].partition('?')[0]} was refused" in caplog.text
        assert "_secret" in caplog.text
        refused = await asked.post("/labels", json=GOOD)
        is_problem(refused, "labels_unavailable")
        assert refused.headers["retry-after"] == "1"
    await wrong.close()


async def test_however_many_look_up_the_labels_have_connections(environ, served, http, monkeypatch):
    monkeypatch.setattr(lookups, "DEADLINE_S", 60.0)
    other = await asyncpg.connect(environ["DATABASE_URL"])
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'decisions'::regclass"
    async with other.transaction():
        await other.execute("LOCK TABLE decisions")
        asking = [asyncio.create_task(http.get(path)) for path in PATHS * 5]

        async def there_are_some():
            return await other.fetchval(waiting)

        await until(there_are_some, "look-ups wait for the lock")
        told = await http.post("/labels", json=GOOD)
        assert (told.status_code, told.json()["stored"]) == (200, 1)
        assert await other.fetchval(waiting) == lookups.AT_ONCE
        assert not any(task.done() for task in asking)
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*asking)
    assert {answer.status_code for answer in answers} == {200, 404}
    await other.close()


async def test_however_many_look_up_users_few_connections_to_redis_are_made(served, http):
    before = len(await served.client.client_list())
    answers = await asyncio.gather(*[http.get("/users/1") for _ in range(100)])
    assert {answer.status_code for answer in answers} == {200}
    assert len(await served.client.client_list()) <= before + 5


async def test_a_look_up_is_given_up_while_postgres_is_frozen(environ, servers, monkeypatch):
    # asyncpg asks for TLS also to cancel, and nobody takes the exception if it gets no answer.
    plain = {"DATABASE_URL": f"{environ['DATABASE_URL']}?sslmode=disable"}
    async with Served(environ | plain) as served, client(served.app()) as http:
        await served.migrated()
        await served.live()
        assert (await http.get(PATHS[1])).status_code == 200
        monkeypatch.setattr(lookups, "DEADLINE_S", 0.3)
        servers.postgres.kill(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                refused = await asyncio.gather(*[http.get(path) for path in PATHS * 2])
        finally:
            servers.postgres.kill(signal.SIGCONT)
        for each in refused:
            assert "within 0.3 s" in is_problem(each, "decisions_unavailable")["detail"]
            assert each.headers["retry-after"] == "1"

        async def answered():
            return (await http.get(PATHS[1])).status_code == 200

        await until(answered, "look-ups are answered again")


async def test_what_both_doors_decided_is_found_in_a_running_service(environ):
    environ |= {"CERBERUS_RATE": "0", "CERBERUS_PARTITIONS": "1"}
    at = now_ms() - 1_000
    stamp = transactions.format_ms(at)
    async with world(environ) as here:
        with service(environ) as one:
            await asyncio.to_thread(one.wait_until_ready)
            hand = {"transaction_id": "t1", "amount": 10.0, "timestamp": stamp}
            asked = one.predict(1000, **hand).json()
            await here.publish([(u, payment(1, u, at), at) for u in (1000, 1001)])
            streamed = str(transactions.decision_id(1001, "t1", at))
            for user, name in ((1000, asked["decision_id"]), (1001, streamed)):
                found = await asyncio.to_thread(
                    one.wait,
                    lambda path=f"/decisions/{name}": (
                        (r := one.http.get(path)).status_code == 200 and r.json()
                    ),
                    "the decision is stored",
                )
                assert found["door"] == ("http" if user == 1000 else "stream")
                replayed = one.predict(user, **hand).json()
                assert (replayed["decision_id"], replayed["replayed"]) == (name, True)
                page = one.http.get("/decisions", params={"user_id": user}).json()
                assert page["decisions"] == [found]
                page = one.http.get("/decisions", params={"transaction_id": "t1"}).json()
                assert found in page["decisions"]
                assert len(page["decisions"]) <= 2
                user_now = one.http.get(f"/users/{user}").json()
                assert (user_now["decisions"], user_now["features"]["txn_count_10m"]) == (
                    [found],
                    1,
                )


# Cost.

MANY = """
INSERT INTO decisions (decision_id, as_of_ms, user_id, transaction_id, amount_minor, door, features,
    degraded, approximate, score, probability, prediction, decision, model_sha256, policy_sha256,
    latency_ms, decided_at)
SELECT gen_random_uuid(), $1::bigint + i * 388800::bigint, i % 500, 't' || i, 1000, 'stream',
    '{"credit_score": 700, "txn_count_10m": 2, "total_amount_10m": 19.99}', '{}', false, -1.5, 0.25,
    'LEGIT', 'approve', 'ab', 'cd', '{}', now()
FROM generate_series(0, 19999) AS i
"""


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def literal(value):
    if isinstance(value, list):
        return f"'{{{','.join(map(str, value))}}}'"
    return f"'{value}'"


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_every_look_up_goes_by_an_index_in_every_month_and_sorts_no_page(served, mode):
    pool, kept = served.pool, served.postgres.ledger
    first = datetime.datetime(2027, 6, 1, tzinfo=datetime.UTC)
    await served.postgres.schema.migrate(first)
    await pool.execute(MANY, int(first.timestamp() * 1000))
    await pool.execute("ANALYZE decisions")
    counted = await pool.fetch(
        "SELECT tableoid::regclass::text AS part, count(*) FROM decisions GROUP BY 1"
    )
    months = {part["part"] for part in counted if part["count"] > 4_000}
    assert len(months) == 3 == len(counted)
    row = await pool.fetchrow("SELECT * FROM decisions OFFSET 9000 LIMIT 1")
    plans = []

    async def explained(query, *arguments, **_):
        async with pool.acquire() as connection:
            await connection.execute(f"SET plan_cache_mode = {mode}")
            await connection.execute(f"PREPARE asked AS {query}")
            values = ", ".join(map(literal, arguments))
            told = await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE asked ({values})")
            await connection.execute("DEALLOCATE asked")
        plans.append(orjson.loads(told)[0]["Plan"])
        return []

    looked = ledger.Ledger(pool)
    looked._fetch = explained  # type: ignore[method-assign]
    position = (row["as_of_ms"], row["decision_id"])
    for before in (ledger.LAST, position):
        await looked.of_transaction(row["transaction_id"], 50, before)
        await looked.of_user(row["user_id"], 200, before)
    pages = len(plans)
    paid = [decided(i, row["as_of_ms"]).transaction for i in range(5)]
    await looked.get(row["decision_id"])
    await looked.find(paid[:1])
    await looked.find(paid)
    assert (pages, len(plans)) == (4, 7)
    for number, plan in enumerate(plans):
        kinds = collections.defaultdict(set)
        for node in nodes(plan):
            kinds[node.get("Relation Name")].add(node["Node Type"])
        # One that is empty may be read in any way.
        by_index = {"Index Scan"} if number < pages else {"Index Scan", "Bitmap Heap Scan"}
        assert all(kinds[month] and kinds[month] <= by_index for month in months), plan
        for node in nodes(plan) if number < pages else ():
            if node["Node Type"] in ("Sort", "Incremental Sort"):
                assert not months & {below.get("Relation Name") for below in nodes(node)}, plan
    for before, found in ((ledger.LAST, [row["decision_id"]]), (position, [])):
        page = await kept.of_transaction(row["transaction_id"], 50, before)
        assert [record.decision_id for record in page] == found
