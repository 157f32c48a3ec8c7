"""The pool of Redis that all parts share: a deadline on each call, and what is "down".

Commands are those of Redis 6.2. Nothing is sent before the first use of the pool.
"""

import asyncio
import functools
import hashlib
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
import redis.exceptions

from cerberus import errors, settings

CALL_S = 2.0
"""Deadline of a command to Redis, s."""

REDIS_DOWN = (
    TimeoutError,
    OSError,
    redis.exceptions.RedisError,
    redis.exceptions.RedisClusterException,
)

Redis = "redis.asyncio.Redis | redis.asyncio.RedisCluster"
Connected = Callable[[Any], Awaitable[None]]
# A script, its keys, its arguments.
Call = tuple[str, Sequence[bytes | str], Sequence[bytes | int | str]]


def options(config: settings.Settings) -> dict[str, Any]:
    """Return what a Redis client is built with; every command has a deadline of 2 s."""
    found: dict[str, Any] = {
        "socket_timeout": CALL_S,
        "socket_connect_timeout": CALL_S,
        "health_check_interval": 15,
        "driver_info": None,  # else each connection reads files, then sends what 6.2 does not know
    }
    if config.redis.url.startswith("rediss://"):
        found["ssl"] = True
        if not config.redis.tls_verify:
            found |= {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    located = redis.asyncio.connection.parse_url(config.redis.url)
    located.pop("connection_class", None)
    return {"host": "localhost", "port": 6379, **found, **located}


def connect(
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
        made = client(**options(config))
    except (TypeError, ValueError) as error:
        raise errors.ConfigError(f"REDIS_URL: {error}") from error
    if connected is not None:
        shared: Any = getattr(made, "connection_pool", made)
        shared.connection_kwargs["redis_connect_func"] = connected
    return made


async def answers(command: Awaitable[Any], timeout_s: float = CALL_S) -> Any:
    """Await what Redis answers.

    Raises:
        FeaturesUnavailable: It did not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await command
    except redis.exceptions.NoScriptError:
        raise
    except REDIS_DOWN as error:
        raise errors.FeaturesUnavailable(f"Redis did not answer: {error!r}") from error


async def evaluate(client: Any, calls: Sequence[Call], timeout_s: float = CALL_S) -> list[Any]:
    """Run scripts in one round trip, or in a few if a server has lost them.

    Raises:
        FeaturesUnavailable: Redis did not answer in time.
    """

    async def call() -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for script, keys, arguments in calls:
            # Not `pipe.evalsha`: its cluster form refuses what the cluster itself accepts.
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
