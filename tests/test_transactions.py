"""Transactions: what is written is read back; what is wrong is named."""

import uuid

import orjson
import pytest
from aiokafka.partitioner import murmur2
from hypothesis import given
from hypothesis import strategies as st

from cerberus import errors, transactions

GOOD = {
    "transaction_id": "t1",
    "user_id": 1005,
    "amount": 12.5,
    "currency": "USD",
    "merchant_id": "m1",
    "timestamp": "2026-01-31T12:00:00.123Z",
}


def is_id(text):
    try:
        transactions.check_id("transaction_id", text)
    except errors.InvalidInput:
        return False
    return True


texts = (
    st.text(min_size=1, max_size=128)
    .filter(lambda s: "\0" not in s)
    .filter(str.isprintable)
    .filter(is_id)
)


@given(
    st.builds(
        transactions.Transaction,
        transaction_id=texts,
        user_id=st.integers(0, transactions.MAX_USER_ID),
        amount_minor=st.integers(0, transactions.MAX_AMOUNT_MINOR),
        currency=st.just("USD"),
        merchant_id=texts | st.just(""),
        event_ms=st.integers(31_536_000_000, 7_258_118_399_999),
    )
)
def test_decode_reads_back_what_encode_wrote(transaction):
    assert transactions.decode(transactions.encode(transaction), "USD") == transaction


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transaction_id", ""),
        ("transaction_id", 1.5),
        ("transaction_id", True),
        ("transaction_id", 2.0**53),
        ("transaction_id", 1e21),
        ("transaction_id", 2**63),
        ("transaction_id", 1e30),
        ("transaction_id", [7]),
        ("transaction_id", "x" * 129),
        ("transaction_id", "a\0b"),
        ("user_id", "1005"),
        ("user_id", True),
        ("user_id", -1),
        ("user_id", 1.5),
        ("user_id", 2.0**53),
        ("user_id", 1e18),
        ("user_id", 1e300),
        ("user_id", 2**63),
        ("amount", "12.50"),
        ("amount", 12.505),
        ("amount", -0.01),
        ("amount", 1e300),
        ("amount", True),
        ("currency", "EUR"),
        ("merchant_id", 5.5),
        ("merchant_id", False),
        ("merchant_id", -(2.0**53)),
        ("timestamp", 1738324800),
        ("timestamp", "2026-01-31T12:00:00"),
        ("timestamp", "2026-02-30T12:00:00Z"),
        ("timestamp", "2026-W48-2T22:00:00Z"),
        ("timestamp", "2026-01-31T22+00:00:00"),
        ("timestamp", "2026-01-31T22:00:00,5Z"),
        ("timestamp", "1969-12-31T23:59:59Z"),
        # Versions of Python differ about each of these.
        ("timestamp", "2026-01-31T24:00:00Z"),
        ("timestamp", "2026-01-31T24:00:00.000+01:00"),
        ("timestamp", "2026-01-31T23:59:60Z"),
        ("timestamp", "2026-01-31T23:60:00Z"),
        ("timestamp", "2026-01-31T22:00:00+24:00"),
        ("timestamp", "2026-01-31T22:00:00+05:60"),
    ],
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(errors.InvalidInput) as caught:
        transactions.decode(orjson.dumps(GOOD | {field: value}), "USD")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1970-01-21T18:12:00Z", "2026-11-01 if seconds were read as milliseconds"),
        ("1970-01-01T00:29:53.520Z", "2026-11-01 if seconds were read as microseconds"),
        ("1970-01-01T00:00:01.794Z", "2026-11-06 if seconds were read as nanoseconds"),
        ("1970-12-31T23:59:59Z", "1971 and 2200"),
    ],
)
def test_a_time_of_another_unit_is_refused_and_the_likely_unit_is_named(written, said):
    with pytest.raises(errors.InvalidInput, match=f"timestamp: .*{said}"):
        transactions.decode(orjson.dumps(GOOD | {"timestamp": written}), "USD")


@pytest.mark.parametrize("field", ["user_id", "transaction_id", "merchant_id"])
def test_an_id_that_a_double_rounded_is_refused_with_the_reason(field):
    written = orjson.dumps(GOOD | {field: "?"}).replace(b'"?"', b"9007199254740993.0")
    with pytest.raises(errors.InvalidInput, match="floating-point number") as caught:
        transactions.decode(written, "USD")
    assert caught.value.field == field


@pytest.mark.parametrize("written", ["325", "325.0", "3.25e2", "32500E-2"])
def test_an_integer_is_taken_in_every_form_that_json_has_for_it(written):
    text = orjson.dumps(GOOD | dict.fromkeys(("user_id", "transaction_id", "merchant_id"), "?"))
    read = transactions.decode(text.replace(b'"?"', written.encode()), "USD")
    assert (read.user_id, read.transaction_id, read.merchant_id) == (325, "325", "325")
    assert type(read.user_id) is int


@pytest.mark.parametrize(
    ("written", "digits"),
    [
        (12345, "12345"),
        (-7, "-7"),
        (-0.0, "0"),
        (2**63 - 1, "9223372036854775807"),
        (2.0**53 - 1, "9007199254740991"),
    ],
)
def test_a_whole_number_is_taken_as_its_digits_where_a_text_is_wanted(written, digits):
    told = orjson.dumps(GOOD | {"transaction_id": written, "merchant_id": written})
    read = transactions.decode(told, "USD")
    assert (read.transaction_id, read.merchant_id) == (digits, digits)


@pytest.mark.parametrize("value", [None, b"", b"[1]", b"{", b"\xff"])
def test_what_is_not_a_json_object_is_refused(value):
    with pytest.raises(errors.InvalidInput, match="value"):
        transactions.decode(value, "USD")


@given(st.integers(0, transactions.MAX_USER_ID), st.integers(1, 200))
def test_a_user_is_where_kafkas_default_partitioner_puts_the_key(user_id, partitions):
    digest = murmur2(str(user_id).encode()) & 0x7FFFFFFF
    assert transactions.partition_of(user_id, partitions) == digest % partitions


@given(st.integers(0, transactions.MAX_USER_ID), texts, st.integers(0, 10**13))
def test_a_decision_has_one_name_at_every_door(user_id, transaction_id, event_ms):
    name = transactions.decision_id(user_id, transaction_id, event_ms)
    assert name == transactions.decision_id(user_id, transaction_id, event_ms)
    assert name != transactions.decision_id(user_id, transaction_id, event_ms + 1)
    assert (name.version, name.variant) == (8, uuid.RFC_4122)


@pytest.mark.parametrize("field", ["transaction_id", "merchant_id"])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1.23457E+15", "lost digits"),
        ("9e+15", "lost digits"),
        ("-7,2e18", "lost digits"),
        ("NULL", "no value"),
        (r"\N", "no value"),
        ("NaN", "no value"),
        ("#N/A", "no value"),
    ],
)
def test_what_is_written_where_an_id_is_missing_or_too_long_is_no_id(field, written, said):
    with pytest.raises(errors.InvalidInput, match=f"{field}: .*{said}"):
        transactions.decode(orjson.dumps(GOOD | {field: written}), "USD")


@pytest.mark.parametrize("written", ["12e5", "4e3", "nullable", "325.0", "n", "Nan-7"])
def test_an_id_that_only_looks_like_one_of_these_is_taken(written):
    read = transactions.decode(orjson.dumps(GOOD | {"transaction_id": written}), "USD")
    assert read.transaction_id == written
