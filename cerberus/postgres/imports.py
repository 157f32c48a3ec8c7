"""Imported data in Postgres: facts from before the log, their history for Feast, files' progress.

An imported transaction is a row of `transactions` under topic "import", with epoch 0 and its line
as the offset, so every row of the log wins over it. Calls raise `StoreUnavailable` when Postgres
does not answer in time.
"""

import dataclasses
import datetime
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import asyncpg

from cerberus import labels, transactions, window
from cerberus.features import declared
from cerberus.postgres import apart, facts, months
from cerberus.postgres import pool as postgres_pool

_STATEMENT_S = 600
_LAST_RANK = 999
# An import of the previous release continues, or stays finished, under its new fingerprint.
_ADOPT = """
UPDATE imports SET fingerprint = $1
WHERE fingerprint = $2 AND NOT EXISTS (SELECT FROM imports WHERE fingerprint = $1)
"""
_BEGIN = """
INSERT INTO imports AS i (fingerprint, kind, file, size_bytes, content, reading)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (fingerprint) DO UPDATE SET file = excluded.file
RETURNING rows_done, lines_done, bytes_done, added, rejected, rejects_bytes,
    finished_at IS NOT NULL AS finished, differing, left_out, finished_at,
    content IS NOT NULL AS recorded
"""
_EARLIER = """
SELECT finished_at, rows_done, content, reading FROM imports
WHERE kind = $1 AND file = $2 AND fingerprint <> $3 AND finished_at IS NOT NULL
ORDER BY finished_at DESC LIMIT 1
"""
_ADVANCE = """
UPDATE imports SET rows_done = $2, lines_done = $3, bytes_done = $4, added = $5, rejected = $6,
    rejects_bytes = $7, finished_at = CASE WHEN $8 THEN clock_timestamp() END, differing = $9,
    left_out = $10
WHERE fingerprint = $1
"""
# Of several rows with one identity, the first wins.
_ADD_TRANSACTIONS = f"""
WITH given AS (
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::text[],
        $6::text[], $7::bigint[])
        AS g (user_id, event_ms, transaction_id, amount_minor, currency, merchant_id, line)
    ORDER BY user_id, event_ms, transaction_id COLLATE "C", line
), due AS (
    INSERT INTO history_due AS d (user_id, low_ms, high_ms)
    SELECT user_id, min(event_ms), max(event_ms) FROM given GROUP BY user_id ORDER BY user_id
    ON CONFLICT (user_id) DO UPDATE SET low_ms = least(d.low_ms, excluded.low_ms),
        high_ms = greatest(d.high_ms, excluded.high_ms)
), added AS (
    INSERT INTO transactions (topic, user_id, event_ms, transaction_id, amount_minor, currency,
        merchant_id, epoch, partition, log_offset)
    SELECT '{facts.IMPORTED}', user_id, event_ms, transaction_id, amount_minor, currency,
        merchant_id, 0, 0, line FROM given
    ON CONFLICT (user_id, event_ms, transaction_id) DO NOTHING RETURNING 1
)
SELECT count(*) FROM added
"""
# `seen_ms` is the label's own time: that is when the bank knew it.
_ADD_LABELS = """
WITH added AS (
    INSERT INTO labels (transaction_id, user_id, label, source, labelled_ms, seen_ms)
    SELECT t, u, l, s, at, at
    FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[])
        AS g (t, u, l, s, at)
    ORDER BY t COLLATE "C", u NULLS FIRST, l COLLATE "C", s COLLATE "C", at
    ON CONFLICT DO NOTHING RETURNING 1
)
SELECT count(*) FROM added
"""
_ADD_SCORES = """
WITH added AS (
    INSERT INTO credit_scores (user_id, event_timestamp, created_timestamp, credit_score)
    SELECT u, at, at, s FROM (
        SELECT u, timestamptz 'epoch' + ms * interval '1 millisecond' AS at, s
        FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS g (u, ms, s)
    ) AS given
    ON CONFLICT (user_id, event_timestamp) DO NOTHING RETURNING 1
)
SELECT count(*) FROM added
"""
_TRANSACTIONS_DIFFER = """
SELECT count(*) FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::text[],
    $6::text[], $7::bigint[])
    AS g (user_id, event_ms, transaction_id, amount_minor, currency, merchant_id, line)
JOIN transactions AS t USING (user_id, event_ms, transaction_id)
WHERE (t.amount_minor, t.currency, t.merchant_id)
    IS DISTINCT FROM (g.amount_minor, g.currency, g.merchant_id)
"""
_SCORES_DIFFER = """
SELECT count(*) FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS g (u, ms, s)
JOIN credit_scores AS c ON c.user_id = u
    AND c.event_timestamp = timestamptz 'epoch' + ms * interval '1 millisecond'
WHERE c.credit_score <> s
"""
# `near` reaches back over the longest window, and ahead to the last event whose window holds a new
# row. A frame by time includes the whole millisecond, so rows that come after the current one
# within it are subtracted again.
_COMPUTE = """
WITH due AS (
    DELETE FROM history_due WHERE user_id IN (
        SELECT user_id FROM history_due ORDER BY user_id LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING user_id, low_ms, high_ms
), near AS (
    SELECT t.user_id, t.event_ms, t.amount_minor, t.topic = '{topic}' AS imported,
        t.log_offset, t.event_ms BETWEEN d.low_ms AND d.high_ms + {longest} AS wanted,
        row_number() OVER place - 1 AS rank,
        sum(t.amount_minor) OVER place AS until_it,
        count(*) OVER moment AS of_ms, sum(t.amount_minor) OVER moment AS total_of_ms
    FROM due AS d JOIN transactions AS t ON t.user_id = d.user_id
        AND t.event_ms > d.low_ms - {longest} AND t.event_ms < d.high_ms + {longest}
    WINDOW moment AS (PARTITION BY t.user_id, t.event_ms), place AS (
        moment ORDER BY t.topic = '{topic}', t.transaction_id COLLATE "C"
        ROWS UNBOUNDED PRECEDING)
), counted AS (
    SELECT *, {values} FROM near WINDOW {windows}
), written AS (
    INSERT INTO user_transaction_stats AS s
        (user_id, event_timestamp, created_timestamp, epoch, log_offset, {columns})
    SELECT user_id, at, at, 0, log_offset, {columns} FROM (
        SELECT *, timestamptz 'epoch' + (event_ms * 1000 + least(rank, {last}))
            * interval '1 microsecond' AS at
        FROM counted WHERE imported AND wanted AND (rank < {last} OR rank = of_ms - 1)
    ) AS rows
    ORDER BY user_id, at
    ON CONFLICT (user_id, event_timestamp) DO UPDATE SET
        log_offset = excluded.log_offset, {updates}
    WHERE s.epoch = 0
)
SELECT count(*) FROM due
"""


Position = tuple[int, int, int]


class Source(NamedTuple):
    """A file and how it is read.

    Attributes:
        fingerprint: Identifies both.
        former: Its fingerprint in the previous release; empty if that release cannot read it.
        kind: "transactions", "labels" or "credit_scores".
        file: The file's name.
        size_bytes: Its size.
        content: A hash of its content.
        reading: How it is read.
    """

    fingerprint: str
    former: str
    kind: str
    file: str
    size_bytes: int
    content: str
    reading: str


class Earlier(NamedTuple):
    """An earlier, finished import of a file of the same name.

    Attributes:
        finished_at: When it was finished.
        rows: How many rows it had.
        content: A hash of what the file held; None if it was not recorded.
        reading: How it was read; None if it was not recorded.
    """

    finished_at: datetime.datetime
    rows: int
    content: str | None
    reading: str | None


class Score(NamedTuple):
    """A credit score, valid from `event_ms` on."""

    user_id: int
    event_ms: int
    score: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the import of a file is.

    Attributes:
        position: How many rows, lines and bytes of it are stored.
        added: How many rows were new.
        rejected: How many rows were rejected.
        rejects_bytes: Length of the file of rejects that describes them.
        finished: Whether the whole file is imported.
        differing: How many rows were already there under the same identity with other content.
        left_out: How many rows the mapping left out.
        finished_at: When the whole file had been imported.
        recorded: Whether its whole content is known; otherwise only its size and first MiB.
    """

    position: Position = (0, 0, 0)
    added: int = 0
    rejected: int = 0
    rejects_bytes: int = 0
    finished: bool = False
    differing: int = 0
    left_out: int = 0
    finished_at: datetime.datetime | None = dataclasses.field(default=None, compare=False)
    recorded: bool = dataclasses.field(default=True, compare=False)


class Imports:
    """Writes imported rows, and each file's progress to `imports`.

    Args:
        pool: The shared pool; the tables must exist.
        spans: Names of the windows, such as ("10m",).
    """

    def __init__(self, pool: asyncpg.Pool, spans: Sequence[str]) -> None:
        self._pool = pool
        self._months: set[datetime.datetime] = set()
        self._compute = _computing(window.Spans(tuple(spans)))

    async def begin(self, source: Source) -> tuple[Progress, Earlier | None]:
        """Return the progress of a file, and the last import of another file with its name.

        A new file is recorded; one that the previous release began is continued.
        """
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            told = (source.content, source.reading)
            if source.former:
                await connection.execute(_ADOPT, source.fingerprint, source.former)
            named = (source.kind, source.file)
            found = await connection.fetchrow(
                _BEGIN, source.fingerprint, *named, source.size_bytes, *told
            )
            earlier = await connection.fetchrow(_EARLIER, *named, source.fingerprint)
        position = (found["rows_done"], found["lines_done"], found["bytes_done"])
        return Progress(position, *list(found)[3:]), earlier and Earlier(*earlier)

    async def store(
        self, fingerprint: str, kind: str, records: Sequence[tuple[int, Any]], progress: Progress
    ) -> Progress:
        """Store records of a kind and the progress of their file in one transaction.

        Idempotent: yes. Of transactions with one identity the first wins, and a row of the log
        wins over both; their history is due from then on. A label counts as known from its
        `labelled_at` on, a score from its `timestamp` on.

        Args:
            fingerprint: Identifies the file and how it is read.
            kind: "transactions", "labels" or "credit_scores".
            records: Transactions, labels or `Score`s, each with its line.
            progress: How far the file is with them; `added` and `differing` do not count them yet.

        Returns:
            The progress that was stored.

        Raises:
            DataRefused: Postgres refuses some of them; `refused` says which.
        """
        if kind == "transactions" and records:
            await self._make_months({paid.event_ms for _, paid in records})
        async with postgres_pool.connection(self._pool) as connection, connection.transaction():
            added, differing = await _add(connection, kind, records)
            progress = dataclasses.replace(
                progress, added=progress.added + added, differing=progress.differing + differing
            )
            await connection.execute(
                _ADVANCE,
                fingerprint,
                *progress.position,
                progress.added,
                progress.rejected,
                progress.rejects_bytes,
                progress.finished,
                progress.differing,
                progress.left_out,
            )
        return progress

    async def refused(self, kind: str, records: Sequence[tuple[int, Any]]) -> dict[int, str]:
        """Return why Postgres refuses records, by their place; store nothing."""

        async def attempt(some: Sequence[tuple[int, Any]]) -> None:
            async with postgres_pool.connection(self._pool) as connection:
                attempted = connection.transaction()
                await attempted.start()
                try:
                    await _add(connection, kind, some)
                finally:
                    await attempted.rollback()

        return await apart.write(attempt, records)

    async def _make_months(self, times_ms: Collection[int]) -> None:
        """Make partitions for the months of these times, where it takes only seconds.

        A month that already has rows in the default partition stays there.
        """
        wanted = {months.of_ms(ms) for ms in times_ms} - self._months
        async with postgres_pool.connection(self._pool) as connection:
            await months.add(connection, "transactions", sorted(wanted), months.PATIENT)
        self._months |= wanted

    async def due(self) -> int:
        """Return how many users wait for their history to be computed."""
        async with postgres_pool.connection(self._pool) as connection:
            return int(await connection.fetchval("SELECT count(*) FROM history_due"))

    async def compute(self, users: int) -> int:
        """Compute the history of up to `users` users and return of how many it was computed.

        Each imported transaction gets one row, as `sink` would write it for a log in the order of
        event times, by id within a millisecond: it counts itself and everything stored before it.
        Rows of the log's own transactions stay. Idempotent: yes.
        """
        async with postgres_pool.connection(self._pool) as connection:
            return int(await connection.fetchval(self._compute, users, timeout=_STATEMENT_S))


def _computing(spans: window.Spans) -> str:
    """Return the statement that computes the history of some users."""
    columns = declared.names(declared.streamed(spans.names))
    values: list[str] = []
    windows: list[str] = []
    for i, (count, total) in enumerate(map(declared.of_window, spans.names)):
        values += (
            f"count(*) OVER w{i} - of_ms + rank + 1 AS {count.name}",
            f"(sum(amount_minor) OVER w{i} - total_of_ms + until_it)::float8 / 100 AS {total.name}",
        )
        windows.append(
            f"w{i} AS (PARTITION BY user_id ORDER BY event_ms "
            f"RANGE BETWEEN {spans.spans_ms[i] - 1} PRECEDING AND CURRENT ROW)"
        )
    return _COMPUTE.format(
        topic=facts.IMPORTED,
        longest=spans.longest_ms,
        last=_LAST_RANK,
        values=", ".join(values),
        windows=", ".join(windows),
        columns=", ".join(columns),
        updates=", ".join(f"{column} = excluded.{column}" for column in columns),
    )


async def _add(
    connection: asyncpg.Connection, kind: str, records: Sequence[tuple[int, Any]]
) -> tuple[int, int]:
    """Store records; return how many were new, and how many were there with other content."""
    if kind == "transactions":
        rows: list[Any] = [_transaction(line, paid) for line, paid in records]
        query, differ, width = _ADD_TRANSACTIONS, _TRANSACTIONS_DIFFER, 7
    else:
        rows = [_label(each) if kind == "labels" else each for _, each in records]
        labelled = kind == "labels"  # a label is its own identity
        query, differ, width = (
            (_ADD_LABELS, "", 5) if labelled else (_ADD_SCORES, _SCORES_DIFFER, 3)
        )
    columns = postgres_pool.columns(rows, width)
    added = int(await connection.fetchval(query, *columns, timeout=_STATEMENT_S))
    if added == len(rows) or not differ:
        return added, 0
    return added, int(await connection.fetchval(differ, *columns, timeout=_STATEMENT_S))


def _transaction(line: int, paid: transactions.Transaction) -> tuple[Any, ...]:
    named = (paid.user_id, paid.event_ms, paid.transaction_id)
    return (*named, paid.amount_minor, paid.currency, paid.merchant_id, line)


def _label(label: labels.Label) -> tuple[Any, ...]:
    return (label.transaction_id, label.user_id, label.label, label.source, label.labelled_ms)
