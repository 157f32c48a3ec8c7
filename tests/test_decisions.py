"""A decision survives every way of keeping it, to the bit, and can be taken again from there."""

import asyncio
import dataclasses
import uuid

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from records import SPANS, bits, paid, records, rows

from cerberus import settings
from cerberus.decisions import models
from cerberus.decisions import records as decision_records
from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import stores

MODEL = models.Model.load(settings.MODEL_PATH, ("10m",))
one_window = records(decide=MODEL.decide, spans=("10m",))


def same(one, other):
    return one == other and bits(one.decision) == bits(other.decision)


@given(records())
def test_a_claim_s_bytes_read_back_as_the_same_record(record):
    assert same(decision_records.unpack(record.pack()), record)


@given(records())
def test_what_a_record_shows_names_it_and_holds_what_was_served(record):
    shown, row = record.public(), record.decision.row
    assert uuid.UUID(shown["decision_id"]) == record.decision_id
    assert shown["features"] == decision_records.show_features(row, record.spans)
    spans, stats, credit_score = decision_records.read_features(shown["features"])
    assert (spans, stats, credit_score) == (record.spans, row.stats, row.credit_score)
    assert (shown["fence"] is None) == (row.fence is None)
    assert shown["degraded"] == row.degraded


@given(paid, paid)
def test_only_a_transaction_s_identity_names_its_decision(one, other):
    def identity(t):
        return (t.user_id, t.transaction_id, t.event_ms)

    names = [decision_records.of_transaction(t) for t in (one, other)]
    assert (names[0] == names[1]) == (identity(one) == identity(other))
    copied = dataclasses.replace(other, amount_minor=one.amount_minor, merchant_id="")
    assert decision_records.of_transaction(copied) == names[1]
    assert names[0].version == 8


@given(records(), paid)
def test_the_field_that_differs_is_named(record, other):
    mine = record.transaction
    if mine is None:
        assert record.differing(other) == "amount"
        return
    assert record.differing(mine) is None
    amount = mine.amount_minor + 1
    assert record.differing(dataclasses.replace(mine, amount_minor=amount)) == "amount"
    elsewhere = dataclasses.replace(mine, merchant_id=mine.merchant_id + "x")
    unsaid = dataclasses.replace(mine, merchant_id="")
    assert record.differing(elsewhere) == ("merchant_id" if mine.merchant_id else None)
    assert record.differing(unsaid) is None


@pytest.fixture(scope="module")
def _loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def ledger(environ, _loop):
    """Give what calls a ledger, empty at each call."""

    async def opened():
        pool = await postgres_pool.connect(settings.load(environ))
        postgres = stores.on(pool, SPANS)
        await postgres.schema.migrate()
        return pool, postgres.ledger

    pool, kept = _loop.run(opened())

    async def call_of_an_empty_ledger(call):
        await pool.execute("TRUNCATE decisions, artifacts")
        return await call(kept)

    yield lambda call: _loop.run(call_of_an_empty_ledger(call))
    _loop.run(pool.close())


on_servers = hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@on_servers
@given(batch=st.lists(records(), min_size=1, max_size=8, unique_by=lambda r: r.decision_id))
def test_a_record_is_stored_to_the_bit(ledger, batch):
    async def there_and_back(kept):
        await kept.write(batch)
        return [await kept.get(record.decision_id) for record in batch]

    for found, record in zip(ledger(there_and_back), batch, strict=True):
        assert same(found, record)


@on_servers
@given(batch=st.lists(one_window, min_size=1, max_size=8, unique_by=lambda r: r.decision_id))
def test_a_stored_decision_is_taken_again_with_the_same_bits(ledger, batch):
    async def there_and_back(kept):
        await kept.register(MODEL)
        await kept.write(batch)
        stored = await kept.get(batch[0].decision_id)
        versions = stored.decision.model_sha256, stored.decision.policy_sha256
        found = [await kept.get(record.decision_id) for record in batch]
        return await kept.model(*versions), found

    model, stored = ledger(there_and_back)
    again = model.decide([record.decision.row for record in stored])
    for decision, record, first in zip(again, stored, batch, strict=True):
        assert decision == record.decision == first.decision
        assert bits(decision) == bits(first.decision)


@given(rows(spans=("10m",)))
def test_a_claimed_decision_is_taken_again_with_the_same_bits(row):
    [decision] = MODEL.decide([row])
    record = decision_records.Record(
        uuid.uuid4(), decision, None, decision_records.HTTP, None, row.as_of_ms, ("10m",)
    )
    [again] = MODEL.decide([decision_records.unpack(record.pack()).decision.row])
    assert (again, bits(again)) == (decision, bits(decision))


def test_a_model_or_policy_that_is_not_kept_is_none(ledger):
    async def ask(kept):
        await kept.register(MODEL)
        known = MODEL.sha256, MODEL.policy.sha256
        return [
            await kept.model(*known) is not None,
            await kept.model(known[0], "0" * 64) is None,
            await kept.model("0" * 64, known[1]) is None,
        ]

    assert ledger(ask) == [True] * 3


@on_servers
@given(
    batch=st.lists(one_window, min_size=1, max_size=8, unique_by=lambda r: r.decision_id),
    data=st.data(),
)
def test_what_was_taken_on_transactions_is_found_by_them_and_first_stays(ledger, batch, data):
    decided = [record for record in batch if record.transaction]
    other = [dataclasses.replace(r, trace_id="ab" * 16, decided_ms=1) for r in decided]
    some = data.draw(st.lists(st.sampled_from(decided))) if decided else []

    async def there_and_back(kept):
        await kept.write(decided)
        await kept.write(other)
        return await kept.find([record.transaction for record in some])

    assert ledger(there_and_back) == {record.decision_id: record for record in some}
