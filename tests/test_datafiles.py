"""Rows of a file: what was written is read, in any format, from any row on."""

import csv
import dataclasses
import datetime
import io
import json
import random
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import paid, texts

from cerberus import errors, transactions
from cerberus.files import datafiles, importing, layouts

LAYOUT = layouts.Layout(columns={"merchant_id": "shop"}, timestamp_format="epoch_ms")
FORMATS = ("csv", "jsonl", "parquet")
FIELDS = (layouts.REQUIRED, layouts.OPTIONAL)
in_usd = paid.map(lambda transaction: dataclasses.replace(transaction, currency="USD"))
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


def read(file, size, start=datafiles.START):
    return [row for rows, _ in file.pieces(size, start) for row in rows]


@pytest.mark.parametrize("kind", FORMATS)
@quietly
@given(some=st.lists(in_usd, min_size=1, max_size=9))
def test_transactions_come_back_as_they_were_written(tmp_path, kind, some):
    file = write(tmp_path / f"rows.{kind}", [columns(each) for each in some])
    assert [LAYOUT.transaction(row, "USD") for row in read(file, 4)] == some


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
        importing.read_label(found, LAYOUT, {"1": "fraud"}, 2**60)


@given(st.integers(0, transactions.MAX_AMOUNT_MINOR))
def test_money_is_exact_however_it_is_written(cents):
    row = {"transaction_id": 1, "user_id": "7", "timestamp": 0}
    major = Decimal(cents) / 100
    for layout, amount in (
        (LAYOUT, f"{major:.2f}"),
        (LAYOUT, f"{major:.4f}"),
        (LAYOUT, major),
        (LAYOUT, cents / 100),
        (dataclasses.replace(LAYOUT, amount_unit="minor"), cents),
        (dataclasses.replace(LAYOUT, amount_unit="minor"), f"{cents}.0"),
    ):
        read = layout.transaction(datafiles.Row(1, row | {"amount": amount}), "USD")
        assert (read.amount_minor, read.user_id, read.transaction_id) == (cents, 7, "1")


@pytest.mark.parametrize(
    ("kind", "written", "ms"),
    [
        ("rfc3339", "2026-11-24T12:00:00.250+01:00", 1_795_518_000_250),
        ("utc", "2026-11-24 11:00:00", 1_795_518_000_000),
        ("utc", "2026-11-24T12:00:00+01:00", 1_795_518_000_000),
        ("epoch_s", "1795518000.2509", 1_795_518_000_250),
        ("epoch_s", 1_795_518_000, 1_795_518_000_000),
        ("epoch_ms", 1_795_518_000_000.0, 1_795_518_000_000),
        ("rfc3339", "2026-11-24 11:00:00", None),
        ("epoch_s", "2026-11-24T12:00:00Z", None),
        ("epoch_s", 10**18, None),
        ("epoch_ms", -1, None),
        ("epoch_ms", True, None),
        ("epoch_ms", datetime.date(2026, 11, 24), 1_795_478_400_000),
    ],
)
def test_moments_in_each_format(kind, written, ms):
    layout = dataclasses.replace(LAYOUT, timestamp_format=kind)
    row = datafiles.Row(1, {"transaction_id": "t", "user_id": 1, "amount": 1, "timestamp": written})
    if ms is not None:
        assert layout.transaction(row, "USD").event_ms == ms
    else:
        with pytest.raises(errors.InvalidInput, match="timestamp"):
            layout.transaction(row, "USD")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"amount": "1.005"}, "amount"),
        ({"amount": float("nan")}, "amount"),
        ({"amount": "1e3"}, "amount"),
        ({"user_id": "7.5"}, "user_id"),
        ({"user_id": 7.5}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": None}, "user_id"),
        ({"transaction_id": ""}, "transaction_id"),
        ({"currency": "EUR"}, "currency"),
    ],
)
def test_a_wrong_field_is_named(changes, field):
    row = {"transaction_id": "t", "user_id": 1, "amount": 1, "timestamp": 0} | changes
    with pytest.raises(errors.InvalidInput) as refused:
        LAYOUT.transaction(datafiles.Row(1, row), "USD")
    assert refused.value.field == field


def test_a_line_that_never_ends_is_one_broken_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rng = random.Random(3)
    endless = b"[" + rng.randbytes(3 << 20).replace(b"\n", b" ") + b"\n"
    path.write_bytes(b'{"a": 1}\n' + endless + b'{"a": 2}\n[3]\n{')
    rows = read(datafiles.File(path, ["a"]), 10)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert [bool(row.broken) for row in rows] == [False, True, False, True, True]
    assert [row.values for row in rows[::2]] == [{"a": 1}, {"a": 2}, {}]
    file = datafiles.File(path, ["a"])
    positions = [position for _, position in file.pieces(1)]
    assert [read(file, 10, position) for position in positions] == [rows[i:] for i in range(1, 6)]


def test_a_file_that_is_none_of_its_suffix_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no")
    with pytest.raises(errors.InvalidInput, match=r"rows\.parquet"):
        datafiles.File(path, [])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "is empty"),
        ("transaction_id\n".encode("utf-16"), "is not UTF-8"),
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
    path.write_text("transaction_id,user_id,amount,amount,timestamp\nt,1,5,6,7\n")
    with pytest.raises(errors.InvalidInput, match=r"amount: rows\.csv has several columns"):
        LAYOUT.open(path, *FIELDS)
