"""A file onto the log: whole or not at all, in its order, at the pace that was asked for."""

import asyncio
import csv
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from pipeline import now_ms, payment, until, world
from service import ROOT

from cerberus import kafka, settings, transactions
from cerberus.files import capacity, layouts, sending

pytestmark = pytest.mark.anyio


def send(environ, path, *options):
    return subprocess.run(
        [sys.executable, "-m", "cerberus", "send", str(path), *options],
        env=os.environ | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines(count, begin_ms, gap_ms=1, user_id=1005):
    return [json.loads(payment(i, user_id, begin_ms + i * gap_ms, 1.25)) for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def moments(records):
    return [transactions.parse_timestamp(json.loads(record.value)) for record in records]


async def sent(environ):
    async with world(environ) as here:
        return [r for rs in (await here.log()).values() for r in rs]


async def test_csv_and_parquet_are_sent_as_json_lines_are(environ, tmp_path):
    rows = lines(30, now_ms() - 1_000)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["TX", *list(rows[0])[1:]])
        writer.writerows(row.values() for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for path, options in (
        (write(tmp_path / "rows.jsonl", rows), ()),
        (tmp_path / "rows.csv", ("--select", "TX AS transaction_id")),
        (tmp_path / "rows.parquet", ()),
    ):
        done = send(environ, path, *options)
        assert done.returncode == 0, done.stderr
        assert "30 transactions sent" in done.stdout
    records = await sent(environ)
    wanted = [
        transactions.encode(transactions.decode(json.dumps(row).encode(), "USD")) for row in rows
    ]
    assert [record.value for record in records] == wanted * 3
    assert {record.key for record in records} == {b"1005"}
    assert min(r.timestamp for r in records) > transactions.parse_timestamp(rows[-1])


@pytest.mark.parametrize("pace", [(), ("--rate", "1000"), ("--speed", "1")])
async def test_a_wrong_line_is_named_and_nothing_is_sent_at_any_pace(environ, tmp_path, pace):
    rows = lines(2_500, now_ms() - 2_500)
    rows[2_400]["amount"] = "much"
    done = send(environ, write(tmp_path / "bad.jsonl", rows), *pace)
    assert done.returncode == 1
    assert "line 2401: amount" in done.stderr
    rows[2_400] |= {"amount": 1, "timestamp": transactions.format_ms(now_ms() + 900_000)}
    done = send(environ, write(tmp_path / "ahead.jsonl", rows), *pace)
    assert "line 2401: timestamp" in done.stderr
    assert await sent(environ) == []


async def test_old_transactions_are_sent_as_recorded_or_as_if_they_were_of_now(environ, tmp_path):
    rows = lines(20, now_ms() - 10**8, gap_ms=500)  # a day: younger than the topic keeps
    rows[7], rows[8] = rows[8], rows[7]
    path = write(tmp_path / "old.jsonl", rows)
    sent_ms = now_ms()
    at_once = send(environ, path)
    assert "--now" in at_once.stderr
    begin_ms = now_ms()
    assert send(environ, path, "--speed", "10", "--now").returncode == 0
    end_ms = now_ms()
    assert send(environ, path, "--rate", "100", "--now").returncode == 0
    records = await sent(environ)
    recorded, shifted, paced = records[:20], records[20:40], records[40:]
    # The topic's retention counts from now, however old they are.
    assert all(sent_ms <= r.timestamp <= begin_ms for r in recorded)
    assert moments(recorded) == [transactions.parse_timestamp(row) for row in rows]
    assert begin_ms <= moments(shifted)[0] <= end_ms
    # A tenth of the gaps; the two that came late stay late.
    gaps = [at_ms - moments(shifted)[0] for at_ms in moments(shifted)]
    assert gaps == [50 * i for i in (*range(7), 8, 7, *range(9, 20))]
    assert end_ms - begin_ms >= gaps[-1]
    assert all(m <= r.timestamp for m, r in zip(moments(shifted), shifted, strict=True))
    assert [at_ms - moments(paced)[0] for at_ms in moments(paced)] == [10 * i for i in range(20)]


@pytest.mark.parametrize("pace", [sending.Pace(speed=2.0), sending.Pace(rate=100.0)])
async def test_nothing_arrives_before_it_is_due(environ, tmp_path, pace):
    path = write(tmp_path / "rows.jsonl", lines(60, now_ms() - 60_000, gap_ms=20))
    async with world(environ) as here:
        reader = AIOKafkaConsumer(
            here.config.kafka.topic(kafka.TRANSACTIONS),
            bootstrap_servers=here.config.kafka.bootstrap,
            auto_offset_reset="earliest",
        )
        await reader.start()
        arrived = {}

        async def read():
            async for record in reader:
                arrived[json.loads(record.value)["transaction_id"]] = now_ms()

        reading = asyncio.create_task(read())
        sender = sending.Sender(here.config, path, layouts.Layout(), pace)
        begin_ms = now_ms()
        assert await sender.send(sender.check()) == 60
        await until(lambda: len(arrived) == 60, "all arrive")
        reading.cancel()
        await reader.stop()
    assert list(arrived) == [f"t{i}" for i in range(60)]
    assert all(at_ms >= begin_ms + 10 * i for i, at_ms in enumerate(arrived.values()))


def test_a_pace_that_says_nothing_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(1, now_ms()))
    assert send({}, path, "--now").returncode == 1
    assert send({}, path, "--rate", "0").returncode == 2
    assert send({}, path, "--rate", "1", "--speed", "1").returncode == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [("retention.ms", "61000"), ("retention.bytes", "50000"), ("cleanup.policy", "compact")],
)
async def test_what_the_topic_would_delete_unread_is_told_before_any_is_sent(
    environ, tmp_path, setting, value
):
    config = settings.load(environ)
    await kafka.create_topics(config)
    topic = config.kafka.topic(kafka.TRANSACTIONS)
    async with kafka.admin(config.kafka) as client:
        told = ConfigResource(ConfigResourceType.TOPIC, topic, configs={setting: value})
        await client.alter_configs([told])
    path = write(tmp_path / "rows.jsonl", lines(2_000, now_ms() - 10**9))
    refused = send(environ, path)
    assert refused.returncode == 1
    assert f"{setting}: {topic}" in refused.stderr
    assert "--anyway" in refused.stderr
    assert await sent(environ) == []
    slowly = send(environ, path, "--rate", "990", "--now")
    assert slowly.returncode == (1 if setting == "cleanup.policy" else 0), slowly.stderr
    assert send(environ, path, "--anyway").returncode == 0


@pytest.mark.parametrize("kept", [{}, {"retention.ms": "-1", "retention.bytes": "-1"}])
def test_a_topic_that_keeps_all_holds_any_file(kept):
    topic = capacity.Topic("transactions", 6, kept)
    capacity.check(topic, capacity.Load(10**12, [10**15] * 6, 0))
    capacity.check(topic, capacity.Load(0, [0] * 6, 0))
