"""A dead letter is the unchanged record; an operator lists, shows and sends it again."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.structs import ConsumerRecord
from hypothesis import given
from hypothesis import strategies as st
from pipeline import now_ms, payment, running, until, world
from service import ROOT

from cerberus import errors, kafka, labels, publishing, transactions
from cerberus.commands import dlq
from cerberus.stream import dead_letters, label_topic, sink, upstream

pytestmark = pytest.mark.anyio
OWN = [("trace", b"00-ab"), ("empty", b""), ("none", None), ("topic", b"mine"), ("trace", b"2")]


def record(key=b"7", value=b"{", headers=(), offset=5, timestamp=1_000):
    place = ("transactions", 3, offset, timestamp, 0)
    return ConsumerRecord(*place, key, value, None, -1, -1, tuple(headers))


def refused(message, offset=9):
    """Return what a dead-letter topic holds after this message."""
    place = (message.topic, 1, offset, 2_000, 0)
    return ConsumerRecord(*place, message.key, message.value, None, -1, -1, tuple(message.headers))


class Here:
    """The stores of a test, and the command on them."""

    def __init__(self, opened, environ):
        self.opened = opened
        self.environ = environ

    async def dlq(self, *arguments):
        return await self.run("dlq", *arguments)

    async def run(self, *arguments):
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "cerberus", *map(str, arguments)],
            env=os.environ | self.environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    async def answers(self):
        """Wait until a broker that was frozen works again."""
        await self.opened.kafka.send_and_wait(self.opened.config.kafka.topic(kafka.DECISIONS), b"")

    async def listed(self, *arguments):
        done = await self.dlq("list", *arguments)
        assert done.returncode == 0, done.stderr
        header, *lines = done.stdout.splitlines()
        return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]

    async def letters(self, topic=kafka.DEAD_LETTERS):
        found = await self.opened.log(topic)
        return [r for records in found.values() for r in records]

    async def set_aside(self, count, topic=kafka.DEAD_LETTERS):
        async def there():
            return len(await self.letters(topic)) >= count

        await until(there, f"{count} dead letters are there")
        letters = await self.letters(topic)
        assert len(letters) == count
        return letters


@pytest.fixture
async def here(environ):
    environ |= {"CERBERUS_PARTITIONS": "2"}
    async with world(environ) as opened:
        yield Here(opened, environ)


async def test_a_dead_letter_is_as_it_was_and_comes_back_in_the_next_round(here):
    opened = here.opened
    topic = opened.config.kafka.topic(kafka.TRANSACTIONS)
    at = now_ms()
    odd = b'{"user_id": 7, \x1b[31m\xff'
    ahead = payment("ahead", 8, at + 61_000)
    placed = [
        await opened.kafka.send_and_wait(topic, value, key=key, timestamp_ms=at, headers=headers)
        for key, value, headers in (
            (b"\x1b]0;x\x07", odd, OWN),
            (b"8", ahead, []),
            (b"9", None, OWN),
        )
    ]
    async with running(opened.consumer()):
        letters = await here.set_aside(3)
        found = {letter.key: dead_letters.unpack(letter) for letter in letters}
        for key, value, place, headers in zip(
            (b"\x1b]0;x\x07", b"8", b"9"),
            (odd, ahead, None),
            placed,
            (OWN, [], OWN),
            strict=True,
        ):
            letter = found[key]
            assert (letter.value, letter.headers, letter.round) == (value, headers, 1)
            told = (topic, str(place.partition), str(place.offset), str(at))
            assert letter.source == told
        assert all(letter.timestamp >= at for letter in letters)

        listed = await here.listed()
        assert {row["field"] for row in listed} == {"value", "timestamp"}
        assert len(await here.listed("--reason", "IS EMPTY")) == 1
        assert len(await here.listed("--limit", 2)) == 2
        assert await here.listed("--round", 2) == []
        assert await here.listed("--since", transactions.format_ms(now_ms() + 1_000)) == []
        assert await here.listed("--topic", "labels") == []

        worst = found[b"\x1b]0;x\x07"]
        done = await here.dlq("show", worst.partition, worst.offset)
        assert done.returncode == 0, done.stderr
        assert r"\u001b]0;x\u0007" in done.stdout
        assert r'{"user_id": 7, \u001b[31m\xff' in done.stdout
        assert "header     trace: 00-ab" in done.stdout
        assert "header     none: (none)" in done.stdout
        assert "round      1" in done.stdout
        for told in (done.stdout, (await here.dlq("list")).stdout):
            assert all(c.isprintable() or c in "\n\t" for c in told)
        assert (await here.dlq("show", 0, 10**6)).returncode == 2

        dry = await here.dlq("replay", "--dry-run")
        assert f"3 records would be sent to {topic}" in dry.stdout
        await here.set_aside(3)
        # The event that was ahead of its record no longer is; the others are refused again.
        begun = at + 61_000 - opened.spans.max_future_skew_ms
        await until(lambda: now_ms() > begun, "the event is no longer ahead")
        done = await here.dlq("replay", "--round", 1)
        assert f"3 records sent to {topic}" in done.stdout, done.stderr
        again = [dead_letters.unpack(letter) for letter in await here.set_aside(5)]
        second = {letter.key: letter for letter in again if letter.round == 2}
        assert second.keys() == {b"\x1b]0;x\x07", b"9"}
        assert second[b"9"].headers == OWN
        assert await opened.pool.fetchval("SELECT transaction_id FROM transactions") == "tahead"
        # A repetition changes no window.
        await here.dlq("replay", "--reason", "timestamp")
        count = "SELECT count(*) FROM transactions"
        assert await opened.pool.fetchval(count) == 1


async def test_a_refused_label_is_sent_again_too(here):
    opened = here.opened
    good = labels.Label("order-1", "fraud", "bank", now_ms() - 1_000)
    topic = opened.config.kafka.topic(kafka.LABELS)
    letter = record(key=b"order-1", value=labels.encode(good), headers=OWN)
    kept = dead_letters.pack(opened.config.kafka.topic(kafka.LABEL_DEAD_LETTERS), letter, "x: y")
    await opened.kafka.send_and_wait(
        kept.topic, kept.value, key=kept.key, headers=list(kept.headers)
    )
    await opened.kafka.send_and_wait(topic, b"[]", headers=OWN)
    consumer = label_topic.LabelConsumer(opened.config, opened.postgres)
    async with running(consumer):
        letters = await here.set_aside(2, kafka.LABEL_DEAD_LETTERS)
        assert OWN in [dead_letters.unpack(each).headers for each in letters]
        assert (await here.listed("--topic", "labels", "--reason", "x: y"))[0]["reason"] == "y"
        done = await here.dlq("replay", "--topic", "labels", "--reason", "x: y")
        assert f"1 records sent to {topic}" in done.stdout

        async def stored():
            return await opened.pool.fetchval("SELECT count(*) FROM labels") == 1

        await until(stored, "the label is stored")


def test_records_that_an_operator_sends_again_are_no_schema_break():
    judged = upstream.Upstream(0.0, 600_000)
    letter = dead_letters.unpack(refused(dead_letters.pack("t.dlq", record(), "value: bad")))
    again = refused(letter.again("transactions"))
    assert judged.breaks_schema(sink.Batch(rejected=[sink.Refused(again, "bad", 0)])) is None
    first = sink.Batch(rejected=[sink.Refused(record(), "bad", 0)])
    assert "bad" in (judged.breaks_schema(first) or "")


names = st.text(max_size=8) | st.sampled_from(sorted(dead_letters._OURS))
own = st.lists(st.tuples(names, st.none() | st.binary(max_size=8)), max_size=5)


@given(st.none() | st.binary(max_size=8), st.none() | st.binary(max_size=8), own, st.text())
def test_whatever_a_record_holds_is_kept_through_every_round(key, value, headers, reason):
    now = record(key, value, headers)
    rounds = dead_letters.rounds(now.headers)
    for _ in range(3):
        rounds += 1
        letter = dead_letters.unpack(refused(dead_letters.pack("t.dlq", now, reason)))
        assert letter.round == rounds
        assert letter.key == key
        assert letter.value == (b"" if key is None and value is None else value)
        assert letter.headers == [h for h in headers if h[0] not in dead_letters._OURS]
        assert letter.source == ("transactions", "3", "5", "1000")
        assert letter.reason == reason[:1_000]
        assert not letter.omitted
        again = letter.again("transactions")
        now = record(again.key, again.value, again.headers)


@pytest.mark.parametrize(
    ("sizes", "omitted"),
    [
        ((10, 950_000, 10), "value"),
        ((10, 500_000, 500_000), "headers"),
        ((10, 950_000, 950_000), "headers,value"),
        ((10, 10, 950_000), "headers"),
        ((950_000, 10, 10), "key"),
        ((450_000, 500_000, 10), "value"),
        ((950_000, 950_000, 950_000), "headers,value,key"),
    ],
)
def test_of_a_record_that_is_too_long_what_fits_is_kept(sizes, omitted):
    key, value, header = (b"x" * size for size in sizes)
    message = dead_letters.pack("t.dlq", record(key, value, [("own", header)]), "value: bad")
    letter = dead_letters.unpack(refused(message))
    assert letter.omitted == omitted
    assert letter.whole == (omitted == "headers")
    kept = {"key": letter.key, "value": letter.value or None, "headers": letter.headers or None}
    assert {part for part, found in kept.items() if found is None} == set(omitted.split(","))
    assert letter.reason == "value: bad"


def test_a_letter_of_an_earlier_release_is_read():
    former = [("topic", b"transactions"), ("partition", b"3"), ("offset", b"12")]
    former += [("reason", b"value: is empty"), ("omitted", b"too long to be copied")]
    letter = dead_letters.unpack(refused(publishing.Message("t.dlq", b"7", b"", former)))
    assert letter.source == ("transactions", "3", "12", "")
    assert (letter.reason, letter.round, letter.headers) == ("value: is empty", 1, [])
    assert not letter.whole


@given(st.binary())
def test_nothing_that_a_terminal_obeys_is_shown(raw):
    assert dlq.visible(raw).isprintable()


@pytest.mark.parametrize("text", ["\u202e", "\x9b31m", "\r", "\u2028", "\x00"])
def test_what_hides_or_moves_text_is_escaped(text):
    assert dlq.visible(text).startswith("\\")


@pytest.mark.parametrize("command", [("dlq", "list"), ("dlq", "replay"), ("resume",)])
async def test_brokers_that_are_silent_end_a_command(here, servers, command):
    servers.kafka.kill(signal.SIGSTOP)
    try:
        done = await here.run(*command)
    finally:
        servers.kafka.kill(signal.SIGCONT)
        await here.answers()
    assert done.returncode == 75
    assert f"cerberus {command[0]}: no Kafka broker answered" in done.stderr
    assert "Traceback" not in done.stderr


async def _to_the_end(letters):
    async for _ in letters:
        pass


async def test_brokers_that_fall_silent_while_letters_are_read_end_it_too(here, servers):
    opened = here.opened
    topic = opened.config.kafka.topic(kafka.DEAD_LETTERS)
    letter = dead_letters.pack(topic, record(value=os.urandom(100_000)), "value: bad")
    for _ in range(100):
        sent = await opened.kafka.send(topic, letter.value, headers=list(letter.headers))
    await sent
    told = dead_letters.read(opened.config, kafka.DEAD_LETTERS)
    async with contextlib.aclosing(told) as letters:
        await anext(letters)
        servers.kafka.kill(signal.SIGSTOP)
        try:
            with pytest.raises(errors.StoreUnavailable):
                await asyncio.wait_for(_to_the_end(letters), 60)
        finally:
            servers.kafka.kill(signal.SIGCONT)
        await here.answers()


async def test_what_its_writer_has_not_committed_is_not_waited_for(here):
    topic = here.opened.config.kafka.topic(kafka.DEAD_LETTERS)
    brokers = here.opened.config.kafka.bootstrap
    writer = AIOKafkaProducer(bootstrap_servers=brokers, transactional_id=f"{topic}.test")
    await writer.start()
    await writer.begin_transaction()
    await writer.send_and_wait(topic, b"{", key=b"1")
    assert await here.listed() == []
    await writer.commit_transaction()
    await writer.stop()
    assert len(await here.listed()) == 1
