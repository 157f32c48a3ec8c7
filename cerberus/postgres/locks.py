"""Locks across instances, held in Postgres."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg

from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import refusals

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
            None when another instance holds it; else a function to await every few seconds, which
            raises `StoreUnavailable` when the lock is lost, or its server has become a standby:
            another instance may hold the lock on the server that took over.

        Raises:
            StoreUnavailable: Postgres did not answer within 10 s, or takes no writes.
        """
        async with postgres_pool.unavailable(self._pool):
            with refusals.connecting():
                connection = await self._pool.acquire(timeout=postgres_pool.QUERY_S)
        try:
            async with postgres_pool.unavailable(self._pool):
                await postgres_pool.prove(connection)
                held = await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, hashtext($2))", _SINGLETON_LOCK, name
                )

            async def still_held() -> None:
                async with postgres_pool.unavailable(self._pool):
                    await postgres_pool.prove(connection)

            yield still_held if held else None
        finally:
            # The pool resets the connection, which releases the lock.
            await postgres_pool.release(self._pool, connection)
