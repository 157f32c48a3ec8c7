"""`cerberus dlq`: list, show and send again refused records."""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncGenerator

from cerberus import kafka, printable, publishing, settings, transactions
from cerberus.api import parameters
from cerberus.stream import dead_letters

_TOPICS = {
    "transactions": (kafka.DEAD_LETTERS, kafka.TRANSACTIONS),
    "labels": (kafka.LABEL_DEAD_LETTERS, kafka.LABELS),
}
_COLUMNS = ("partition", "offset", "set aside", "round", "key", "field", "reason")
_KEY_CHARACTERS = 40
_BATCH_RECORDS = 50  # of at most 900 kB each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="one line for each letter, with tabs between columns")
    show = actions.add_parser("show", help="everything about one letter")
    replay = actions.add_parser(
        "replay",
        help="send records to their topic again, unchanged",
        description="""Send records to their topic again, with the key, value and headers that they
had. A transaction that has been accepted since is a duplicate and changes nothing. A record that is
refused again becomes another letter, in the next round. Letters stay where they are: use --since or
--round to select those that were not sent before.""",
    )
    for each in (listing, show, replay):
        each.add_argument(
            "--topic", choices=_TOPICS, default="transactions", help="default: transactions"
        )
    show.add_argument("partition", type=_count, help="as `list` shows it")
    show.add_argument("offset", type=_count, help="as `list` shows it")
    for each in (listing, replay):
        each.add_argument(
            "--reason", default="", help="only letters whose reason contains this text"
        )
        each.add_argument(
            "--since", default="1970-01-01", help="only letters since this RFC 3339 time"
        )
        each.add_argument("--round", type=_count, help="only records refused so many times")
        each.add_argument("--limit", type=_count, help="at most so many letters")
    replay.add_argument("--dry-run", action="store_true", help="only list what would be sent")


def run(arguments: argparse.Namespace) -> int:
    """Perform the action; return 0.

    Raises:
        InvalidInput: An option is wrong, or there is no such letter.
        StoreUnavailable: The brokers did not answer.
    """
    actions = {"list": _list, "show": _show, "replay": _replay}
    try:
        asyncio.run(actions[arguments.action](settings.load(os.environ), arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # as with `| head`; Python would flush again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _list(config: settings.Settings, arguments: argparse.Namespace) -> None:
    printable.say_columns(*_COLUMNS)
    async with contextlib.aclosing(_chosen(config, arguments)) as letters:
        async for letter in letters:
            printable.say_columns(*_cells(letter))


async def _show(config: settings.Settings, arguments: argparse.Namespace) -> None:
    place = (arguments.partition, arguments.offset)
    told = dead_letters.read(config, _TOPICS[arguments.topic][0], place=place)
    async with contextlib.aclosing(told) as letters:
        async for letter in letters:
            topic, partition, offset, timestamp_ms = map(visible, letter.source)
            printable.say(f"set aside  {transactions.format_ms(letter.set_aside_ms)}")
            printable.say(f"from       {topic}, partition {partition}, offset {offset}")
            printable.say(f"timestamp  {_moment(timestamp_ms)}")
            printable.say(f"reason     {visible(letter.reason)}")
            printable.say(f"round      {letter.round}")
            if letter.omitted:
                printable.say(f"left out   {visible(letter.omitted)}: too large to copy")
            for name, value in letter.headers:
                printable.say(f"header     {visible(name)}: {visible(value)}")
            printable.say(f"key        {visible(letter.key)}")
            printable.say(f"value      {visible(letter.value)}")


async def _replay(config: settings.Settings, arguments: argparse.Namespace) -> None:
    topic = config.kafka.topic(_TOPICS[arguments.topic][1])
    publisher = publishing.Publisher(config)
    batch: list[publishing.Message] = []
    sent = omitted = 0

    async def flush() -> None:
        nonlocal sent
        await publisher.publish_all([] if arguments.dry_run else batch)
        sent += len(batch)
        batch.clear()

    try:
        async with contextlib.aclosing(_chosen(config, arguments)) as letters:
            async for letter in letters:
                if not letter.whole:
                    omitted += 1
                    continue
                if arguments.dry_run:
                    printable.say_columns(*_cells(letter))
                batch.append(letter.again(topic))
                if len(batch) == _BATCH_RECORDS:
                    await flush()
        await flush()
    finally:
        await publisher.close()
        printable.say(
            f"{sent} records {'would be sent' if arguments.dry_run else 'sent'} to {topic}"
        )
    if omitted:
        printable.say(
            f"{omitted} cannot be sent: they were too large to be copied", file=sys.stderr
        )


async def _chosen(
    config: settings.Settings, arguments: argparse.Namespace
) -> AsyncGenerator[dead_letters.Letter, None]:
    """Yield the letters that the options select."""
    since_ms, chosen = parameters.since_ms(arguments.since), 0
    told = dead_letters.read(config, _TOPICS[arguments.topic][0], since_ms)
    async with contextlib.aclosing(told) as letters:
        async for letter in letters:
            if chosen == arguments.limit:
                break
            if arguments.reason.casefold() in letter.reason.casefold() and arguments.round in (
                None,
                letter.round,
            ):
                chosen += 1
                yield letter


def _cells(letter: dead_letters.Letter) -> tuple[object, ...]:
    key, (field, _, reason) = visible(letter.key), letter.reason.partition(": ")
    moment = transactions.format_ms(letter.set_aside_ms)
    if len(key) > _KEY_CHARACTERS:
        key = f"{key[:_KEY_CHARACTERS]}…"
    return letter.partition, letter.offset, moment, letter.round, key, field, reason


def _moment(timestamp_ms: str) -> str:
    try:
        return transactions.format_ms(int(timestamp_ms))
    except (ValueError, OverflowError):
        return timestamp_ms or "unknown"


def visible(raw: bytes | str | None) -> str:
    """Return a text for a terminal, with control characters escaped."""
    if raw is None:
        return "(none)"
    return printable.escaped(
        raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
