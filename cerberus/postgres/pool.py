"""The shared pool of connections to Postgres, its deadlines, and which errors mean "down".

Nothing is sent before the first use of the pool.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import asyncpg
from asyncpg.exceptions import _base

from cerberus import errors, settings
from cerberus.postgres import connecting, refusals

QUERY_S = 10
"""Deadline of a statement, and of a wait for a connection."""
NO_IDLING = f"SET LOCAL idle_in_transaction_session_timeout = '{QUERY_S}s'"
"""The first statement of a transaction with several: otherwise a process that froze in it would
keep others from starting, and months from being dropped."""
_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)
_POSTGRES_DOWN = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # on a connection that the server has just ended
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.InternalServerError,
    asyncpg.InvalidCachedStatementError,  # a table changed within a transaction of ours
    asyncpg.InvalidTransactionStateError,  # idle_in_transaction_session_timeout and others
    asyncpg.ObjectNotInPrerequisiteStateError,  # lock_timeout
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
)
_REFUSED_DATA = (
    asyncpg.DataError,
    _base.DataError,  # of the client, which cannot write the value
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.RaiseError,  # by a trigger
    UnicodeEncodeError,
)
# They stop any write, under a code that stands for large rows besides.
_NO_WRITES = ("GetNewTransactionId", "GetNewMultiXactId")
_REASON_CHARACTERS = 300  # asyncpg quotes whole columns
# After these, another server may have taken over.
_LEFT = (
    OSError,
    TimeoutError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.ReadOnlySQLTransactionError,
)
_READ_ONLY = "SELECT current_setting('transaction_read_only')::boolean"
T = TypeVar("T")


def connect(config: settings.Settings) -> asyncpg.Pool:
    """Make the shared pool; await it to open it.

    Raises:
        ConfigError: A file of certificates that the address names cannot be read.
    """
    address = connecting.options(config.postgres.address)
    return asyncpg.create_pool(
        **address, min_size=0, max_size=8, command_timeout=QUERY_S, init=_check_encoding
    )


async def _check_encoding(connection: asyncpg.Connection) -> None:
    encoding = connection.get_settings().server_encoding
    if encoding != "UTF8":
        raise errors.ConfigError(
            f"DATABASE_URL: the encoding of the database is {encoding}, which cannot hold every "
            "name: create another with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )


async def close(pool: asyncpg.Pool, within_s: float) -> None:
    """Close the pool; connections that do not close in time are aborted."""
    try:
        async with asyncio.timeout(within_s):
            await pool.close()
    except TimeoutError:
        pool.terminate()


@contextlib.asynccontextmanager
async def connection(pool: asyncpg.Pool) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection to Postgres.

    Raises:
        StoreUnavailable: Postgres did not answer within 10 s, or takes no writes.
        NeedsOperator: Tables of this version are missing; `migrate` makes them.
        DataRefused: Postgres refuses the data of a row.
        ConfigError: Postgres refuses the credentials, the database or a permission, or its
            encoding is not UTF-8.
    """
    async with unavailable(pool):
        with refusals.connecting():
            borrowed = await pool.acquire(timeout=QUERY_S)
        try:
            yield borrowed
        finally:
            await release(pool, borrowed)


async def release(pool: asyncpg.Pool, borrowed: asyncpg.Connection) -> None:
    """Give a connection back, within 2 s."""
    try:
        await pool.release(borrowed, timeout=2)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        # The pool has terminated it already if the release took too long.
        with contextlib.suppress(asyncpg.InterfaceError):
            borrowed.terminate()


async def prove(connection: asyncpg.Connection) -> None:
    """Raise an error if the server takes no writes now, as a standby does.

    Raises:
        ReadOnlySQLTransactionError: It takes no writes; `unavailable` translates the error.
    """
    if await connection.fetchval(_READ_ONLY):
        raise asyncpg.ReadOnlySQLTransactionError("the server is a standby, or set to read-only")


@contextlib.asynccontextmanager
async def unavailable(pool: asyncpg.Pool) -> AsyncIterator[None]:
    """Translate errors of Postgres into the service's own.

    If another server may have taken over, all connections are replaced at their next use, and
    resolve the address again.

    Raises:
        StoreUnavailable: Postgres did not answer, or takes no writes.
        NeedsOperator: Tables of this version are missing.
        DataRefused: It refuses the data of a row.
        ConfigError: Postgres refuses the credentials, the database or a permission.
    """
    try:
        yield
    except refusals.REFUSED as error:
        raise refusals.sentence(error) from error
    except _NOT_MIGRATED as error:
        raise errors.NeedsOperator(
            "Postgres is missing tables of this version: run `python -m cerberus migrate` "
            f"({error})"
        ) from error
    except _REFUSED_DATA as error:
        if getattr(error, "server_source_function", None) in _NO_WRITES:
            raise errors.StoreUnavailable(f"Postgres takes no writes: {error}") from error
        raise errors.DataRefused(f"Postgres refuses it: {error}"[:_REASON_CHARACTERS]) from error
    except asyncpg.ReadOnlySQLTransactionError as error:
        await pool.expire_connections()
        raise errors.StoreUnavailable(f"Postgres takes no writes: {error}") from error
    except _POSTGRES_DOWN as error:
        if isinstance(error, _LEFT):
            await pool.expire_connections()
        raise errors.StoreUnavailable(f"Postgres did not answer: {error!r}") from error


class Turns:
    """Lets only a few calls at a time use Postgres, so that other work finds free connections.

    Args:
        at_once: How many calls may hold a connection.
        waiting: How many calls may run or wait at most.
    """

    def __init__(self, at_once: int, waiting: int = 200) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._left = waiting

    def check(self) -> None:
        """Refuse a call that would find no turn, before it costs anything.

        Raises:
            Overloaded: Too many calls wait already.
        """
        if not self._left:
            raise errors.Overloaded

    async def call(
        self, deadline_s: float, function: Callable[..., Awaitable[T]], *arguments: Any
    ) -> T:
        """Wait for a turn, then call the function.

        Raises:
            Overloaded: Too many calls wait already.
            TimeoutError: There was no turn or no answer within `deadline_s`.
        """
        self.check()

        async def turn() -> T:
            async with self._turns:
                return await function(*arguments)

        self._left -= 1
        asking = asyncio.ensure_future(turn())
        try:
            # Not `asyncio.timeout`: it would wait 2 s more for a frozen Postgres to give back the
            # connection.
            await asyncio.wait({asking}, timeout=deadline_s)
        finally:
            self._left += 1
            asking.cancel()
        if not asking.done():
            raise TimeoutError
        return asking.result()


def columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Turn rows into the arrays that `unnest` takes, `width` empty ones when there are no rows."""
    return (
        [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
    )


def together(*writes: tuple[str, Sequence[Any]]) -> tuple[str, list[Any]]:
    """Combine several statements into one, and their arguments into one list."""
    parts: list[str] = []
    arguments: list[Any] = []
    for query, values in writes:
        first, *rest = re.split(r"\$(\d+)", query)
        numbered = (
            f"${int(number) + len(arguments)}{text}"
            for number, text in zip(rest[::2], rest[1::2], strict=True)
        )
        parts.append(first + "".join(numbered))
        arguments += values
    *before, last = parts
    return f"WITH {', '.join(f'w{i} AS ({q})' for i, q in enumerate(before))} {last}", arguments
