"""Servers for one run, and the removal of their files afterwards."""

import asyncio
import logging
import os
import pathlib
import secrets
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

import asyncpg
import redis.asyncio

from cerberus import errors, stack

# A run never uses the caller's servers or settings.
_FOREIGN = ("CERBERUS_", "KAFKA_", "REDIS_", "DATABASE_")
Run = Callable[[stack.Stack, Mapping[str, str], pathlib.Path], Awaitable[Sequence[str]]]


def on_servers(name: str, run: Run) -> int:
    """Run something on empty servers and return the exit status.

    Args:
        name: Name of the run; its files are below `.cerberus`.
        run: Takes servers, environment and directory, and returns the differences that it found.

    Returns:
        0; 1 if there are differences, and then all files are kept; 2 if a server cannot be started.
    """
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # brokers go away on purpose
    environ = {
        name: value
        for name, value in os.environ.items()
        if name == "CERBERUS_STACK" or not name.startswith(_FOREIGN)
    }
    directory = pathlib.Path(".cerberus", name).absolute()
    try:
        # An interrupted run leaves servers behind, and files that were truncated on purpose.
        stack.clean(directory)
        with stack.servers(directory, environ, durable=False) as servers:
            differences = asyncio.run(_run(name, run, servers, environ, directory))
    except errors.CerberusError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    if not differences:
        stack.clean(directory)
    return 1 if differences else 0


async def _run(
    name: str,
    run: Run,
    servers: stack.Stack,
    environ: Mapping[str, str],
    directory: pathlib.Path,
) -> Sequence[str]:
    name = f"{name}{secrets.token_hex(4)}"
    connection = await asyncpg.connect(servers.postgres.url, timeout=10)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    async with redis.asyncio.Redis.from_url(servers.redis.url) as client:
        await client.flushall()
    own = {
        "KAFKA_PREFIX": f"{name}.",
        "DATABASE_URL": f"{servers.postgres.url.rpartition('/')[0]}/{name}",
    }
    return await run(servers, {**environ, **servers.environ, **own}, directory)
