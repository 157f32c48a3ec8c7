"""A bank's own past: every format, restart and order gives the tables that it describes."""

import asyncio
import csv
import datetime
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import feast_rig
import oracle
import orjson
import pyarrow
import pyarrow.parquet
import pytest

from cerberus import errors, settings, transactions, window
from cerberus.commands import load as load_command
from cerberus.features import fences
from cerberus.files import importing, layouts
from cerberus.jobs import feast as feast_store
from cerberus.online import partition_states
from cerberus.online import pool as redis_pool
from cerberus.postgres import facts, stores
from cerberus.postgres import pool as postgres_pool

pytestmark = pytest.mark.anyio
ROOT = pathlib.Path(__file__).parent.parent
BEGIN_MS = 1_790_000_000_000
SPANS = ("1m", "10m")
FORMATS = ("csv", "jsonl", "parquet")


def moment(ms):
    return transactions.format_ms(ms)


def paid(i, user_id=1, at_ms=BEGIN_MS, amount=12.5, **more):
    return {
        "transaction_id": f"t{i}",
        "user_id": user_id,
        "amount": amount,
        "timestamp": moment(at_ms),
        "merchant_id": f"m{i % 3}",
    } | more


def past(rng, count, users=5, first=0):
    """Return payments of a quarter of an hour, some in one millisecond, some twice, shuffled."""
    rows = []
    for i in range(first, first + count):
        edge_ms = 60_000 * rng.randrange(15) + rng.choice((-1, 0, 0, 1))
        at_ms = BEGIN_MS + rng.choice((rng.randrange(900_000), edge_ms))
        rows.append(paid(i, rng.randrange(users), at_ms, rng.randrange(10**6) / 100))
        rows += [rows[-1]] * (not rng.randrange(9))
    rng.shuffle(rows)
    return rows


def write(path, rows):
    kind = path.suffix[1:]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


@pytest.fixture
def config(environ):
    return settings.load(environ | {"CERBERUS_SPANS": ",".join(SPANS)})


@pytest.fixture
async def pool(config):
    async with postgres_pool.connect(config) as pool:
        await stores.on(pool, config.windows.spans).schema.migrate()
        yield pool


def plan(path, kind="transactions", again=False, rejects=None, select="", encoding=""):
    return importing.Plan({kind: path}, {kind: layouts.Layout(select, encoding)}, rejects, again)


async def load(config, *arguments, **how):
    asked = plan(*arguments, **how)
    [progress] = (await load_command.load(config, asked)).values()
    return progress


async def tables(pool):
    """Return what an import leaves, but for where in a file it stood."""
    facts = await pool.fetch(
        "SELECT user_id, event_ms, transaction_id, amount_minor, currency, merchant_id, topic, "
        "epoch FROM transactions ORDER BY 1, 2, 3"
    )
    stats = await pool.fetch(
        "SELECT user_id, event_timestamp, created_timestamp, transaction_count_1m, "
        "total_amount_1m, transaction_count_10m, total_amount_10m "
        "FROM user_transaction_stats ORDER BY 1, 2"
    )
    return [tuple(row) for row in facts], [tuple(row) for row in stats]


def refused(path):
    beside = path.with_name(f"{path.name}.rejects.jsonl")
    return [json.loads(line) for line in beside.read_text().splitlines()] if beside.exists() else []


def told(rows):
    """Return (user, event µs, count and cents by span) of each payment, by the oracle."""
    ordered = sorted(
        {
            (r["user_id"], oracle.to_ms(r["timestamp"]), r["transaction_id"]): r for r in rows
        }.items(),
        key=lambda item: (item[0][1], item[0][2]),
    )
    judges = [oracle.Partition(span_ms) for span_ms in window.Spans(SPANS).spans_ms]
    ranks, found = {}, {}
    for offset, ((user_id, at_ms, _), row) in enumerate(ordered):
        for judge in judges:
            judge.add(offset, at_ms, json.dumps(row).encode())
        rank = ranks[user_id, at_ms] = ranks.get((user_id, at_ms), -1) + 1
        values = [judge.decided_on(judge.accepted[-1]) for judge in judges]
        found[user_id, at_ms * 1000 + rank] = values
    return found


def stored(stats):
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return {
        (user_id, (at - epoch) // datetime.timedelta(microseconds=1)): [
            (values[i], round(values[i + 1] * 100)) for i in range(0, len(values), 2)
        ]
        for user_id, at, _, *values in stats
    }


async def test_imported_history_is_what_the_stream_would_have_left(config, pool, tmp_path):
    rng = random.Random(3)
    early, late = past(rng, 150), past(rng, 150, first=150)
    await load(config, write(tmp_path / "late.csv", late))
    assert stored((await tables(pool))[1]) == told(late)
    await load(config, write(tmp_path / "early.jsonl", early))
    _, stats = await tables(pool)
    assert stored(stats) == told(early + late)
    assert all(created == at for _, at, created, *_ in stats)


async def test_every_format_gives_the_same_rows_and_refuses_the_same(config, pool, tmp_path):
    rows = past(random.Random(4), 40)
    rows.insert(5, paid(900, amount=1.005))
    rows.insert(11, paid(901, user_id=-4))
    rows.insert(30, paid(902, timestamp="yesterday"))
    found = []
    for kind in FORMATS:
        await pool.execute("TRUNCATE transactions, user_transaction_stats, imports")
        path = write(tmp_path / f"past.{kind}", rows)
        progress = await load(config, path)
        skipped = kind == "csv"  # its header
        found.append(
            (
                *await tables(pool),
                progress.added,
                progress.rejected,
                [(each["line"] - skipped, each["field"], each["reason"]) for each in refused(path)],
            )
        )
    assert found[0] == found[1] == found[2]
    assert [(line, field) for line, field, _ in found[0][-1]] == [
        (6, "amount"),
        (12, "user_id"),
        (31, "timestamp"),
    ]
    assert found[0][2] == len({row["transaction_id"] for row in rows}) - 3


async def test_imported_twice_is_imported_once(config, pool, tmp_path):
    rows = past(random.Random(5), 60)
    path = write(tmp_path / "past.csv", rows)
    first = await load(config, path)
    once = await tables(pool)
    assert await load(config, path) == first
    again = await load(config, path, again=True)
    assert (again.added, again.position.rows) == (0, len(rows))
    await load(config, write(tmp_path / "part.jsonl", rows[20:40]))
    assert await tables(pool) == once
    assert await pool.fetchval("SELECT count(*) FROM history_due") == 0


async def test_what_the_log_says_stands(config, pool, tmp_path):
    postgres = stores.on(pool, config.windows.spans)
    known = transactions.Transaction("t1", 1, 100, "USD", "m", BEGIN_MS)
    stats = (window.WindowStats(7, 700),) * len(SPANS)
    fence = fences.Fence(9, 5, BEGIN_MS)

    async def write_by_the_log(offset=4):
        fact = facts.TransactionFact(known, 9, 0, offset)
        rows = [facts.StatsFact(1, BEGIN_MS * 1000 + rank, stats, fence) for rank in (0, 1)]
        await postgres.facts.write("transactions", [fact], rows, [])

    await write_by_the_log()
    path = write(tmp_path / "past.csv", [paid(1), paid(0), paid(2, at_ms=BEGIN_MS + 1)])
    assert (await load(config, path)).added == 2
    row = await pool.fetchrow("SELECT * FROM transactions WHERE transaction_id = 't1'")
    assert (row["amount_minor"], row["topic"], row["log_offset"]) == (100, "transactions", 4)
    _, [of_log, another, of_file] = await tables(pool)
    assert of_log[3:] == another[3:] == (7, 7.0) * len(SPANS)
    assert of_file[3:] == (3, 26.0) * len(SPANS)

    await pool.execute("TRUNCATE transactions, user_transaction_stats")
    await load(config, path, again=True)
    await write_by_the_log()
    row = await pool.fetchrow("SELECT * FROM transactions WHERE transaction_id = 't1'")
    assert (row["amount_minor"], row["topic"]) == (100, "transactions")
    after = (await tables(pool))[1][0]
    assert (after[:2], after[3:]) == (of_log[:2], of_log[3:])


async def test_a_finished_file_that_is_mended_in_place_is_said_to_be_another(
    config, pool, tmp_path, capsys
):
    rows = [paid(i, i % 50, BEGIN_MS + i, merchant_id="m" * 90) for i in range(12_000)]
    path = write(tmp_path / "past.csv", rows)
    await load(config, path)
    assert "transactions: 12000 added, 0 were there, 0 refused" in capsys.readouterr().out
    await load(config, path)
    told = capsys.readouterr().out
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    assert f"past.csv was imported on {today}" in told
    assert "as 12000 rows and is unchanged" in told
    assert "12000 added" not in told
    # The same size and the same first MiB.
    size = path.stat().st_size
    assert size > 1 << 20
    content = path.read_bytes()
    content = content.replace(b"t11990,", b"x11990,").replace(
        b"t11995,45,12.5,", b"t11995,45,99.5,"
    )
    path.write_bytes(content)
    assert path.stat().st_size == size
    await load(config, path)
    told = capsys.readouterr().out
    first, second = re.findall("fingerprint ([0-9a-f]{12})", told)
    assert first != second
    assert f"past.csv was imported on {today}" in told
    assert "it is another file now" in told
    assert (
        "transactions: 1 added, 11999 were there (1 of them with another content, which stays), "
        "0 refused"
    ) in told
    stays = await pool.fetchval(
        "SELECT amount_minor FROM transactions WHERE transaction_id = 't11995'"
    )
    assert stays == 1250
    await load(config, path, select="amount AS amount")
    assert "with another --select or --encoding" in capsys.readouterr().out


async def test_scores_that_differ_are_counted(config, pool, tmp_path, capsys):
    row = {"user_id": 1, "credit_score": 700, "timestamp": moment(BEGIN_MS)}
    await load(config, write(tmp_path / "a.csv", [row]), "credit_scores")
    changed = write(tmp_path / "b.csv", [row | {"credit_score": 701}])
    await load(config, changed, "credit_scores")
    assert "0 added, 1 were there (1 of them with another content" in capsys.readouterr().out


async def test_what_the_previous_release_imported_is_known_and_goes_on(
    config, pool, tmp_path, capsys
):
    rows = [paid(i, at_ms=BEGIN_MS + i) for i in range(9)]
    path = write(tmp_path / "past.csv", rows)
    content = path.read_bytes()
    # It identified a file by its size, its first MiB and how it was read.
    head = hashlib.sha256(b"%d\0%s" % (len(content), content[: 1 << 20])).hexdigest()
    how = {
        "columns": {},
        "constants": {},
        "timestamp_format": "rfc3339",
        "amount_unit": "major",
    }
    identity = orjson.dumps(("transactions", head, how, {}), option=orjson.OPT_SORT_KEYS)
    former = hashlib.sha256(identity).hexdigest()
    done = len(b"".join(content.splitlines(True)[:5]))
    await pool.execute(
        "INSERT INTO imports (fingerprint, kind, file, size_bytes, rows_done, lines_done, "
        "bytes_done, added) VALUES ($1, 'transactions', 'past.csv', $2, 4, 5, $3, 4)",
        former,
        len(content),
        done,
    )
    progress = await load(config, path)
    assert (progress.position, progress.added) == ((9, 10, len(content)), 9)
    ids = await pool.fetch("SELECT transaction_id FROM transactions ORDER BY 1")
    assert [row[0] for row in ids] == [f"t{i}" for i in range(4, 9)]

    await pool.execute("UPDATE imports SET fingerprint = $1", former)
    capsys.readouterr()
    await load(config, path)
    told = capsys.readouterr().out
    assert "as 9 rows and has the same size and first MiB" in told
    assert "added" not in told
    assert await pool.fetchval("SELECT count(*) FROM imports") == 1


async def test_the_parts_of_a_folder_are_imported_each_once(config, pool, tmp_path, capsys):
    folder = tmp_path / "out.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    rows = [paid(i, at_ms=BEGIN_MS + i) for i in range(30)]
    rows[3]["amount"] = rows[25]["amount"] = -1.0
    for i in range(3):
        write(folder / f"part-{i}.snappy.parquet", rows[10 * i : 10 * i + 10])
    progress = await load(config, folder)
    assert (progress.added, progress.rejected, progress.position[0]) == (28, 2, 30)
    assert [(each["file"], each["line"]) for each in refused(folder)] == [
        ("out.parquet/part-0.snappy.parquet", 4),
        ("out.parquet/part-2.snappy.parquet", 6),
    ]
    write(folder / "part-3.snappy.parquet", [paid(99)])
    capsys.readouterr()
    await load(config, folder)
    told = capsys.readouterr().out
    assert told.count("is unchanged") == 3
    assert len(refused(folder)) == 2
    left_out = await load(config, folder, select="amount AS amount WHERE transaction_id <> 't5'")
    assert left_out.left_out == 1
    assert "1 left out" in capsys.readouterr().out


def command(environ, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "cerberus", "import", *map(str, arguments)],
        env=os.environ | environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


async def test_killed_in_the_middle_and_started_again_it_is_imported_once(
    environ, pool, config, tmp_path
):
    environ = environ | {"CERBERUS_SPANS": ",".join(SPANS)}
    rng = random.Random(6)
    rows = [paid(i, i % 50, BEGIN_MS + 37 * i, rng.randrange(9999) / 100) for i in range(40_000)]
    for i in range(0, len(rows), 1999):
        rows[i] = paid(i, amount=-1)
    path, whole = write(tmp_path / "past.csv", rows), write(tmp_path / "whole.csv", rows)
    killed, done = 0, 0
    while killed < 3:
        running = command(environ, "--transactions", path)
        deadline = time.monotonic() + 60
        while (now := await pool.fetchval("SELECT max(rows_done) FROM imports") or 0) <= done:
            assert running.poll() is None, running.stdout.read()
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait(10)
        running.stdout.close()
        with path.with_name("past.csv.rejects.jsonl").open("a") as told_but_not_noted:
            told_but_not_noted.write('{"line": 0}\n')
        killed, done = killed + 1, now
        assert now < len(rows)
    running = command(environ, "--transactions", path)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    [progress] = await pool.fetch("SELECT * FROM imports")
    assert (progress["rows_done"], progress["rejected"]) == (len(rows), len(refused(path)))
    found, lines = await tables(pool), [each["line"] for each in refused(path)]
    await pool.execute("TRUNCATE transactions, user_transaction_stats, imports")
    await load(config, whole)
    assert found == await tables(pool)
    assert lines == [each["line"] for each in refused(whole)]
    assert lines == [i + 2 for i in range(0, len(rows), 1999)]


async def test_refused_rows_are_told_with_their_line(config, pool, tmp_path):
    path = tmp_path / "past.csv"
    head = "\ufefftransaction_id;user_id;amount;timestamp;merchant_id\n"
    good = f"1;12.50;{moment(BEGIN_MS)}"
    path.write_bytes(
        (
            f'{head}t1;{good};"a\nshop"\n\nt2;{good}\nt3;x;1;{moment(BEGIN_MS)};m\n'
            f"t4;1;;{moment(BEGIN_MS)};m\n"
        ).encode()
        + f"t5;{good};caf\xe9\n".encode("latin-1")
        + f"t6;{good};m\n{'t' * 129};{good};m\nt7;1;1;{moment(BEGIN_MS * 2)};m".encode()
    )
    progress = await load(config, path)
    assert (progress.added, progress.rejected) == (2, 6)
    assert [(each["line"], each["field"]) for each in refused(path)] == [
        (5, "value"),
        (6, "user_id"),
        (7, "amount"),
        (8, "value"),
        (10, "transaction_id"),
        (11, "timestamp"),
    ]
    merchants = await pool.fetch("SELECT merchant_id FROM transactions ORDER BY transaction_id")
    assert [row[0] for row in merchants] == ["a\nshop", "m"]


async def test_columns_formats_and_units_of_a_bank_s_own(config, pool, tmp_path):
    rows = [{"TX": 17, "CUST": 5.0, "CENTS": 1250, "AT": BEGIN_MS / 1000, "FRAUD": 1}]
    select = "TX AS transaction_id, CUST AS user_id, "
    for kind in FORMATS:
        path = write(tmp_path / f"bank.{kind}", rows)
        await pool.execute("TRUNCATE transactions, labels, imports")
        paid = select + 'CENTS::BIGINT * 0.01 AS amount, to_timestamp("AT"::DOUBLE) AS timestamp'
        await load(config, path, select=f"{paid}, 'shop' AS merchant_id")
        told = f"CASE FRAUD::INT WHEN 1 THEN 'fraud' END AS label, '{moment(BEGIN_MS + 5)}' "
        await load(config, path, "labels", select=f"{select}{told}AS labelled_at, 'bank' AS source")
        [row] = await pool.fetch("SELECT * FROM transactions")
        assert (row["transaction_id"], row["user_id"], row["amount_minor"]) == ("17", 5, 1250)
        assert (row["event_ms"], row["merchant_id"]) == (BEGIN_MS, "shop")
        [label] = await pool.fetch("SELECT * FROM labels")
        assert (label["transaction_id"], label["label"], label["source"]) == ("17", "fraud", "bank")
        assert label["seen_ms"] == label["labelled_ms"] == BEGIN_MS + 5


async def test_a_column_that_is_not_there_is_named_before_anything_is_read(config, tmp_path):
    path = write(tmp_path / "past.csv", [{"transaction_id": 1, "user_id": 2, "amount": 3}])
    with pytest.raises(errors.InvalidInput, match=r"timestamp: .*--select .*AS timestamp"):
        await load(config, path)
    with pytest.raises(errors.InvalidInput, match=r"past\.xls: .*\.csv"):
        await load(config, path.rename(tmp_path / "past.xls"))


async def test_months_of_the_past_get_partitions(config, pool, tmp_path):
    times = [BEGIN_MS, BEGIN_MS - 40 * 86_400_000, BEGIN_MS - 4000 * 86_400_000]
    rows = [paid(i, at_ms=at_ms) for i, at_ms in enumerate(times)]
    await load(config, write(tmp_path / "past.parquet", rows))
    where = await pool.fetch("SELECT tableoid::regclass::text AS t FROM transactions")
    assert {row["t"] for row in where} == {
        f"transactions_{datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC):%Y_%m}"
        for ms in times
    }


async def test_scores_hold_from_their_own_time_and_are_loaded_anew(config, pool, tmp_path):
    async with redis_pool.connect(config) as redis:
        await redis.set(partition_states.MATERIALIZED, 1)
        rows = [
            {"user_id": 1, "credit_score": 700, "timestamp": moment(BEGIN_MS)},
            {"user_id": 1, "credit_score": 710, "timestamp": moment(BEGIN_MS + 1)},
            {"user_id": 1, "credit_score": 720.5, "timestamp": moment(BEGIN_MS + 2)},
        ]
        path = write(tmp_path / "scores.csv", rows)
        progress = await load(config, path, "credit_scores")
        assert (progress.added, progress.rejected) == (2, 1)
        found = await pool.fetch("SELECT * FROM credit_scores ORDER BY credit_score")
        assert [(row["event_timestamp"], row["credit_score"]) for row in found] == [
            (row["created_timestamp"], score) for row, score in zip(found, (700, 710), strict=True)
        ]
        assert await redis.get(partition_states.MATERIALIZED) is None


async def test_what_is_not_kept_is_not_imported(environ, pool, tmp_path):
    config = settings.load(environ | {"CERBERUS_RETENTION_DAYS": "3650"})
    rows = [paid(1), paid(2, at_ms=BEGIN_MS - 4000 * 86_400_000)]
    path = write(tmp_path / "past.csv", rows)
    progress = await load(config, path)
    assert (progress.added, progress.rejected) == (1, 1)
    assert "CERBERUS_RETENTION_DAYS" in refused(path)[0]["reason"]


def test_feast_joins_imported_history_point_in_time(environ, tmp_path):
    rows = past(random.Random(12), 60)
    last_ms = max(oracle.to_ms(row["timestamp"]) for row in rows)
    scores = [
        {"user_id": user, "credit_score": 600 + user * 10 + i, "timestamp": moment(BEGIN_MS + at)}
        for user in range(5)
        for i, at in enumerate((-86_400_000, 450_000))
    ]
    files = {
        "transactions": write(tmp_path / "past.csv", rows),
        "credit_scores": write(tmp_path / "scores.csv", scores),
    }
    asked = importing.Plan(files, dict.fromkeys(files, layouts.Layout()))
    with feast_rig.opened(environ, tmp_path) as rig:
        asyncio.run(load_command.load(rig.config, asked))
        wanted = told(rows)
        table = feast_rig.frame(
            [
                {"user_id": user, "event_timestamp": feast_rig.utc(0, us=at_us), "at_us": at_us}
                for user, at_us in wanted
            ]
        )
        service = rig.store.get_feature_service("fraud_model")
        job = rig.store.get_historical_features(table, service, filter_by_created_timestamp=True)
        found = {(row.user_id, row.at_us): row for row in job.to_df().itertuples()}
        assert found.keys() == wanted.keys()
        for (user, at_us), (_, (count, cents)) in wanted.items():
            row = found[user, at_us]
            assert row.transaction_count_10m == count
            assert round(row.total_amount_10m * 100) == cents
            later = at_us >= (BEGIN_MS + 450_000) * 1000
            assert row.credit_score == 600 + user * 10 + later
        # They are served, too, though they were known for long.
        loaded = feast_store.materialize(rig.config, last_ms)
        assert loaded.full
        assert rig.feast_reads([3])["credit_score"] == [631]


@pytest.mark.parametrize("holds", ["its own input", "something else"])
async def test_a_file_that_holds_something_else_is_not_made_one_of_rejects(config, tmp_path, holds):
    path = write(tmp_path / "past.csv", [paid(1), paid(2, amount="x")])
    rejects = path
    if holds == "something else":
        rejects = tmp_path / "precious.txt"
        rejects.write_text("precious\n")
    before = rejects.read_bytes()
    with pytest.raises(errors.InvalidInput, match="--rejects"):
        await load(config, path, rejects=rejects)
    assert rejects.read_bytes() == before


async def test_a_value_that_no_row_can_hold_is_refused_by_its_line(config, pool, tmp_path):
    path = tmp_path / "past.parquet"
    rows = [paid(i) for i in range(5)]
    times = pyarrow.array([BEGIN_MS * 1000] * 2 + [2**62] + [BEGIN_MS * 1000] * 2)
    table = pyarrow.Table.from_pylist(rows).drop_columns(["timestamp"])
    stamps = times.cast(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(table.append_column("timestamp", stamps), path)
    progress = await load(config, path)
    assert (progress.added, progress.rejected) == (4, 1)
    [told] = map(json.loads, path.with_name("past.parquet.rejects.jsonl").read_text().splitlines())
    assert told["line"] == 3
