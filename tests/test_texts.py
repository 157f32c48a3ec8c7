"""Texts as programs write them: any encoding, packed, arrays, lines before the header."""

import gzip
import io
import json
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerberus import errors
from cerberus.files import datafiles, layouts, rows, texts

FIELDS = (layouts.REQUIRED, layouts.OPTIONAL)
HEAD = "transaction_id;user_id;amount;timestamp;merchant_id\r\n"
LINES = "".join(f"t{i};7;1.00;2026-11-24T11:00:00Z;Bäckerei {i}\r\n" for i in range(5))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\{}[],é\n', max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


def shops(path, encoding=""):
    file = layouts.Layout(encoding=encoding).open(path, *FIELDS)
    found = [row for piece, _ in file.pieces(2) for row in piece]
    assert not any(row.broken for row in found)
    for _, at in file.pieces(1):
        rest = [row for piece, _ in file.pieces(3, at) for row in piece]
        assert rest == found[at.rows :]
    return [row.values["merchant_id"] for row in found]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-8-sig", "cp1252"),
        ("utf-16", ""),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", ""),
        ("cp1252", "cp1252"),
        ("latin-1", "latin-1"),
    ],
)
@pytest.mark.parametrize("before", ["", "sep=;\r\n", "Umsätze; vom 1.11.\r\n\r\n"])
def test_a_text_is_read_in_its_encoding_packed_or_not(tmp_path, packed, encoding, told, before):
    content = (before + HEAD + LINES).encode(encoding)
    path = tmp_path / ("rows.csv.gz" if packed else "rows.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert shops(path, told) == [f"Bäckerei {i}" for i in range(5)]


def test_what_an_encoding_does_not_know_costs_its_line_only(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes((HEAD + LINES).encode("cp1252").replace(b"ckerei 3", b"\x81"))
    file = layouts.Layout(encoding="cp1252").open(path, *FIELDS)
    [(found, _)] = file.pieces(10)
    assert [row.line for row in found if row.broken] == [5]
    assert "CP1252" in found[3].broken


@pytest.mark.parametrize("name", ["utf-99", "base64", "rot13"])
def test_an_encoding_that_does_not_exist_is_named(tmp_path, name):
    (tmp_path / "rows.csv").write_text(HEAD)
    with pytest.raises(errors.InvalidInput, match=f"--encoding: .*{name}"):
        layouts.Layout(encoding=name).open(tmp_path / "rows.csv", *FIELDS)


@given(
    st.lists(values, max_size=5), st.sampled_from([None, 1]), st.integers(1, 40), st.integers(0, 99)
)
def test_an_array_is_split_where_its_elements_end(elements, indent, chunk, cut):
    raw = f" {json.dumps(elements, indent=indent)}\n ".encode()
    was, texts._CHUNK_BYTES = texts._CHUNK_BYTES, chunk
    try:
        whole = list(texts.Elements(io.BytesIO(raw), rows.START))
        assert [json.loads(each or b"") for each, _ in whole] == elements
        for i, (_, at) in enumerate(whole[:-1]):
            file = io.BytesIO(raw)
            file.seek(at.bytes)
            assert list(texts.Elements(file, at)) == whole[i + 1 :]
        *some, (end, _) = texts.Elements(io.BytesIO(raw[: cut % len(raw.rstrip())]), rows.START)
        assert end is None
        assert [each for each, _ in some] == [each for each, _ in whole[: len(some)]]
    finally:
        texts._CHUNK_BYTES = was


def test_an_element_that_is_not_json_costs_itself_only(tmp_path):
    path = tmp_path / "rows.json"
    good = {"transaction_id": "t", "user_id": 1, "amount": 1, "timestamp": "2026-11-24T11:00:00Z"}
    long = good | {"note": "x" * texts.LINE_BYTES}
    one = json.dumps(good)
    path.write_text(f"[{one}, {{oops}}, 7, {json.dumps(long)}, {one}] trailing")
    file = layouts.Layout().open(path, *FIELDS)
    found = [row for piece, _ in file.pieces(2) for row in piece]
    assert [bool(row.broken) for row in found] == [False, True, True, True, False, True]
    assert [row.line for row in found] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["csv.gz", "json.gz", "parquet"])
def test_a_damaged_file_is_named_with_its_row_and_read_up_to_there(tmp_path, kind):
    rng = random.Random(5)
    made = [
        {"transaction_id": f"t{i}-{rng.random()}", "user_id": i, "amount": 1.0}
        | {"timestamp": "2026-11-24T11:00:00Z"}
        for i in range(20_000)
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(made), path, row_group_size=5_000, use_dictionary=False
        )
        size = path.stat().st_size
        content = bytearray(path.read_bytes())
        content[size // 2 : size // 2 + 2_000] = rng.randbytes(2_000)
    else:
        rows_of = [",".join(map(str, made[0])), *(",".join(map(str, r.values())) for r in made)]
        plain = "\n".join(rows_of) if kind == "csv.gz" else json.dumps(made)
        content = bytearray(gzip.compress(plain.encode()))
        del content[len(content) // 2 :]
    path.write_bytes(content)
    file = layouts.Layout().open(path, *FIELDS)
    seen = []
    with pytest.raises(errors.InvalidInput, match=rf"rows\.{kind}: cannot be read") as told:
        seen.extend(file.pieces(1_000))
    assert 0 < len(seen) < 20
    assert f"behind row {seen[-1][1].rows}:" in told.value.reason
    assert not any(row.broken for some, _ in seen for row in some)


def test_a_folder_is_its_data_files_and_what_its_names_say(tmp_path):
    folder = tmp_path / "out"
    for day in "2026-11-02", "2026-11-01":
        (folder / f"day={day}" / "shop=Kiosk").mkdir(parents=True)
        part = folder / f"day={day}" / "shop=Kiosk" / "part-0.csv.gz"
        part.write_bytes(gzip.compress(b"id,user_id,amount\na,7,1.00\n"))
    for name in "_SUCCESS", ".part-0.csv.crc", "_temporary/part-1.csv", "a.rejects.jsonl", "x.md":
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    parts = datafiles.parts(folder)
    assert [part.parent.parent.name for part in parts] == ["day=2026-11-01", "day=2026-11-02"]
    assert datafiles.parts(folder / "*" / "*" / "*.csv*") == parts
    layout = layouts.Layout(
        "file_name || id AS transaction_id, shop AS merchant_id, "
        "timezone('UTC', day::TIMESTAMP) AS timestamp"
    )
    for path in parts:
        file = layout.open(path, *FIELDS, folder)
        [([row], _)] = file.pieces(9)
        paid = layouts.transaction(row, "USD")
        assert (paid.merchant_id, paid.transaction_id) == ("Kiosk", "part-0.csv.gza")
    with pytest.raises(errors.InvalidInput, match="holds no data file"):
        datafiles.parts(folder / "_temporary" / "*.parquet")


READ = """
import pathlib, re, sys
from cerberus import errors
from cerberus.files import layouts
layout, path = layouts.Layout(sys.argv[2]), pathlib.Path(sys.argv[1])
file = layout.open(path, layouts.REQUIRED, ("merchant_id",))
told = []
try:
    for rows, _ in file.pieces(5_000):
        told += [row.broken[:40] for row in rows]
except errors.InvalidInput as error:
    told.append(str(error))
# The peak of `getrusage` may be that of the process that started this one.
peak_kib = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
print(told.count(""), len(told), int(peak_kib) >> 10, max(told))
"""
MANY, LONG = 600, 1 << 20


def bomb(path, kind):
    """Write a small file that holds 600 MB."""
    base = {"user_id": 1, "amount": 1.0, "timestamp": "2026-11-24T11:00:00Z"}
    made = [{"transaction_id": f"t{i}", **base} for i in range(MANY)]
    shop = "x" * LONG
    if kind.endswith("parquet"):
        shops = pyarrow.array([shop if i % 2 else "m" for i in range(MANY)])
        shops = shops.dictionary_encode() if kind == "dictionary.parquet" else shops
        table = pyarrow.Table.from_pylist(made).append_column("merchant_id", shops)
        pyarrow.parquet.write_table(
            table,
            path,
            compression="zstd",
            use_dictionary=kind == "dictionary.parquet",
            data_page_size=1 << 31,
        )
        return
    with gzip.open(path, "wt", 1) as file:
        if kind == "csv.gz":
            file.write("transaction_id,user_id,amount,timestamp,merchant_id\n")
        file.write("[" * (kind == "json.gz"))
        for i, row in enumerate(made):
            cells = row | {"merchant_id": shop if i % 2 else "m"}
            if kind == "csv.gz":
                file.write(",".join(map(str, cells.values())) + "\n")
            else:
                file.write("," * (i > 0 and kind == "json.gz") + json.dumps(cells) + "\n")
        file.write("]" * (kind == "json.gz"))


@pytest.mark.parametrize(
    "kind", ["csv.gz", "jsonl.gz", "json.gz", "dictionary.parquet", "plain.parquet"]
)
def test_a_small_file_that_unpacks_to_much_is_read_in_bounded_memory(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    bomb(path, kind)
    assert path.stat().st_size < 4 << 20
    done = subprocess.run(
        [sys.executable, "-c", READ, path, "upper(merchant_id) AS merchant_id"],
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
    )
    good, seen, peak_mib, told = done.stdout.split(maxsplit=3)
    assert int(peak_mib) < 600
    if kind == "plain.parquet":
        assert "rows.plain.parquet: cannot be read behind row 0" in told
    else:
        assert (int(good), int(seen)) == (MANY // 2, MANY)


@pytest.mark.parametrize("raw", [b"", b"\x08\x00", b"\x07" + bytes(20), b"\x08\x08name"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_a_file_that_is_damaged_where_it_begins_is_named(tmp_path, kind, raw):
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(b"\x1f\x8b" + raw)
    with pytest.raises(errors.InvalidInput, match=path.name):
        shops(path)


def test_json_lines_that_end_too_early_are_named_with_their_row(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"merchant_id": 1}\n' * 9)[:-9])
    with pytest.raises(errors.InvalidInput, match=r"rows\.jsonl\.gz: cannot be read behind row"):
        [*layouts.Layout().open(path, (), FIELDS[1]).pieces(2)]


def test_a_folder_s_name_is_read_as_spark_writes_it(tmp_path):
    for part in ("merchant_id=a%2Fb", "merchant_id=__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.csv").write_text("user_id\n7\n")
        pyarrow.parquet.write_table(pyarrow.table({"user_id": [7]}), tmp_path / part / "y.pq")
    found = [
        row.values["merchant_id"]
        for path in datafiles.parts(tmp_path)
        for rows, _ in layouts.Layout().open(path, (), FIELDS[1], tmp_path).pieces(2)
        for row in rows
    ]
    assert found == [None, None, "a/b", "a/b"]


def test_what_a_folder_has_besides_is_said(tmp_path):
    names = ("a.csv", "b.csv.zst", "part-0", "_SUCCESS", ".a.csv.crc", "a.csv.rejects.jsonl")
    for name in names:
        (tmp_path / name).write_text("")
    said = datafiles.left_out(tmp_path)
    assert said.endswith("has 2 files of other suffixes, left out: b.csv.zst, part-0")
    assert not datafiles.left_out(tmp_path / "a.csv")
