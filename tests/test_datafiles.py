"""Rows of a file: what was written is read, in any format, from any row on."""

import csv
import dataclasses
import io
import json
import random
import re
import struct
from decimal import Decimal

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import paid, texts

from cerberus import errors, transactions
from cerberus.files import datafiles, layouts, rows

LAYOUT = layouts.Layout("shop AS merchant_id, epoch_ms(timestamp::BIGINT) AS timestamp")
FORMATS = ("csv", "jsonl", "parquet")
FIELDS = (layouts.REQUIRED, layouts.OPTIONAL)
NUMBER = re.compile(r"[+-]?\d+[\d., ']*([eE][+-]?\d+)?")


def is_plain(name):
    bare = name.strip().lower()
    return not (NUMBER.fullmatch(bare) or bare in layouts._NOTHING or set(bare) == {"#"})


in_usd = paid.map(lambda transaction: dataclasses.replace(transaction, currency="USD")).filter(
    lambda each: is_plain(each.transaction_id) and is_plain(each.merchant_id)
)
# The first look at a Parquet file imports for a second; a new file each time needs no new folder.
quietly = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None
)


def columns(transaction):
    return {
        "transaction_id": transaction.transaction_id,
        "user_id": transaction.user_id,
        "amount": transaction.amount_minor / 100,
        "timestamp": transaction.event_ms,
        "shop": transaction.merchant_id,
        "unknown": None,
    }


def write(path, rows, group=3):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    return LAYOUT.open(path, *FIELDS)


def read(file, size, start=rows.START):
    return [row for piece, _ in file.pieces(size, start) for row in piece]


@pytest.mark.parametrize("kind", FORMATS)
@quietly
@given(some=st.lists(in_usd, min_size=1, max_size=9))
def test_transactions_come_back_as_they_were_written(tmp_path, kind, some):
    file = write(tmp_path / f"rows.{kind}", [columns(each) for each in some])
    assert [layouts.transaction(row, "USD") for row in read(file, 4)] == some


@pytest.mark.parametrize("kind", FORMATS)
@quietly
@given(
    names=st.lists(texts, min_size=1, max_size=20),
    size=st.integers(1, 7),
    group=st.integers(1, 7),
)
def test_reading_goes_on_from_any_position(tmp_path, kind, names, size, group):
    rows = [{"transaction_id": name, "user_id": i} for i, name in enumerate(names)]
    path = tmp_path / f"rows.{kind}"
    rows = [row | {"amount": 1, "timestamp": 2, "shop": "a\nb"} for row in rows]
    file = write(path, rows, group)
    whole = read(file, 100)
    assert [int(row.values["user_id"]) for row in whole] == list(range(len(rows)))
    seen = 0
    for some, position in file.pieces(size):
        seen += len(some)
        assert position.rows == seen
        assert read(file, size + 1, position) == whole[seen:]
    assert seen == len(rows)
    assert file.done(position) <= file.total


@quietly
@given(stray=st.sets(st.integers(0, 299), max_size=4), size=st.integers(1, 400))
def test_a_quote_too_much_costs_its_own_line_only(tmp_path, stray, size):
    path = tmp_path / "rows.csv"
    cells = ['"Joe' if i in stray else "Joe" for i in range(300)]
    lines = [f"t{i},{i},1,2,{cell}" for i, cell in enumerate(cells)]
    path.write_text("\n".join(["transaction_id,user_id,amount,timestamp,shop", *lines]))
    rows = read(LAYOUT.open(path, *FIELDS), size)
    assert [row.line for row in rows] == list(range(2, 302))
    assert {row.line - 2 for row in rows if row.broken} == stray


@pytest.mark.parametrize("label", [["fraud"], {"a": 1}, 7, None, ""])
def test_a_label_that_is_no_word_is_refused_by_its_field(label):
    found = {"transaction_id": "a", "label": label, "labelled_at": "2026-01-01T00:00:00Z"}
    with pytest.raises(errors.InvalidInput, match="label"):
        layouts.label(rows.Row(1, found), 2**60)


GOOD = {"transaction_id": "t", "user_id": 1, "amount": 1, "timestamp": "2026-11-24T11:00:00Z"}


def judged(**changes):
    return layouts.transaction(rows.Row(1, GOOD | changes), "USD")


@given(st.integers(0, transactions.MAX_AMOUNT_MINOR))
def test_money_is_exact_however_it_is_written(cents):
    major = Decimal(cents) / 100
    for amount in (f"{major:.2f}", f"{major:.4f}", major, cents / 100):
        assert judged(amount=amount).amount_minor == cents
    single = struct.unpack("f", struct.pack("f", cents / 100))[0]
    shortest = rows.Single(str(numpy.float32(single)))
    if single < 2**17:
        assert judged(amount=shortest).amount_minor == cents
    else:
        with pytest.raises(errors.InvalidInput, match="amount: is in single precision"):
            judged(amount=shortest)


@pytest.mark.parametrize(
    ("written", "ms"),
    [
        ("2026-11-24T12:00:00.250+01:00", 1_795_518_000_250),
        ("2026-11-24 11:00:00+00", 1_795_518_000_000),  # Postgres
        ("2026-11-24 16:30:00.5+05:30", 1_795_518_000_500),
        ("2026-11-24 11:00:00 UTC", 1_795_518_000_000),  # BigQuery
        ("2026-11-24 11:00:00.123456 UTC", 1_795_518_000_123),
        ("2026-11-24T11:00:00.000+0000", 1_795_518_000_000),  # Jackson
        ("2026-11-24T11:00Z", 1_795_518_000_000),  # Java leaves seconds of 0 out
        ("2026-11-24T12:00+01:00[Europe/Berlin]", 1_795_518_000_000),
        (rows.Ms(1_795_518_000_000), 1_795_518_000_000),
    ],
)
def test_moments_as_other_systems_write_them(written, ms):
    assert judged(timestamp=written).event_ms == ms


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1793520000", "seconds"),
        ("1793520000.0", "seconds"),
        ("1793520000.123456", "seconds"),
        ("1.79352E+09", "seconds"),
        (1_793_520_000, "seconds"),
        (1_793_520_000.5, "seconds"),
        ("1793520000000", "milliseconds"),
        (Decimal(1_793_520_000_000_000), "microseconds"),
        ("1793520000000000000", "nanoseconds"),
        ("12", "is a number"),
        ("45962.3333", "is a number"),
        (rows.Ms(1_793_520_000), "seconds were read as milliseconds"),
        (rows.Ms(1_793_520_000_000_000), "2026-11-01 if milliseconds were read as seconds"),
        (rows.Ms(10**18), "2001-09-09 if"),
        (rows.Ms(-1), "1971 and 2200"),
        ("2026-11-24 11:00:00", "has no offset"),
        ("2026-11-24T11:00", "has no offset"),
        ("2026-11-24", "has no offset"),
        ("24.11.2026 11:00", "RFC 3339"),
        ("2026-11-24T24:00:00Z", "RFC 3339"),
        ("2026-11-24 24:00:00+00", "RFC 3339"),
        (True, "RFC 3339"),
        ("", "RFC 3339"),
    ],
)
def test_a_time_of_which_it_is_not_known_what_it_means_is_refused(written, said):
    with pytest.raises(errors.InvalidInput, match=f"timestamp: .*{said}"):
        judged(timestamp=written)


IDS = ("transaction_id", "user_id", "merchant_id")


@pytest.mark.parametrize("field", IDS)
@pytest.mark.parametrize(
    "written",
    [
        float(2**53),
        7.205759406317978e18,
        rows.Single(2**24),
        "1.23457E+15",
        "1,23457E+15",
        "4e+3",
        "-7.2e18",
        "9007199254740992.0",
        "7205759406317978000.0",
        "1,234",
        "12 345 678",
        "1'234'567",
        "1\u202f234",
        r"\N",
        "NULL",
        "null",
        "nan",
        "NaN",
        "None",
        "<NA>",
        "#N/A",
        " 1.23457E+15",
        "NULL ",
        "NA",
        "#NUM!",
        "########",
        "-inf",
    ],
)
def test_an_id_that_was_something_else_is_refused_by_its_field(field, written):
    with pytest.raises(errors.InvalidInput) as refused:
        judged(**{field: written})
    assert refused.value.field == field
    assert str(written) not in refused.value.reason or str(written).strip().lower() in (
        *layouts._NOTHING,
        "########",
    )


@pytest.mark.parametrize("field", IDS)
@pytest.mark.parametrize(
    "written",
    [325, 325.0, "325", "325.0", Decimal(325), Decimal("325.00"), rows.Single(325)],
)
def test_an_id_is_its_digits_however_it_is_stored(field, written):
    assert str(getattr(judged(**{field: written}), field)) == "325"
    most = 2**53 - 1
    assert str(getattr(judged(**{field: f"{most}.0"}), field)) == str(most)


@pytest.mark.parametrize(
    "name", ["INV-1.5", "1.5", "2026.11.24", "192.168.100.200", "e3", "N/B", " a ", "#1"]
)
def test_a_name_that_only_looks_like_a_number_stays(name):
    assert judged(transaction_id=name).transaction_id == name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"amount": "1.005"}, "amount"),
        ({"amount": "75.887"}, "amount"),
        ({"amount": float("nan")}, "amount"),
        ({"amount": "1e3"}, "amount"),
        ({"amount": "$1.00"}, "amount"),
        ({"amount": "1.234,56"}, "amount"),
        ({"amount": "12,50"}, "amount"),
        ({"amount": "-99.00"}, "amount"),
        ({"amount": -0.5}, "amount"),
        ({"user_id": "7.5"}, "user_id"),
        ({"user_id": 7.5}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"user_id": "C1000000815"}, "user_id"),
        ({"transaction_id": ""}, "transaction_id"),
        ({"transaction_id": 7.5}, "transaction_id"),
        ({"currency": "EUR"}, "currency"),
    ],
)
def test_a_wrong_field_is_named(changes, field):
    with pytest.raises(errors.InvalidInput) as refused:
        judged(**changes)
    assert refused.value.field == field


def test_a_line_that_never_ends_is_one_broken_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = random.Random(3)
    endless = b"[" + rng.randbytes(3 << 20).replace(b"\n", b" ") + b"\n"
    path.write_bytes(b'{"a": 1}\n' + endless + b'{"a": 2}\n[3]\n{')
    found = read(datafiles.File(path, ["a"]), 10)
    assert [row.line for row in found] == [1, 2, 3, 4, 5]
    assert [bool(row.broken) for row in found] == [False, True, False, True, True]
    assert [row.values for row in found[::2]] == [{"a": 1}, {"a": 2}, {}]
    file = datafiles.File(path, ["a"])
    positions = [position for _, position in file.pieces(1)]
    assert [read(file, 10, position) for position in positions] == [found[i:] for i in range(1, 6)]


def test_a_file_that_is_none_of_its_suffix_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no")
    with pytest.raises(errors.InvalidInput, match=r"rows\.parquet"):
        datafiles.File(path, [])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "is empty"),
        (b"transaction_id\xe9,user_id\n", "is not UTF-8: --encoding"),
        ("transaction_id\n".encode("utf-16-le"), "NUL characters: --encoding"),
        (b"transaction_id,user_id\rt1,2\r", "is not CSV"),
    ],
)
def test_a_header_that_cannot_be_read_is_said(tmp_path, header, said):
    path = tmp_path / "rows.csv"
    path.write_bytes(header)
    with pytest.raises(errors.InvalidInput, match=said):
        LAYOUT.open(path, *FIELDS)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("transaction_id,user_id,amount,Amount,timestamp,shop\nt,1,5,6,7,8\n")
    with pytest.raises(errors.InvalidInput, match=r"amount: rows\.csv has several columns"):
        LAYOUT.open(path, *FIELDS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_s_name_does_not_control_the_terminal(tmp_path, kind):
    names = ["transaction_id", "\x1b[2Juser_id", *(f"V{i}" for i in range(400))]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text(",".join(names) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({name: ["1"] for name in names}), path)
    for select in "", "user AS user_id":
        with pytest.raises(errors.InvalidInput) as told:
            layouts.Layout(select).open(path, *FIELDS)
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 500
