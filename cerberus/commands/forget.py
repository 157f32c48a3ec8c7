"""`cerberus forget`: remove one person from every store, and say what the log still holds.

Redis comes first: the claims are found through Postgres, so an interrupted run can be repeated.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Any

from cerberus import (
    assembly,
    claims,
    clock,
    errors,
    kafka,
    printable,
    settings,
    transactions,
    window,
)
from cerberus.files import layouts
from cerberus.online import layout
from cerberus.online import pool as redis_pool
from cerberus.postgres import persons

_KEYS = 500
_YEAR_9999_MS = 253_402_214_400_000
TOPICS = (
    kafka.TRANSACTIONS,
    kafka.DECISIONS,
    kafka.LABELS,
    kafka.DEAD_LETTERS,
    kafka.LABEL_DEAD_LETTERS,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the user and the option."""
    parser.add_argument("user", help="a user id")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(arguments: argparse.Namespace) -> int:
    """Remove the person; return 0, or 1 if nothing was removed or Kafka did not answer."""
    user_id = transactions.parse_user_id({"user_id": layouts.whole(arguments.user, "user_id")})
    config = settings.load(os.environ)
    if not asyncio.run(_remove(config, user_id, sure=arguments.yes)):
        printable.say("nothing was removed")
        return 1
    spans = window.Spans.of(config.windows)
    printable.say(
        "Consumers that hold this user's window in memory write the row again until the last "
        f"transaction is {spans.keep_ms // 1000} s old: if it is not yet, run this again then. "
        "A consumer that restarts restores what the log still holds of that time."
    )
    try:
        printable.say(*asyncio.run(held_by_the_log(config, clock.now_ms())))
    except errors.StoreUnavailable as error:
        printable.say(f"how long the log keeps records is unknown: {error}")
        return 1
    return 0


async def _remove(config: settings.Settings, user_id: int, *, sure: bool) -> bool:
    """Show what is stored of a user, ask unless `sure`, and remove it; False if refused."""
    await redis_pool.check(config)
    async with assembly.for_command(config) as service:
        client, postgres = service.redis, service.postgres
        await postgres.schema.migrate()
        person = await postgres.persons.find(user_id)
        keys = _keys(config, person)
        found = {**person.rows, "Redis": await _sum(client, "exists", keys)}
        printable.say(f"user {user_id}: {_listed(found)}")
        if not sure and not _agreed(user_id):
            return False
        gone = await _sum(client, "delete", keys)
        removed = {"Redis": gone, **await postgres.persons.remove(person)}
        printable.say(f"removed: {_listed(removed)}")
    return True


def _keys(config: settings.Settings, person: persons.Person) -> list[bytes | str]:
    """Return the keys that Redis may hold of a user: the row, and the claims of the decisions."""
    row = layout.entity_key(person.user_id, layout.PROJECT)
    return [row, *(claims.key(config, name) for name in person.decision_ids)]


async def _sum(client: Any, command: str, keys: list[bytes | str]) -> int:
    """Send a command for each key and add up the answers.

    Raises:
        FeaturesUnavailable: Redis did not answer; run the command again.
    """
    total = 0
    for at in range(0, len(keys), _KEYS):
        pipe = client.pipeline(transaction=False)
        for key in keys[at : at + _KEYS]:
            getattr(pipe, command)(key)
        total += sum(await redis_pool.answers(client, pipe.execute()))
    return total


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {store}" for store, count in found.items())


def _agreed(user_id: int) -> bool:
    sys.stdout.write(f"Type {user_id} to remove all of it: ")
    sys.stdout.flush()
    return sys.stdin.readline().strip() == str(user_id)


async def held_by_the_log(config: settings.Settings, now_ms: int) -> list[str]:
    """Say until when each topic holds its records, in one sentence each.

    Raises:
        StoreUnavailable: No broker answered.
    """
    told = []
    async with kafka.admin(config.kafka) as client:
        for name in TOPICS:
            topic = config.kafka.topic(name)
            found = await kafka.topic_config(client, topic)
            told.append(f"topic {topic}: {held(found, now_ms)}")
    return told


def held(found: Mapping[str, str], now_ms: int) -> str:
    """Say until when a topic with this configuration holds its records of now."""
    if "retention.ms" not in found:
        return "the broker does not show how long it keeps records"
    if "delete" not in found.get("cleanup.policy", "delete"):
        return "compacted: the newest record of each key stays for ever"
    retention_ms, segment_ms = int(found["retention.ms"]), int(found.get("segment.ms", 0))
    if retention_ms < 0:
        return "retention.ms -1: it keeps records for ever; set it, or delete records by hand"
    # A segment is deleted as a whole, when its newest record is old enough.
    end_ms = now_ms + retention_ms + segment_ms
    gone = f"gone by {transactions.format_ms(end_ms)}" if end_ms < _YEAR_9999_MS else "never gone"
    return f"retention.ms {retention_ms}, segments of {segment_ms} ms: {gone}"
