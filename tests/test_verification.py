"""Stored decisions taken again: any range, bit by bit; and a user shown to a person."""

import asyncio
import dataclasses
import math
import re
import subprocess
import sys
import uuid

import pytest
from served import NOW_MS, Served
from service import ROOT

from cerberus import transactions, window
from cerberus.commands import replay
from cerberus.decisions import records
from cerberus.features import evaluation

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served(environ):
    served = Served(environ)
    await served.migrated()
    await served.postgres.ledger.register(served.model)
    yield served
    await served.close()


async def cerberus(environ, *arguments):
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "cerberus", *arguments],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def taken(served, count):
    """Return what the model decides on many rows, one a minute."""
    rows = [
        evaluation.FeatureRow(
            user_id=i,
            as_of_ms=NOW_MS + i * 60_000,
            stats=None if i % 5 == 0 else (window.WindowStats(i % 30, i * 1_237),),
            credit_score=None if i % 7 == 0 else 300 + i % 550,
            amount_minor=None if i % 3 == 0 else i * 97,
            degraded=("stale",) if i % 4 == 0 else (),
        )
        for i in range(count)
    ]
    return [
        records.Record(uuid.uuid4(), decision, None, records.HTTP, None, NOW_MS, ("10m",))
        for decision in served.model.decide(rows)
    ]


async def verified(served, since_ms=0):
    pages = []
    found = await replay.verify(served.postgres.ledger, since_ms, pages.append)
    assert sum(pages) == found.repeated + found.unknown
    return found


async def test_decisions_are_taken_again_however_many(served):
    records = taken(served, 4_500)
    for first in range(0, len(records), 500):
        await served.postgres.ledger.write(records[first : first + 500])
    found = await verified(served)
    assert (found.repeated, found.differing, found.unknown) == (4_500, 0, 0)
    since_ms = records[4_400].decision.row.as_of_ms
    assert (await verified(served, since_ms)).repeated == 100
    assert await served.postgres.ledger.count(since_ms) == 100


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("score", lambda d: math.nextafter(d.score, 9)),
        ("probability", lambda d: math.nextafter(d.probability, 1)),
        ("prediction", lambda d: "FRAUD" if d.prediction == "LEGIT" else "LEGIT"),
        ("decision", lambda d: "review" if d.action != "review" else "approve"),
        ("amount_minor", lambda d: d.row.amount_minor + 10_000_000),
    ],
)
async def test_a_stored_decision_that_is_not_what_was_decided_is_named(served, column, value):
    records = taken(served, 30)
    wrong = records[17]
    await served.postgres.ledger.write(records)
    changed = f"UPDATE decisions SET {column} = $1 WHERE decision_id = $2"
    await served.pool.execute(changed, value(wrong.decision), wrong.decision_id)
    found = await verified(served)
    assert (found.repeated, found.differing) == (30, 1)
    [said] = found.examples
    assert said.startswith(f"{wrong.decision_id}: stored ")


async def test_what_an_unknown_model_or_policy_decided_is_counted_apart(served):
    records = taken(served, 10)
    other = dataclasses.replace(records[3].decision, policy_sha256="0" * 64)
    records[3] = dataclasses.replace(records[3], decision=other)
    await served.postgres.ledger.write(records)
    found = await verified(served)
    assert (found.repeated, found.differing, found.unknown) == (9, 0, 1)


@pytest.mark.parametrize("kind", ["model", "policy"])
async def test_the_command_ends_with_three_when_some_cannot_be_taken_again(environ, served, kind):
    records = taken(served, 10)
    known = {"model": records[3].decision.model_sha256, "policy": records[3].decision.policy_sha256}
    lost = dataclasses.replace(records[3].decision, **{f"{kind}_sha256": "0" * 64})
    broken = dataclasses.replace(records[4].decision, **{f"{kind}_sha256": "1" * 64})
    for i, decision in ((3, lost), (4, broken)):
        records[i] = dataclasses.replace(records[i], decision=decision)
    await served.pool.execute(
        "INSERT INTO artifacts (sha256, kind, content, manifest) "
        "SELECT $1, kind, content, '{\"sha256\": 1}' FROM artifacts WHERE sha256 = $2",
        "1" * 64,
        known[kind],
    )
    if kind == "policy":
        await served.pool.execute("UPDATE artifacts SET content = '{}' WHERE sha256 = $1", "1" * 64)
    await served.postgres.ledger.write(records)
    told = await cerberus(environ, "replay", "--verify")
    assert (told.returncode, told.stdout) == (3, "8 decisions made again, 0 differ\n")
    assert told.stderr.splitlines()[-1].startswith("2 decisions cannot be made again: ")
    await served.pool.execute(
        "UPDATE decisions SET probability = 0.5 WHERE decision_id = $1", records[2].decision_id
    )
    differing = await cerberus(environ, "replay", "--verify")
    assert differing.returncode == 1
    assert "2 decisions cannot be made again" in differing.stderr


async def test_the_command_ends_with_one_on_a_difference(environ, served):
    records = taken(served, 30)
    await served.postgres.ledger.write(records)
    good = await cerberus(environ, "replay", "--verify")
    assert (good.returncode, good.stdout) == (0, "30 decisions made again, 0 differ\n")
    await served.pool.execute(
        "UPDATE decisions SET probability = 0.5 WHERE decision_id = $1", records[2].decision_id
    )
    bad = await cerberus(environ, "replay", "--verify")
    assert bad.returncode == 1
    assert str(records[2].decision_id) in bad.stdout
    assert "30 decisions made again, 1 differ" in bad.stdout
    since = transactions.format_ms(records[3].decision.row.as_of_ms)
    later = await cerberus(environ, "replay", "--verify", "--since", since)
    assert (later.returncode, later.stdout) == (0, "27 decisions made again, 0 differ\n")


async def test_the_command_tells_a_wrong_argument_and_an_absent_store_from_a_difference(environ):
    for arguments, named in ((("--verify", "--since", "yesterday"), "since"), ((), "--verify")):
        wrong = await cerberus(environ, "replay", *arguments)
        assert wrong.returncode == 2
        assert named in wrong.stderr
        assert "Traceback" not in wrong.stderr
    environ["DATABASE_URL"] = "postgresql://secret@127.0.0.1:1/x"
    away = await cerberus(environ, "replay", "--verify")
    assert (away.returncode, away.stdout) == (75, "")
    assert "Postgres did not answer" in away.stderr
    shown = await cerberus(environ, "replay", "--help")
    for status in (wrong.returncode, away.returncode, 0, 1, 3, 78):
        assert re.search(rf"\b{status}\b", shown.stdout.partition("Exit status:")[2])


async def test_a_user_is_shown_to_a_person(environ, served):
    await served.live()
    hand = {"user_id": 7, "transaction_id": "b", "amount": 12.5}
    told = await served.ask(**hand)
    await served.postgres.ledger.write([told.record])
    shown = await cerberus(environ, "inspect", "7")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("user 7 as of ")
    for text in (str(told.record.decision_id), told.record.decision.action, "txn_count_10m"):
        assert text in shown.stdout
    wrong = await cerberus(environ, "inspect", "me")
    assert wrong.returncode != 0
    assert "user_id" in wrong.stderr
    assert "Traceback" not in wrong.stderr
