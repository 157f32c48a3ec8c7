"""One person out of every store: `cerberus forget`, and what the log still holds.

Redis first: the names of the claims are found through what Postgres has, so a run that was cut off
can be repeated.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from cerberus import (
    claims,
    errors,
    feast_layout,
    kafka,
    layouts,
    offline,
    pools,
    settings,
    transactions,
    window,
)

_STATEMENT_S, _KEYS = 600, 500
_YEAR_9999_MS = 253_402_214_400_000
TOPICS = (
    kafka.TRANSACTIONS,
    kafka.DECISIONS,
    kafka.LABELS,
    kafka.DEAD_LETTERS,
    kafka.LABEL_DEAD_LETTERS,
)
_TABLES = (
    "transactions",
    "user_transaction_stats",
    "history_due",
    "decisions",
    "credit_scores",
    "synthetic_truth",
)
_IDS = """
SELECT transaction_id, event_ms FROM transactions WHERE user_id = $1
UNION SELECT transaction_id, as_of_ms FROM decisions
WHERE user_id = $1 AND transaction_id IS NOT NULL
"""
# A label without a user speaks of all transactions of its id: it stays when another has one.
_SHARED = "SELECT transaction_id FROM labels WHERE user_id IS NULL AND transaction_id = ANY($1)"
_OTHERS = """
SELECT transaction_id FROM transactions WHERE transaction_id = ANY($1) AND user_id <> $2
UNION SELECT transaction_id FROM decisions WHERE transaction_id = ANY($1) AND user_id <> $2
"""
_LABELS = "user_id = $1 OR user_id IS NULL AND transaction_id = ANY($2)"


class Person:
    """What the stores have of one user.

    Args:
        config: Settings.
        user_id: Whose.
        connection: To Postgres.
        client: Of Redis.
    """

    def __init__(
        self, config: settings.Settings, user_id: int, connection: asyncpg.Connection, client: Any
    ) -> None:
        self._user_id = user_id
        self._connection = connection
        self._client = client
        self._config = config
        self._claims: list[str] = []
        self._shared: list[str] = []

    async def find(self) -> dict[str, int]:
        """Count it, by store; what is there of labels and claims is found through transactions.

        Raises:
            StoreUnavailable: Postgres did not answer.
            FeaturesUnavailable: Redis did not answer.
        """
        user_id = self._user_id
        paid = await self._fetch(_IDS, user_id)
        names = {transactions.decision_id(user_id, *row) for row in paid}
        self._claims = [claims.key(self._config, name) for name in sorted(names)]
        told = await self._fetch(_SHARED, list({row[0] for row in paid}))
        self._shared = list({row[0] for row in told})
        if self._shared:
            others = await self._fetch(_OTHERS, self._shared, user_id)
            self._shared = list({*self._shared} - {row[0] for row in others})
        found = {}
        for table in _TABLES:
            [(found[table],)] = await self._fetch(
                f"SELECT count(*) FROM {table} WHERE user_id = $1", user_id
            )
        [(found["labels"],)] = await self._fetch(
            f"SELECT count(*) FROM labels WHERE {_LABELS}", user_id, self._shared
        )
        return found | {"Redis": sum(await self._ask("exists"))}

    async def remove(self) -> dict[str, int]:
        """Remove what `find` has found, and return how much that was. Idempotent: yes.

        Raises:
            StoreUnavailable: Postgres did not answer; remove again.
            FeaturesUnavailable: Redis did not answer; remove again.
        """
        removed = {"Redis": sum(await self._ask("delete"))}
        async with self._connection.transaction():
            removed["labels"] = await self._delete("labels", _LABELS, self._shared)
            for table in _TABLES:
                removed[table] = await self._delete(table, "user_id = $1")
        return removed

    async def _delete(self, table: str, condition: str, *more: Any) -> int:
        statement = f"DELETE FROM {table} WHERE {condition}"
        done = await self._connection.execute(statement, self._user_id, *more, timeout=_STATEMENT_S)
        return int(done.rpartition(" ")[2])

    async def _fetch(self, query: str, *arguments: Any) -> list[Any]:
        rows: list[Any] = await self._connection.fetch(query, *arguments, timeout=_STATEMENT_S)
        return rows

    async def _ask(self, command: str) -> list[int]:
        found: list[int] = []
        keys = [feast_layout.entity_key(self._user_id, feast_layout.PROJECT), *self._claims]
        for at in range(0, len(keys), _KEYS):
            pipe = self._client.pipeline(transaction=False)
            for key in keys[at : at + _KEYS]:
                getattr(pipe, command)(key)
            found += await pools.answers(pipe.execute())
        return found


async def held_by_the_log(config: settings.Settings, now_ms: int) -> list[str]:
    """Say of each topic until when it holds what it has, a sentence each.

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
    """Say how long a topic of this configuration holds what it has now."""
    if "retention.ms" not in found:
        return "the broker does not show how long it keeps records"
    if "delete" not in found.get("cleanup.policy", "delete"):
        return "compacted: the newest record of each key stays for ever"
    retention_ms, segment_ms = int(found["retention.ms"]), int(found.get("segment.ms", 0))
    if retention_ms < 0:
        return "retention.ms -1: it keeps records for ever; set it, or delete records by hand"
    # A segment is deleted in whole, when the newest of its records is old enough.
    end_ms = now_ms + retention_ms + segment_ms
    gone = f"gone by {transactions.format_ms(end_ms)}" if end_ms < _YEAR_9999_MS else "never gone"
    return f"retention.ms {retention_ms}, segments of {segment_ms} ms: {gone}"


async def forget(config: settings.Settings, user_id: int, *, sure: bool) -> int:
    """Show what there is of a user, ask unless `sure`, and remove it; return the exit status."""
    async with (
        pools.connect_redis(config) as client,
        pools.connect_postgres(config) as pool,
        pools.connection(pool) as connection,
    ):
        await offline.OfflineStore(pool, config.spans).migrate()
        person = Person(config, user_id, connection, client)
        found = await person.find()
        _say(f"user {user_id}: {_listed(found)}")
        if not sure and not _agreed(user_id):
            _say("nothing was removed")
            return 1
        removed = await person.remove()
        _say(f"removed: {_listed(removed)}")
    spans = window.Spans(config.spans, config.allowed_lateness_ms, config.max_future_skew_ms)
    _say(
        "Consumers that have a window of this user in memory write its row again, until its last "
        f"transaction is {spans.keep_ms // 1000} s old: if it paid within that, forget again then. "
        "A consumer that starts anew brings back what the log still holds of that time."
    )
    try:
        for sentence in await held_by_the_log(config, time.time_ns() // 1_000_000):
            _say(sentence)
    except errors.StoreUnavailable as error:
        _say(f"what the log holds is not known: {error}")
        return 1
    return 0


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {store}" for store, count in found.items())


def _agreed(user_id: int) -> bool:
    sys.stdout.write(f"Type {user_id} to remove all of it: ")
    sys.stdout.flush()
    return sys.stdin.readline().strip() == str(user_id)


def _say(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")


def main(argv: Sequence[str]) -> int:
    """Forget by command line.

    Returns:
        The exit status: 0, or 1 when nothing was removed or the log could not be asked.
    """
    parser = argparse.ArgumentParser(
        prog="cerberus forget", description="Remove one person from every store."
    )
    parser.add_argument("user", help="a user id")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    chosen = parser.parse_args(argv)
    user_id = transactions.parse_user_id({"user_id": layouts.whole(chosen.user)})
    return asyncio.run(forget(settings.load(os.environ), user_id, sure=chosen.yes))
