"""Labels in Postgres: all are kept, so it is known which one was valid at any moment.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import collections
import logging
from collections.abc import Sequence
from typing import Any

import asyncpg

from cerberus import errors, labels, synthetic
from cerberus.postgres import apart
from cerberus.postgres import pool as postgres_pool

log = logging.getLogger(__name__)

_INSERT = """
INSERT INTO labels (transaction_id, user_id, label, source, labelled_ms, seen_ms)
SELECT *, least($6::bigint, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)
FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::bigint[])
ON CONFLICT DO NOTHING
RETURNING transaction_id, user_id, label, source, labelled_ms
"""
_WRITE_RULES = """
UPDATE label_rules SET maturity_ms = $1, friendly_fraud_positive = $2
WHERE (maturity_ms, friendly_fraud_positive) <> ($1, $2)
"""
_EXPECT = "INSERT INTO synthetic_truth VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING"
_DUE = """
SELECT transaction_id, label, due_ms, user_id FROM synthetic_truth
WHERE due_ms <= $1 ORDER BY due_ms LIMIT 1000
"""
_FORGET = "DELETE FROM synthetic_truth WHERE transaction_id = ANY($1)"


class LabelRows:
    """Writes `labels`, and keeps the synthetic ones in `synthetic_truth` until they are due.

    Safe for concurrent use.

    Args:
        pool: The shared pool.

    Attributes:
        counts: Labels since the start by outcome: stored, known, invalid.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self.counts: collections.Counter[str] = collections.Counter()

    async def write(
        self, given: Sequence[labels.Label], seen_ms: int
    ) -> list[bool | errors.InvalidInput]:
        """Store labels, and say for each whether it is new. Idempotent: yes; `seen_ms` stays.

        For a label that Postgres refuses, the answer is the error; the others are stored.

        Args:
            given: Labels in any order, repetitions included.
            seen_ms: The time now: a label is known from the moment when it is first stored. If the
                clock of Postgres is behind it, that clock counts.
        """
        if not given:
            return []
        rows = {_row(each) for each in given}
        # Sorted, so that two writers lock rows in one order.
        arranged = sorted(rows, key=lambda row: (row[0], row[1] is not None, row[1:]))
        new: set[tuple[Any, ...]] = set()

        async def insert(some: Sequence[tuple[Any, ...]]) -> None:
            async with postgres_pool.connection(self._pool) as connection:
                columns = postgres_pool.columns(some, 5)
                new.update(map(tuple, await connection.fetch(_INSERT, *columns, seen_ms)))

        refused = {arranged[at]: why for at, why in (await apart.write(insert, arranged)).items()}
        found: list[bool | errors.InvalidInput] = []
        for each in given:
            if (why := refused.get(_row(each))) is not None:
                found.append(errors.InvalidInput("label", why))
                continue
            found.append(_row(each) in new)
            new.discard(_row(each))  # the same one again is known
        self.counts["stored"] += found.count(True)
        self.counts["known"] += found.count(False)
        return found

    async def expect(self, given: Sequence[labels.Label]) -> None:
        """Keep synthetic labels until they are due, at their `labelled_ms`. Idempotent: yes."""
        rows = [(t.transaction_id, t.user_id, t.label, t.labelled_ms) for t in given]
        async with postgres_pool.connection(self._pool) as connection:
            await connection.executemany(_EXPECT, rows)

    async def due(self, now_ms: int) -> list[labels.Label]:
        """Return the synthetic labels that are due, the oldest 1,000."""
        async with postgres_pool.connection(self._pool) as connection:
            rows = await connection.fetch(_DUE, now_ms)
        return [
            labels.Label(row["transaction_id"], row["label"], synthetic.SOURCE, *row[2:])
            for row in rows
        ]

    async def published(self, due: Sequence[labels.Label]) -> None:
        """Remove synthetic labels that were published. Idempotent: yes."""
        async with postgres_pool.connection(self._pool) as connection:
            await connection.execute(_FORGET, [each.transaction_id for each in due])


async def write_rules(connection: asyncpg.Connection, rules: labels.Rules) -> None:
    """Store for the views when a decision is mature and what counts as fraud. Idempotent: yes."""
    written = (rules.maturity_ms, rules.friendly_fraud_positive)
    if await connection.execute(_WRITE_RULES, *written) != "UPDATE 0":
        log.info("the rules of labels are now %s", rules, extra={"action": "label_rules_written"})


def _row(label: labels.Label) -> tuple[Any, ...]:
    return (label.transaction_id, label.user_id, label.label, label.source, label.labelled_ms)
