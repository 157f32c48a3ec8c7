"""The pools that all parts share: Redis and Postgres, a deadline on each call, and what is "down".

Commands are those of Redis 6.2. Nothing is sent before the first use of a pool.
"""

import asyncio
import contextlib
import functools
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import asyncpg
import redis.asyncio
import redis.exceptions

from cerberus import errors, settings

CALL_S = 2.0
"""Of a command to Redis."""
QUERY_S = 10
"""Of a statement to Postgres."""
NO_IDLING = f"SET LOCAL idle_in_transaction_session_timeout = '{QUERY_S}s'"
"""First in a transaction of several statements: a process that is frozen in one would otherwise let
no other start, and no month go."""
REDIS_DOWN = (
    TimeoutError,
    OSError,
    redis.exceptions.RedisError,
    redis.exceptions.RedisClusterException,
)
_REFUSED = (
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ClientConfigurationError,
)
_NOT_MIGRATED = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError)
_POSTGRES_DOWN = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # on a connection that the server has just ended
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,
)
T = TypeVar("T")
Redis = "redis.asyncio.Redis | redis.asyncio.RedisCluster"
Connected = Callable[[Any], Awaitable[None]]
# A script, its keys, its arguments.
Call = tuple[str, Sequence[bytes | str], Sequence[bytes | int | str]]


def redis_options(config: settings.Settings) -> dict[str, Any]:
    """Return what a Redis client is built with; every command has a deadline of 2 s."""
    found: dict[str, Any] = {
        "socket_timeout": CALL_S,
        "socket_connect_timeout": CALL_S,
        "health_check_interval": 15,
        "driver_info": None,  # else each connection reads files, then sends what 6.2 has not
    }
    if config.redis.url.startswith("rediss://"):
        found["ssl"] = True
        if not config.redis.tls_verify:
            found |= {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    located = redis.asyncio.connection.parse_url(config.redis.url)
    located.pop("connection_class", None)
    return {"host": "localhost", "port": 6379, **found, **located}


def connect_redis(
    config: settings.Settings, connected: Connected | None = None
) -> "redis.asyncio.Redis | redis.asyncio.RedisCluster":
    """Make the shared pool; nothing is sent yet.

    Args:
        config: Settings.
        connected: Awaited with each new connection, before it is used.

    Raises:
        ConfigError: The address has a parameter that no client knows.
    """
    client = redis.asyncio.RedisCluster if config.redis.cluster else redis.asyncio.Redis
    try:
        made = client(**redis_options(config))
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(f"REDIS_URL: {error}") from error
    if connected is not None:
        shared: Any = getattr(made, "connection_pool", made)
        shared.connection_kwargs["redis_connect_func"] = connected
    return made


async def answers(command: Awaitable[Any], timeout_s: float = CALL_S) -> Any:
    """Await what Redis answers.

    Raises:
        FeaturesUnavailable: It did not, in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await command
    except redis.exceptions.NoScriptError:
        raise
    except REDIS_DOWN as error:
        raise errors.FeaturesUnavailable(f"Redis did not answer: {error!r}") from error


async def evaluate(client: Any, calls: Sequence[Call], timeout_s: float = CALL_S) -> list[Any]:
    """Run scripts in one round trip, in a few where a server has lost them.

    Raises:
        FeaturesUnavailable: Redis did not answer in time.
    """

    async def call() -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for script, keys, arguments in calls:
            # Not `pipe.evalsha`: its cluster form refuses what the cluster itself can do.
            pipe.execute_command("EVALSHA", _sha(script), len(keys), *keys, *arguments)
        found: list[Any] = await answers(pipe.execute(), timeout_s)
        return found

    try:
        return await call()
    except redis.exceptions.NoScriptError:
        for script in {script for script, _, _ in calls}:
            await answers(client.script_load(script))
        return await call()


@functools.cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def connect_postgres(config: settings.Settings) -> asyncpg.Pool:
    """Make the shared pool; await it to open it. Nothing is sent before the first use."""
    return asyncpg.create_pool(
        config.postgres.url, min_size=0, max_size=8, timeout=5, command_timeout=QUERY_S
    )


async def close_postgres(pool: asyncpg.Pool, within_s: float) -> None:
    """Close the pool; a connection that does not end is cut."""
    try:
        async with asyncio.timeout(within_s):
            await pool.close()
    except TimeoutError:
        pool.terminate()


@contextlib.asynccontextmanager
async def connection(pool: asyncpg.Pool) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection to Postgres.

    Raises:
        StoreUnavailable: Postgres did not answer within 10 s.
        NeedsOperator: Tables of this version are missing; they are made by `migrate`.
        ConfigError: It refuses us for good.
    """
    with unavailable():
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
        # The pool ends it by itself when the release took too long.
        with contextlib.suppress(asyncpg.InterfaceError):
            borrowed.terminate()


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """Tell what is wrong with Postgres in the service's own errors."""
    try:
        yield
    except _REFUSED as error:
        raise errors.ConfigError(f"DATABASE_URL: Postgres refuses it: {error}") from error
    except _NOT_MIGRATED as error:
        raise errors.NeedsOperator(
            "Postgres is missing tables of this version: run `python -m cerberus migrate` "
            f"({error})"
        ) from error
    except _POSTGRES_DOWN as error:
        raise errors.StoreUnavailable(f"Postgres did not answer: {error!r}") from error


class Turns:
    """Lets a few calls at a time use Postgres, so that the pool is left to other purposes.

    Args:
        at_once: How many have a connection.
        waiting: How many there may be at most, these included.
    """

    def __init__(self, at_once: int, waiting: int = 200) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._left = waiting

    async def call(
        self, deadline_s: float, function: Callable[..., Awaitable[T]], *arguments: Any
    ) -> T:
        """Call when it is its turn.

        Raises:
            Overloaded: Too many wait already.
            TimeoutError: Turn and answer did not come in time.
        """
        if not self._left:
            raise errors.Overloaded

        async def turn() -> T:
            async with self._turns:
                return await function(*arguments)

        self._left -= 1
        asking = asyncio.ensure_future(turn())
        try:
            # No `timeout` around it: a frozen Postgres keeps its connection for 2 s more.
            await asyncio.wait({asking}, timeout=deadline_s)
        finally:
            self._left += 1
            asking.cancel()
        if not asking.done():
            raise TimeoutError
        return asking.result()


def columns(rows: Sequence[Sequence[Any]], width: int) -> list[list[Any]]:
    """Turn rows into the arrays that `unnest` takes; no rows give empty arrays."""
    return (
        [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
    )


def together(*writes: tuple[str, Sequence[Any]]) -> tuple[str, list[Any]]:
    """Make one statement of several, and one list of their arguments."""
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
