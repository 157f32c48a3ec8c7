import io
import logging

import orjson
import pytest

from cerberus import kafka, settings
from cerberus.telemetry import logs, repeats


class Log:
    """A handler with a manual clock, and what it wrote."""

    def __init__(self):
        self.now_s = 0.0
        self.handler = repeats.Handler(lambda: self.now_s)
        self.handler.setFormatter(logs.JsonLines())
        self.handler.setStream(io.StringIO())

    def say(self, name, message, *arguments, level=logging.ERROR, at_s=None):
        self.now_s = self.now_s if at_s is None else at_s
        self.handler.handle(logging.LogRecord(name, level, "", 0, message, arguments, None))

    def lines(self):
        return [orjson.loads(line) for line in self.handler.stream.getvalue().splitlines()]

    def messages(self):
        return [line["message"] for line in self.lines()]


def test_a_library_s_repeated_error_is_one_line_a_minute_with_the_count():
    log = Log()
    for tenth in range(1_500):
        log.say("aiokafka", "node %s: %s", tenth % 3, "refused", at_s=tenth / 10)
    lines = log.lines()
    assert [line.get("suppressed") for line in lines] == [None, 599, 599]
    assert [line["message"] for line in lines] == ["node 0: refused"] * 3


def test_the_count_is_told_even_if_the_error_does_not_come_again():
    log = Log()
    for _ in range(5):
        log.say("redis", "away")
    log.say("cerberus.app", "hello", level=logging.INFO, at_s=61)
    assert log.messages() == ["away", "hello", "away"]
    assert log.lines()[-1]["suppressed"] == 3
    log.say("cerberus.app", "hello", level=logging.INFO, at_s=200)
    assert log.messages()[3:] == ["hello"]


def test_what_differs_and_what_is_ours_is_written():
    log = Log()
    for name, message in (
        ("aiokafka", "one"),
        ("aiokafka", "other"),
        ("asyncpg", "one"),
        ("cerberus.consumer", "one"),
        ("cerberus.consumer", "one"),
        ("uvicorn.error", "one"),
        ("uvicorn.error", "one"),
    ):
        log.say(name, message)
    assert len(log.lines()) == 7
    log.say("aiokafka", "one", level=logging.INFO)
    assert len(log.lines()) == 8


def test_numbers_and_addresses_do_not_make_another_kind():
    log = Log()
    for number in range(100):
        log.say("asyncio", f"<Task-{number} at {number:#x}> was destroyed")
    assert len(log.lines()) == 1


def test_the_memory_is_bounded():
    log = Log()
    for number in range(1_500):
        log.say("library", "x" * 1_000 + "y" * number + chr(0x4E00 + number) * 2)
        log.say("library", chr(0x4E00 + number % 2_000) * 2 + "z" * 5_000)
    assert len(log.handler._told) <= 501
    assert all(len(k) <= 300 for _, k in log.handler._told)
    held = [c.last for c in log.handler._told.values() if c.last]
    assert all(len(record.msg) <= 2_000 for record in held)


@pytest.mark.anyio
async def test_a_client_without_a_broker_is_one_line():
    """The client repeats its warning for as long as a start takes."""
    handler = repeats.Handler()
    handler.setFormatter(logs.JsonLines())
    handler.setStream(io.StringIO())
    logger = logging.getLogger("aiokafka")
    logger.addHandler(handler)
    environ = {
        "KAFKA_BROKER": "127.0.0.1:1",
        "REDIS_URL": "redis://h",
        "DATABASE_URL": "postgres://h/x",
    }
    config = settings.load(environ)
    try:
        for _ in range(20):
            client = kafka.producer(config)
            with pytest.raises(Exception, match="bootstrap"):
                await client.start()
            await kafka.stop(client)
    finally:
        logger.removeHandler(handler)
    lines = handler.stream.getvalue().splitlines()
    assert len([line for line in lines if "Unable connect" in line]) == 1
