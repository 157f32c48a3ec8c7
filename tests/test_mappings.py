"""`--select`: SQL that maps each row by itself, sees nothing else, and fails by row and field."""

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from cerberus import errors
from cerberus.files import layouts

FIELDS = (layouts.REQUIRED, layouts.OPTIONAL)
ROWS = [
    {
        "id": f"a{i}",
        "who": f"C{100 + i}",
        "amount": "1.50",
        "booked": "2026-11-24 11:00:00",
        "n": str(i),
    }
    for i in range(9)
]
AT = "timezone('UTC', booked::TIMESTAMP) AS timestamp"
GOOD = f"id AS transaction_id, substr(who, 2) AS user_id, {AT}"


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\n".join([",".join(rows[0]), *(",".join(r.values()) for r in rows)]))
    return path


def read(path, select, size=4):
    file = layouts.Layout(select).open(path, *FIELDS)
    return [row for piece, _ in file.pieces(size) for row in piece]


def judged(path, select):
    """Return a record or the refusal of each row."""
    found: list = []
    for row in read(path, select):
        try:
            found.append(layouts.transaction(row, "USD"))
        except errors.InvalidInput as error:
            found.append((row.line, error.field, error.reason))
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_that_the_sql_cannot_map_is_refused_by_its_field_and_others_are_not(tmp_path, kind):
    rows = [dict(row) for row in ROWS]
    rows[3]["booked"], rows[6]["who"] = "yesterday", ""
    path = write(tmp_path / f"rows.{kind}", rows)
    found = judged(path, GOOD)
    bad = {each[:2] for each in found if isinstance(each, tuple)}
    first = 2 if kind == "csv" else 1
    assert bad == {(3 + first, "timestamp"), (6 + first, "user_id")}
    assert "yesterday" not in str(found)
    assert [each.user_id for each in found if not isinstance(each, tuple)] == [
        100 + i for i in range(9) if i not in (3, 6)
    ]


def test_each_of_many_rows_that_cannot_be_mapped_has_its_own_field(tmp_path):
    rows = [dict(ROWS[i % 9], who=f"C{i}") for i in range(3_000)]
    for i in range(0, 3_000, 2):
        rows[i]["booked"] = "never"
    for i in range(0, 3_000, 3):
        rows[i]["who"] = "C" + "9" * 30
    path = write(tmp_path / "rows.csv", rows)
    select = GOOD.replace("substr(who, 2)", "substr(who, 2)::BIGINT")
    found = read(path, select, 5_000)
    assert [row.line for row in found] == list(range(2, 3_002))
    assert [row.field for row in found] == [
        "user_id" if i % 3 == 0 else "timestamp" if i % 2 == 0 else "value" for i in range(3_000)
    ]
    assert all(bool(row.broken) == (row.field != "value") for row in found)
    found = read(
        path, f"{select} WHERE 1 / (n::INT % 5) > 0 AND CAST(booked AS TIMESTAMP) > '2000-01-01'"
    )
    assert {row.field for row in found} == {"value", "user_id"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_s_number_is_the_same_wherever_reading_begins(tmp_path, kind):
    path = write(tmp_path / f"rows.{kind}", ROWS)
    numbered = GOOD.replace("id AS", "file_name || row_number AS")
    wanted = [f"rows.{kind}{i + 1}" for i in range(9)]
    file = layouts.Layout(numbered).open(path, *FIELDS)
    for size in (1, 2, 9):
        for pieces, at in file.pieces(size):
            assert [row.values["transaction_id"] for row in pieces] == wanted[
                at.rows - len(pieces) : at.rows
            ]
            rest = [row for piece, _ in file.pieces(5, at) for row in piece]
            assert [row.values["transaction_id"] for row in rest] == wanted[at.rows :]


def test_where_leaves_rows_out(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS)
    found = read(path, f"{GOOD} WHERE n::INT % 2 = 1")
    assert [row.line for row in found] == [3, 5, 7, 9]


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("id AS name", "name is not a field"),
        ("id", "id is not a field"),
        ("id || who", "name each by AS"),
        ("*", "name each by AS"),
        ("id AS user_id, who AS USER_ID", "names a field twice"),
        ("nothing AS user_id", "nothing"),
        ("id AS", "is not SQL"),
        ("at::TIMESTAMP AS timestamp", "word of SQL stands in double quotes"),
        ("id AS user_id FROM data", "is not SQL"),
        ("id AS user_id; DROP TABLE data", "is not SQL"),
        ("id AS user_id UNION SELECT 1, 2", "must be expressions"),
        ("id AS user_id ORDER BY 1", "must be expressions"),
        ("id AS user_id LIMIT 1", "must be expressions"),
        ("id AS user_id GROUP BY ALL", "must be expressions|GROUP BY"),
        ("count(*) AS user_id", "GROUP BY"),
        ("row_number() OVER () AS user_id", "maps each row by itself"),
        ("uuid() AS transaction_id", "maps each row by itself"),
        ("random() AS amount", "maps each row by itself"),
        (
            "(SELECT content FROM read_text('/etc/hostname')) AS merchant_id",
            "maps each row by itself",
        ),
        ("(SELECT 1 FROM 'https://example.org/a.csv') AS merchant_id", "maps each row by itself"),
        ("(SELECT 1 FROM glob('*')) AS merchant_id", "maps each row by itself"),
        ("(SELECT max(who) FROM data) AS user_id", "maps each row by itself"),
        ("id AS user_id WHERE EXISTS (SELECT 1)", "maps each row by itself"),
        ("unnest([1, 2]) AS user_id", "maps each row by itself"),
        ("now() AS timestamp", "always alike"),
        ("CURRENT_TIMESTAMP AS timestamp", "always alike"),
        ("current_date::TIMESTAMP AS timestamp", "always alike"),
        ("getenv('HOME') AS merchant_id", "getenv"),
    ],
)
def test_sql_that_is_more_than_a_mapping_is_refused_before_a_row_is_read(tmp_path, select, said):
    path = write(tmp_path / "rows.csv", ROWS)
    with pytest.raises(errors.InvalidInput, match=f"(?s)--select.*({said})"):
        layouts.Layout(select).open(path, *FIELDS)


def test_sql_cannot_write_or_change_a_setting(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS)
    before = set(tmp_path.iterdir())
    for select in (
        f"id AS user_id; COPY (SELECT 1) TO '{tmp_path}/out.csv'",
        f"(COPY (SELECT 1) TO '{tmp_path}/out.csv') AS user_id",
        "id AS user_id; SET lock_configuration = false",
        f"id AS user_id; ATTACH '{tmp_path}/a.db'",
    ):
        with pytest.raises(errors.InvalidInput, match="--select"):
            layouts.Layout(select).open(path, *FIELDS)
    assert set(tmp_path.iterdir()) == before


IDS = ("transaction_id", "user_id", "merchant_id")


@pytest.mark.parametrize("field", IDS)
@pytest.mark.parametrize("cast", ["{}::BIGINT", "{}::DECIMAL(38, 0)::VARCHAR", "round({}::DOUBLE)"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "single.parquet"])
def test_sql_does_not_hide_that_an_id_was_a_double(tmp_path, field, cast, kind):
    big, small = (2.0**24, 2.0**24 - 1) if "single" in kind else (7.205759406317978e18, 2.0**53 - 1)
    path = tmp_path / f"rows.{kind}"
    if kind.endswith("parquet"):
        number = pyarrow.float32() if "single" in kind else pyarrow.float64()
        texts = {name: [row[name] for row in ROWS[:2]] for name in ROWS[0]}
        table = pyarrow.table(texts | {"big": pyarrow.array([big, small], number)})
        pyarrow.parquet.write_table(table, path)
    else:
        numbers = (repr(big), f"{small:.0f}") if kind == "csv" else (big, small)
        write(path, [row | {"big": n} for row, n in zip(ROWS, numbers, strict=False)])
    own = {
        "transaction_id": "id AS transaction_id",
        "user_id": "100 AS user_id",
        "merchant_id": "'m' AS merchant_id",
    } | {field: f"{cast.format('big')} AS {field}"}
    select = ", ".join([*own.values(), AT])
    refused, taken = judged(path, select)
    assert refused[1] == field
    assert "floating-point number" in refused[2]
    assert str(getattr(taken, field)) == f"{small:.0f}"


def test_types_of_parquet_become_what_they_mean(tmp_path):
    name = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    raw = bytes.fromhex(name.replace("-", ""))
    last_ns = 1_795_518_000_000_999_499  # DuckDB rounds times with ns and a zone to µs
    moments = [
        pyarrow.array([last_ns // 1000], pyarrow.timestamp("us", "Europe/Berlin")),
        pyarrow.array([last_ns // 1000], pyarrow.timestamp("us")),
        pyarrow.array([last_ns], pyarrow.timestamp("ns", "UTC")),
        pyarrow.array([last_ns], pyarrow.timestamp("ns")),
        pyarrow.array([last_ns // 10**6], pyarrow.timestamp("ms")),
    ]
    different = (
        pyarrow.array([raw], pyarrow.uuid()),
        pyarrow.array([raw], pyarrow.binary(16)),
        pyarrow.array([raw]),
        pyarrow.array([name]),
        pyarrow.array([name.encode()]),
    )
    for ids, at in zip(different, moments, strict=True):
        table = pyarrow.table(
            {
                "transaction_id": ids,
                "user_id": pyarrow.array([2**63 - 1], pyarrow.uint64()),
                "amount": pyarrow.array([4.97], pyarrow.float32()),
                "timestamp": at,
                "merchant_id": ids,
            }
        )
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(table, path)
        [paid] = judged(path, "")
        assert (paid.transaction_id, paid.merchant_id) == (name, name)
        assert (paid.user_id, paid.amount_minor) == (2**63 - 1, 497)
        assert paid.event_ms == 1_795_518_000_000


@pytest.mark.parametrize("select", ["", "at AS timestamp", "user_id AS user_id"])
def test_a_date_that_no_timestamp_holds_costs_its_row_only(tmp_path, select):
    days = pyarrow.array([20_000, 2**31 - 2, 20_001, -(2**31) + 2], pyarrow.int32())
    dates = days.cast(pyarrow.date32())
    table = pyarrow.table(
        {
            "transaction_id": ["a", "b", "c", "d"],
            "user_id": [1] * 4,
            "amount": [1.0] * 4,
            "at" if select.startswith("at") else "timestamp": dates,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = judged(tmp_path / "rows.parquet", select.replace("at AS", '"at" AS'))
    assert [isinstance(each, tuple) for each in found] == [False, True, False, True]


def test_a_parquet_file_whose_name_is_a_pattern_is_that_file(tmp_path):
    for name in ("a*.parquet", "ab.parquet", "[x].parquet", "it's.parquet"):
        row = {
            "transaction_id": name,
            "user_id": 1,
            "amount": 1.0,
            "timestamp": "2026-11-24T11:00:00Z",
        }
        path = write(pathlib.Path(tmp_path / name), [row])
        assert [each.transaction_id for each in judged(path, "")] == [name]


@pytest.mark.parametrize(
    "written", [" 1.23457E+15", "1,23457E+15 ", "9007199254740993.0", "9007199254740993,00"]
)
def test_sql_does_not_hide_digits_that_a_text_has_lost(tmp_path, written):
    path = write(tmp_path / "rows.jsonl", [row | {"big": written} for row in ROWS[:1]])
    [refused] = judged(path, f"'x' || big AS transaction_id, 1 AS user_id, {AT}")
    assert refused[1] == "transaction_id"
    exact = write(path, [row | {"big": f"{2**53 - 1}.0"} for row in ROWS[:1]])
    [taken] = judged(exact, f"'x' || big AS transaction_id, 1 AS user_id, {AT}")
    assert taken.transaction_id == f"x{2**53 - 1}.0"
