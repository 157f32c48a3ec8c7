"""Credit scores in Postgres, as Feast reads them.

Calls raise `StoreUnavailable` when Postgres does not answer within 10 s.
"""

import datetime
from collections.abc import Sequence

import asyncpg

from cerberus.postgres import pool as postgres_pool

_SEED = """
INSERT INTO credit_scores (user_id, event_timestamp, credit_score)
SELECT u, $1, s FROM unnest($2::bigint[], $3::bigint[]) AS r (u, s)
ON CONFLICT DO NOTHING
"""
_WERE_SERVED = """
SELECT EXISTS (SELECT FROM credit_scores WHERE created_timestamp IS NOT NULL)
"""


class CreditScores:
    """Reads and writes `credit_scores`; safe for concurrent use.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def were_served(self) -> bool:
        """Say whether any score was ever loaded into the online store."""
        async with postgres_pool.connection(self._pool) as connection:
            return bool(await connection.fetchval(_WERE_SERVED))

    async def seed(self, scores: Sequence[tuple[int, int]], at: datetime.datetime) -> None:
        """Add (user id, score) rows, valid from `at` on. Idempotent: yes, existing rows stay."""
        async with postgres_pool.connection(self._pool) as connection:
            await connection.execute(_SEED, at, *postgres_pool.columns(scores, 2))
