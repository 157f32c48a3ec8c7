"""Lives of the log in Postgres: the epoch of each, where it began, and how far it is stored.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from cerberus.postgres import facts
from cerberus.postgres import pool as postgres_pool

_EPOCH = """
INSERT INTO log_epochs AS l (topic, cluster, partitions, epoch)
VALUES ($1, $2, $3, extract(epoch FROM clock_timestamp())::bigint)
ON CONFLICT (topic) DO UPDATE SET
    epoch = greatest(l.epoch + 1, excluded.epoch), cluster = excluded.cluster,
    partitions = excluded.partitions
WHERE l.cluster <> excluded.cluster OR l.partitions <> excluded.partitions OR l.epoch = $4
RETURNING epoch
"""
_HAS_ROWS = """
SELECT EXISTS (SELECT FROM log_positions
    WHERE topic = $1 AND epoch BETWEEN $2 AND $3 AND partition = $4)
"""
_BEGIN = f"""
WITH life AS (
    INSERT INTO log_begins AS l (topic, epoch, partition, begin_ms) VALUES ($1, $2, $3, $4)
    ON CONFLICT (topic, epoch, partition) DO UPDATE SET begin_ms = l.begin_ms RETURNING begin_ms
)
SELECT begin_ms FROM life WHERE EXISTS (
    SELECT FROM transactions WHERE topic = '{facts.IMPORTED}' AND event_ms <= begin_ms)
"""
_RESUME = """
INSERT INTO log_resumes AS l (topic, epoch, ends)
VALUES ($1, coalesce((SELECT epoch FROM log_epochs WHERE topic = $1), 0), $2)
ON CONFLICT (topic) DO UPDATE SET
    number = l.number + 1, epoch = excluded.epoch, ends = excluded.ends,
    resumed_at = excluded.resumed_at
RETURNING number
"""


class Resumed(NamedTuple):
    """The last resume of consuming after a schema break.

    Attributes:
        number: How many resumes there have been, this one included; 0 if none.
        epoch: The topic's epoch then.
        ends: Where the log of each partition ended then.
    """

    number: int = 0
    epoch: int = 0
    ends: Sequence[int] = ()


class Lives:
    """Reads and writes `log_epochs`, `log_begins` and `log_resumes`, reads `log_positions`.

    Each call is one or two statements by key; safe for concurrent use.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def epoch(
        self, cluster: str, topic: str, partitions: int, *, ended: int | None = None
    ) -> int:
        """Return the epoch of a topic's present life.

        It rises when the cluster or the number of partitions changes, and when the caller has seen
        that epoch `ended` is over; several callers may report that, and it rises once. It follows
        the clock, so a database that lost its data continues above the fences that Redis kept.
        """
        async with postgres_pool.connection(self._pool) as connection:
            risen = await connection.fetchval(_EPOCH, topic, cluster, partitions, ended)
            if risen is not None:
                return int(risen)
            query = "SELECT epoch FROM log_epochs WHERE topic = $1"
            return int(await connection.fetchval(query, topic))

    async def has_rows(
        self, topic: str, epoch: int, partition: int, *, since_epoch: int | None = None
    ) -> bool:
        """Say whether effects of this partition were stored under a range of epochs.

        The range is `since_epoch` to `epoch`, or `epoch` alone when `since_epoch` is None.
        """
        since = epoch if since_epoch is None else since_epoch
        async with postgres_pool.connection(self._pool) as connection:
            return bool(await connection.fetchval(_HAS_ROWS, topic, since, epoch, partition))

    async def imported_until(self, topic: str, epoch: int, partition: int, begin_ms: int) -> int:
        """Return the time until which imported transactions count in a log's windows.

        This is where the log began when this life of it was first read; everything later is in the
        log itself. Idempotent: yes; the first `begin_ms` of a life stays.

        Args:
            topic: The log's topic.
            epoch: The epoch of this life.
            partition: Number of the partition.
            begin_ms: Where the log begins now; stored if this life has no begin yet.

        Returns:
            Ms since the Unix epoch; 0 when no imported transaction lies before it.
        """
        async with postgres_pool.connection(self._pool) as connection:
            return await connection.fetchval(_BEGIN, topic, epoch, partition, begin_ms) or 0

    async def resume(self, topic: str, ends: Sequence[int]) -> int:
        """Let all consumers of a topic continue after a schema break; return the resume's number.

        Args:
            topic: The log's topic.
            ends: Where each partition's log ends now; refused records below it stop nobody.
        """
        async with postgres_pool.connection(self._pool) as connection:
            return int(await connection.fetchval(_RESUME, topic, ends))

    async def resumed(self, topic: str) -> Resumed:
        """Return the last resume of a topic."""
        query = "SELECT number, epoch, ends FROM log_resumes WHERE topic = $1"
        async with postgres_pool.connection(self._pool) as connection:
            found = await connection.fetchrow(query, topic)
        return Resumed(*found) if found else Resumed()
