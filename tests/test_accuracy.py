"""Accuracy: what is mature is compared with the truth, and what is not is never shown as known."""

import asyncio
import collections
import contextlib
import json
import os

import asyncpg
import jsonschema
import pytest
from asking import client
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from served import NOW_MS, Served
from truth import DAY_MS, GOOD, Told, decided, label, matured, truth

import cerberus.__main__
from cerberus import errors, labels, settings, transactions
from cerberus.api import openapi, parameters
from cerberus.commands import accuracy
from cerberus.postgres import judged, stores

pytestmark = pytest.mark.anyio
MIDNIGHT_MS = NOW_MS // DAY_MS * DAY_MS
MATURITY_MS = 2 * DAY_MS
MODELS = ("aa" * 32, "ab" * 32)


@contextlib.asynccontextmanager
async def opened(database, rules):
    async with asyncpg.create_pool(database, min_size=0, max_size=4) as pool:
        postgres = stores.on(pool, ("10m",), rules)
        await postgres.schema.migrate()
        yield pool, postgres


def day_of(record):
    return transactions.format_ms(record.transaction.event_ms)[:10]


def figures(records, told, t_ms, rules):
    """Judge decisions one by one, as docs/labels.md says."""
    of = collections.Counter()
    for record in records:
        is_fraud = truth(record, told.of(record, t_ms), t_ms, rules)
        action, money = record.decision.action, record.transaction.amount_minor
        if not matured(record, t_ms, rules.maturity_ms):
            of["immature"] += 1
        elif is_fraud is None:
            of["excluded"] += 1
        else:
            flagged = action in ("review", "decline")
            of["matured"] += 1
            of["positives"] += is_fraud
            of["flagged"] += flagged
            of["found"] += flagged and is_fraud
            of["caught"] += money * (is_fraud and action == "decline")
            of["reviewed"] += money * (is_fraud and action == "review")
            of["missed"] += money * (is_fraud and action == "approve")
            of["wrongly_declined"] += money * (not is_fraud and action == "decline")
    genuine, wrong = of["matured"] - of["positives"], of["flagged"] - of["found"]
    return {
        **{name: of[name] for name in ("matured", "positives", "flagged", "found")},
        "precision": of["found"] / of["flagged"] if of["flagged"] else None,
        "recall": of["found"] / of["positives"] if of["positives"] else None,
        "false_positive_rate": wrong / genuine if genuine else None,
        "money": {
            name: of[name] / 100 for name in ("caught", "reviewed", "missed", "wrongly_declined")
        },
        "excluded": of["excluded"],
        "immature": of["immature"],
    }


def expected(records, told, t_ms, rules):
    """Return model → (total, figures by day)."""
    known = [r for r in records if r.transaction is not None and r.decided_ms <= t_ms]
    found = {}
    for model in {record.decision.model_sha256 for record in known}:
        ours = [record for record in known if record.decision.model_sha256 == model]
        days = {
            day: figures([r for r in ours if day_of(r) == day], told, t_ms, rules)
            for day in map(day_of, ours)
        }
        found[model] = (figures(ours, told, t_ms, rules), days)
    return found


def laid_out(report):
    return {
        model["model_version"]: (
            model["total"],
            {day["day"]: {k: v for k, v in day.items() if k != "day"} for day in model["days"]},
        )
        for model in report["models"]
    }


moments = st.integers(0, 5).flatmap(
    lambda day: st.sampled_from([-1, 0, 1, 40_000_000]).map(
        lambda ms: MIDNIGHT_MS - 5 * DAY_MS + day * DAY_MS + ms
    )
)
names = st.sampled_from("abcdefgh")
decided_once = st.builds(
    decided,
    names | st.none(),
    moments,
    action=st.sampled_from(["approve", "review", "decline"]),
    minor=st.integers(0, 10**6),
    model=st.sampled_from(MODELS),
    late_ms=st.sampled_from([0, 0, 1, DAY_MS]),
)
tellings = st.builds(
    labels.Label,
    transaction_id=names,
    label=st.sampled_from(labels.VOCABULARY),
    source=st.just("bank"),
    labelled_ms=moments,
    user_id=st.sampled_from([None, 1]),
)


@hypothesis_settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    records=st.lists(decided_once, max_size=30, unique_by=lambda r: r.decision_id),
    arrivals=st.lists(st.tuples(moments, st.lists(tellings, max_size=5)), max_size=5),
    asked=st.lists(moments | moments.map(lambda ms: ms + MATURITY_MS), min_size=1, max_size=3),
    friendly=st.booleans(),
    since_ms=st.none() | moments,
    prefix=st.sampled_from([None, "a", "ab", "b", MODELS[0], "0"]),
)
async def test_the_figures_are_those_of_judging_one_by_one(
    database, records, arrivals, asked, friendly, since_ms, prefix
):
    rules, told = labels.Rules(MATURITY_MS, friendly), Told()
    async with opened(database, rules) as (pool, postgres):
        await pool.execute("TRUNCATE labels, decisions")
        await postgres.ledger.write(records)
        for seen_ms, batch in sorted(arrivals, key=lambda one: one[0]):
            told.tell(batch, seen_ms)
            await postgres.labels.write(batch, seen_ms)
        query, chosen = {}, [r for r in records if r.transaction is not None]
        if since_ms is not None:
            query["since"] = transactions.format_ms(since_ms)
            chosen = [r for r in chosen if r.transaction.event_ms >= since_ms]
        if prefix is not None:
            query["model"] = prefix
            chosen = [r for r in chosen if r.decision.model_sha256.startswith(prefix)]
        for t_ms in asked:
            report = await postgres.judged.report(t_ms, parameters.accuracy(query))
            assert laid_out(report) == expected(chosen, told, t_ms, rules)
            for total, days in laid_out(report).values():
                counted = ("matured", "excluded", "immature")
                by_day = sum(figures[name] for figures in days.values() for name in counted)
                assert sum(total[name] for name in counted) == by_day
            for model in report["models"]:
                days = [day["day"] for day in model["days"]]
                assert days == sorted(days, reverse=True)


async def test_nothing_is_said_of_what_is_not_mature_whatever_is_labelled_already(database):
    async with opened(database, labels.Rules(MATURITY_MS, False)) as (_, postgres):
        actions = ("approve", "review", "decline")
        await postgres.ledger.write([decided(action, NOW_MS, action=action) for action in actions])
        await postgres.labels.write([label(action) for action in actions], NOW_MS)
        for t_ms, known in ((NOW_MS + MATURITY_MS - 1, False), (NOW_MS + MATURITY_MS, True)):
            report = await postgres.judged.report(t_ms, judged.Question())
            [model] = report["models"]
            shares = [model["total"][n] for n in ("precision", "recall", "false_positive_rate")]
            assert shares == ([1.0, 2 / 3, None] if known else [None] * 3)
            assert (model["total"]["matured"], model["total"]["immature"]) == (
                (3, 0) if known else (0, 3)
            )
            assert any(model["total"]["money"].values()) == known
            shown = accuracy.describe(report)
            assert ("nothing can be judged yet" in shown) == (not known)
            assert ("66.67%" in shown) == known


async def test_a_label_moves_the_figures_once_the_decision_is_mature(environ):
    served = Served(environ)
    try:
        await served.migrated()
        rules = labels.Rules(MATURITY_MS, False)
        await stores.on(served.pool, ("10m",), rules).schema.migrate()
        await served.postgres.ledger.write(
            [decided("order-1", NOW_MS), decided("order-2", NOW_MS, action="review")]
        )
        async with client(served.app()) as http:

            async def recall():
                [model] = (await http.get("/accuracy")).json()["models"]
                return model["total"]["recall"]

            assert (await http.post("/labels", json=GOOD)).json()["stored"] == 1
            assert await recall() is None
            served.now_ms += MATURITY_MS
            assert await recall() == 0.0
            late = GOOD | {"transaction_id": "order-2", "label": "chargeback"}
            assert (await http.post("/labels", json=late)).json()["stored"] == 1
            assert await recall() == 0.5
            mended = {"label": "legitimate", "labelled_at": transactions.format_ms(NOW_MS + 1)}
            assert (await http.post("/labels", json=GOOD | mended)).json()["stored"] == 1
            assert await recall() == 1.0
            body = (await http.get("/accuracy")).json()
            document = openapi.document(("10m",), "USD")
            schema = {"$ref": "#/components/schemas/Accuracy"}
            schema["components"] = document["components"]
            jsonschema.Draft202012Validator(schema).validate(body)
            assert (body["label_maturity_days"], body["friendly_fraud_is_fraud"]) == (2.0, False)
    finally:
        await served.close()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("since=yesterday", "since"),
        ("since=2026-02-30", "since"),
        ("since=", "since"),
        ("model=", "model"),
        ("model=xyz", "model"),
        (f"model={'a' * 65}", "model"),
        ("until=2026-01-01", "until"),
    ],
)
async def test_a_wrong_question_names_its_parameter(environ, query, field):
    served = Served(environ)
    try:
        async with client(served.app()) as http:
            refused = await http.get(f"/accuracy?{query}")
    finally:
        await served.close()
    assert (refused.status_code, refused.json().get("field")) == (422, field)


async def test_one_report_is_made_at_a_time(database):
    async with opened(database, labels.Rules(MATURITY_MS, False)) as (_, postgres):
        asked = [postgres.judged.report(NOW_MS, judged.Question()) for _ in range(3)]
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in told] == [dict, errors.Overloaded, errors.Overloaded]
        assert (await postgres.judged.report(NOW_MS, judged.Question()))["models"] == []


async def test_a_report_that_takes_too_long_is_given_up_and_says_what_to_do(database):
    async with opened(database, labels.Rules(MATURITY_MS, False)) as (pool, postgres):
        async with pool.acquire() as other, other.transaction():
            await other.execute("LOCK TABLE decisions")
            with pytest.raises(errors.DecisionsUnavailable, match="set `since`"):
                await postgres.judged.report(NOW_MS, judged.Question(), timeout_s=0.2)
        assert (await postgres.judged.report(NOW_MS, judged.Question()))["models"] == []


def test_a_date_begins_at_midnight_in_utc():
    assert parameters.since_ms("2026-11-24") == parameters.since_ms("2026-11-24T01:00:00+01:00")


def test_the_command_line_shows_the_same_as_the_route(environ, monkeypatch, capsys):
    config = settings.load(environ)
    rules = labels.Rules(config.labels.maturity_ms, config.labels.friendly_fraud_is_fraud)

    async def fill():
        async with opened(config.postgres.url, rules) as (_, postgres):
            await postgres.ledger.write(
                [
                    decided("a", NOW_MS - 99 * DAY_MS, action="decline", minor=123_456_789),
                    decided("b", NOW_MS - 98 * DAY_MS, model="cd" * 32),
                ]
            )
            await postgres.labels.write([label("a")], NOW_MS - 90 * DAY_MS)

    asyncio.run(fill())
    for name, value in environ.items():
        monkeypatch.setitem(os.environ, name, value)
    assert cerberus.__main__.main(["accuracy"]) == 0
    shown = capsys.readouterr().out
    assert "judged 30 days after" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("all") and "1,234" in line]
    assert line.split()[:7] == ["all", "1", "1", "100.00%", "100.00%", "-", "1,234,567.89"]
    assert line.split()[7:] == ["0.00"] * 3 + ["0"] * 2
    since = transactions.format_ms(NOW_MS - 98 * DAY_MS)[:10]
    assert cerberus.__main__.main(["accuracy", "--since", since, "--model", "cd"]) == 0
    shown = capsys.readouterr().out
    assert ("cd" * 32 in shown, "ab" in shown.split()) == (True, False)
    assert cerberus.__main__.main(["accuracy", "--model", "xyz"]) == 2
    assert "model" in capsys.readouterr().err


_MANY = """
INSERT INTO decisions (decision_id, as_of_ms, user_id, transaction_id, amount_minor, currency,
    merchant_id, door, features, degraded, approximate, score, probability, prediction, decision,
    model_sha256, policy_sha256, decided_at)
SELECT gen_random_uuid(), at, i % 500, 'order-' || i, 1000, 'USD', 'm', 'stream', '{}', '{}', false,
    -1, 0.5, 'LEGIT', 'approve', 'ab', 'cd', timestamptz 'epoch' + at * interval '1 millisecond'
FROM (SELECT i, $1::bigint + i * 1000 AS at FROM generate_series(0, 49999) AS i) AS t
"""


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


async def test_the_report_reads_each_decision_once_and_joins_labels_in_bulk(database):
    async with opened(database, labels.Rules(MATURITY_MS, False)) as (pool, _):
        await pool.execute(_MANY, MIDNIGHT_MS)
        rest = (
            "SELECT 'order-' || 20 * i, NULL, 'fraud', 'bank', 1, 1 FROM generate_series(1, 900) i"
        )
        await pool.execute(f"INSERT INTO labels {rest}")
        await pool.execute("ANALYZE")
        explained = await pool.fetchval(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {judged._COUNT}", NOW_MS + 9 * DAY_MS, 0, ""
        )
        plan = [*nodes(json.loads(explained)[0]["Plan"])]
        kinds = collections.Counter(node["Node Type"] for node in plan)
        # The functions are no black boxes, and no label is looked up for one decision at a time.
        assert not {"Function Scan", "ProjectSet"} & kinds.keys()
        looked_up = [node for node in plan if node.get("Relation Name") == "labels"]
        assert len(looked_up) == 2
        assert all(node["Actual Loops"] <= 3 for node in looked_up)  # one a parallel worker
        scans = [n for n in plan if str(n.get("Relation Name", "")).startswith("decisions")]
        tables = [node["Relation Name"] for node in scans]
        assert len(tables) == len(set(tables))
        assert sum(n["Actual Rows"] * n["Actual Loops"] for n in scans) == pytest.approx(
            50_000, abs=10
        )
