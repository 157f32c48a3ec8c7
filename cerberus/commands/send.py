"""`cerberus send`: publish a file of transactions."""

import argparse
import asyncio
import os
import pathlib
import sys

from cerberus import clock, errors, printable, settings, window
from cerberus.files import capacity, datafiles, layouts, sending

_SLOWEST = 0.001


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file and the options."""
    parser.description = (
        "Publish transactions from a file, a folder or a glob. The suffix says whether a file is "
        "CSV, JSON or Parquet."
    )
    parser.add_argument("file", type=pathlib.Path, help="the file, the folder or the glob")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=_positive, help="transactions a second")
    pace.add_argument(
        "--speed", type=_positive, help="multiple of the recorded speed; 1: as recorded"
    )
    parser.add_argument(
        "--now", action="store_true", help="replace each timestamp with the time of sending"
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="send even if the topic may delete records before they are consumed",
    )
    parser.add_argument("--select", default="", metavar="SQL", help=layouts.SELECT_HELP)
    parser.add_argument("--encoding", default="", help=layouts.ENCODING_HELP)


def run(arguments: argparse.Namespace) -> int:
    """Check the file, send it, print how many; return 0.

    Raises:
        InvalidInput: A row or an option is wrong, or the topic cannot hold the file; nothing was
            sent.
    """
    pace = sending.Pace(arguments.rate, arguments.speed, arguments.now)
    if pace.now and pace == sending.Pace(now=True):
        raise errors.InvalidInput("--now", "needs --rate or --speed")
    layout = layouts.Layout(arguments.select, arguments.encoding)
    config = settings.load(os.environ)
    sender = sending.Sender(config, arguments.file, layout, pace)
    if others := datafiles.left_out(arguments.file):
        printable.say(others, file=sys.stderr)
    topic = asyncio.run(capacity.ask(config))
    found = sender.check(topic.partitions)
    if not arguments.anyway:
        capacity.check(topic, sender.load(found))
    spans = window.Spans.of(config.windows)
    if not found.count:
        printable.say(f"{arguments.file.name} has no rows", file=sys.stderr)
    elif not pace.now and found.latest_ms < clock.now_ms() - spans.keep_ms:
        printable.say(
            f"every row is older than the {spans.keep_ms // 1000} s that windows keep: behind "
            "newer records of the topic they change no window; --now replaces them",
            file=sys.stderr,
        )
    count = asyncio.run(sender.send(found))
    printable.say(f"{count} transactions sent to {topic.name}")
    return 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not _SLOWEST <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of {_SLOWEST} or more")
    return value
