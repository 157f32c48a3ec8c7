"""Locks across instances: Postgres says who is the only one."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from cerberus.postgres import pool as postgres_pool

_SINGLETON_LOCK = 7_237_002
StillHeld = Callable[[], Awaitable[None]]


class Locks:
    """Holds advisory locks, each on a connection of its own; safe for concurrent use.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @contextlib.asynccontextmanager
    async def singleton(self, name: str) -> AsyncIterator[StillHeld | None]:
        """Try to be the only holder of `name` across instances, while the block lasts.

        Yields:
            None when another holds it; else a function to be awaited every few seconds, which
            raises `StoreUnavailable` when the hold was lost.

        Raises:
            StoreUnavailable: Postgres did not answer within 10 s.
        """
        with postgres_pool.unavailable():
            connection = await self._pool.acquire(timeout=postgres_pool.QUERY_S)
        try:
            with postgres_pool.unavailable():
                held = await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, hashtext($2))", _SINGLETON_LOCK, name
                )

            async def still_held() -> None:
                with postgres_pool.unavailable():
                    await connection.fetchval("SELECT 1")

            yield still_held if held else None
        finally:
            await postgres_pool.release(
                self._pool, connection
            )  # the pool's reset lets go of the lock
