"""The pool of Redis that all parts share: a deadline on each call, and what is "down".

Commands are those of Redis 6.2. Nothing is sent before the first use of the pool.
"""

import asyncio
import contextlib
import functools
import hashlib
import re
import ssl
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cerberus import errors, settings
from cerberus.online import refusals

CALL_S = 2.0
"""Deadline of a command to Redis, s."""

REDIS_DOWN = (
    TimeoutError,
    OSError,
    redis.exceptions.RedisError,
    redis.exceptions.RedisClusterException,
)

REFUSALS = {
    "READONLY": "it is a replica",
    "MASTERDOWN": "it is a replica without its primary",
    "LOADING": "it is still loading its data",
    "CLUSTERDOWN": "its cluster is not complete",
    "TRYAGAIN": "its cluster is moving the keys",
    "NOREPLICAS": "too few of its replicas are reachable",
    "OOM": "its memory is full",
    "MISCONF": "it cannot save its data to disk",
}
"""The error codes of a server that cannot do its work now, and what each means."""
_REFUSAL = re.compile(rf"\b({'|'.join(REFUSALS)})\b")
_RENEW_S = 0.5
_renewed_s: "weakref.WeakKeyDictionary[Any, float]" = weakref.WeakKeyDictionary()

Redis = "redis.asyncio.Redis | redis.asyncio.RedisCluster"
Connected = Callable[[Any], Awaitable[None]]
# A script, its keys, its arguments.
Call = tuple[str, Sequence[bytes | str], Sequence[bytes | int | str]]


def options(config: settings.Settings) -> dict[str, Any]:
    """Return the options of a Redis client; every command has a deadline of 2 s.

    Raises:
        ConfigError: A file of certificates that the address names cannot be read.
    """
    address = config.redis.address
    address.check_files()
    found: dict[str, Any] = {
        "host": address.host,
        "port": address.port,
        "socket_timeout": CALL_S,
        "socket_connect_timeout": CALL_S,
        "health_check_interval": 15,
        "driver_info": None,  # else each connection reads files, then sends what 6.2 does not know
    }
    if not config.redis.cluster:
        found["db"] = address.database  # Feast's cluster client refuses even 0
    login = {"username": address.username, "password": address.password}
    found |= {name: value for name, value in login.items() if value}
    if address.tls:
        found["ssl"] = True
        if not config.redis.tls_verify:
            found |= {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    return {**found, **address.options}


def connect(
    config: settings.Settings, connected: Connected | None = None
) -> "redis.asyncio.Redis | redis.asyncio.RedisCluster":
    """Make the shared pool; nothing is sent yet.

    Args:
        config: Settings.
        connected: Awaited with each new connection, before it is used.

    Raises:
        ConfigError: A file of certificates that the address names cannot be read.
    """
    client = redis.asyncio.RedisCluster if config.redis.cluster else redis.asyncio.Redis
    made = client(**options(config))
    if connected is not None:
        shared: Any = getattr(made, "connection_pool", made)
        shared.connection_kwargs["redis_connect_func"] = connected
    return made


async def check(config: settings.Settings) -> None:
    """Ask Redis once whether it accepts this process.

    Raises:
        FeaturesUnavailable: It did not answer in time.
        ConfigError: It refuses the address, or is a cluster while REDIS_CLUSTER is 0.
    """
    # The shared pool would retry until its deadline, which would hide the reason.
    once = {"retry": Retry(NoBackoff(), 0)}
    client = redis.asyncio.RedisCluster if config.redis.cluster else redis.asyncio.Redis
    asking: Any = client(**options(config) | once)
    try:
        await answers(asking, asking.ping())
        if not config.redis.cluster:
            await _refuse_cluster(asking)
    finally:
        await asking.aclose()


async def _refuse_cluster(client: Any) -> None:
    with contextlib.suppress(redis.exceptions.ResponseError, TimeoutError):
        async with asyncio.timeout(CALL_S):
            found = await client.info("cluster")
        if found.get("cluster_enabled"):
            raise errors.ConfigError("REDIS_URL is a node of a Redis Cluster: set REDIS_CLUSTER=1")


async def answers(client: Any, command: Awaitable[Any], timeout_s: float = CALL_S) -> Any:
    """Await the answer of Redis.

    A server that refuses may have failed over to another one behind the same address, so its
    connections are closed, and the next attempt resolves the address again.

    Args:
        client: The shared pool.
        command: Sent by that client.
        timeout_s: To wait.

    Raises:
        FeaturesUnavailable: It did not answer in time, or refuses; the message has its error code.
        ConfigError: It refuses a setting.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await command
    except redis.exceptions.NoScriptError:
        raise
    except REDIS_DOWN as error:
        if refused := refusals.sentence(error):
            raise refused from error
        word = refusal(error)
        if word is not None or (_silent(error) and timeout_s >= CALL_S):
            await _renew(client)
        if word is not None:
            sentence = f"Redis refuses: {word} ({REFUSALS[word]})"
        else:
            sentence = f"Redis did not answer: {type(error).__name__}: {error}".rstrip(": ")
        raise errors.FeaturesUnavailable(sentence) from error


def refusal(error: BaseException) -> str | None:
    """Return the code of `REFUSALS` in an error, also inside a script's; None without one.

    Redis 6.2 answers a failed script with a text that contains the code somewhere.
    """
    if getattr(error, "status_code", None) in REFUSALS:
        return str(error.status_code)  # type: ignore[attr-defined]
    # The client puts the command before the answer, and its arguments may be any text.
    found = _REFUSAL.search(str(error).rpartition("caused error: ")[2])
    return found and found[1]


def _silent(error: BaseException) -> bool:
    return isinstance(error, TimeoutError | redis.exceptions.TimeoutError)


async def _renew(client: Any) -> None:
    """Replace a client's idle connections now, and those in use after their answer."""
    now_s = time.monotonic()
    if now_s - _renewed_s.get(client, -_RENEW_S) < _RENEW_S:
        return
    _renewed_s[client] = now_s
    pool = getattr(client, "connection_pool", None)
    with contextlib.suppress(*REDIS_DOWN):
        if pool is None:
            await client.aclose()  # a cluster client: its next call discovers the nodes again
        else:
            await pool.update_active_connections_for_reconnect()
            await pool.disconnect(inuse_connections=False)


async def evaluate(client: Any, calls: Sequence[Call], timeout_s: float = CALL_S) -> list[Any]:
    """Run scripts in one round trip, or in a few if a server has lost them.

    Raises:
        FeaturesUnavailable: Redis did not answer in time, or refuses.
    """

    async def call() -> list[Any]:
        pipe = client.pipeline(transaction=False)
        for script, keys, arguments in calls:
            # Not `pipe.evalsha`: its cluster form refuses what the cluster itself accepts.
            pipe.execute_command("EVALSHA", _sha(script), len(keys), *keys, *arguments)
        found: list[Any] = await answers(client, pipe.execute(), timeout_s)
        return found

    try:
        return await call()
    except redis.exceptions.NoScriptError:
        for script in {script for script, _, _ in calls}:
            await answers(client, client.script_load(script))
        return await call()


@functools.cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
