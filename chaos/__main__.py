"""`python -m chaos`: real servers, three instances, faults while records flow; then exactness.

Prints what was injected and compared; the status is 1 on any difference.
"""

import argparse
import asyncio
import functools
import logging
import os
import pathlib
import secrets
import sys
from collections.abc import Mapping

import asyncpg
import redis.asyncio

from cerberus import errors, stack
from chaos import cluster, runs

DIRECTORY = pathlib.Path(".cerberus/chaos")
# Never the servers or the settings of whoever calls.
_FOREIGN = ("CERBERUS_", "KAFKA_", "REDIS_", "DATABASE_")


def main() -> int:
    """Run once and return the exit status."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="records under fire (200000)")
    parser.add_argument("--kills", type=int, default=15, help="instances killed by SIGKILL (15)")
    parser.add_argument("--seed", type=int, default=7, help="of everything drawn (7)")
    chosen = parser.parse_args()
    if chosen.events < 1_000 or chosen.kills < 3:
        parser.error("--events must be at least 1000, --kills at least 3")
    plan = runs.default(chosen.events, chosen.kills, chosen.seed)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # brokers go away on purpose
    environ = {
        name: value
        for name, value in os.environ.items()
        if name == "CERBERUS_STACK" or not name.startswith(_FOREIGN)
    }
    directory = DIRECTORY.absolute()
    try:
        # A run that was interrupted leaves servers behind, and files that were cut on purpose.
        stack.clean(directory)
        with stack.servers(directory, environ, durable=False) as servers:
            told = asyncio.run(_run(servers, environ, directory, plan))
    except errors.CerberusError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    if not told.differences:
        stack.clean(directory)
    return 1 if told.differences else 0


async def _run(
    servers: stack.Stack, environ: Mapping[str, str], directory: pathlib.Path, plan: runs.Plan
) -> runs.Told:
    name = f"chaos{secrets.token_hex(4)}"
    connection = await asyncpg.connect(servers.postgres.url, timeout=10)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    async with redis.asyncio.Redis.from_url(servers.redis.url) as client:
        await client.flushall()
    own = {
        "KAFKA_PREFIX": f"{name}.",
        "DATABASE_URL": f"{servers.postgres.url.rpartition('/')[0]}/{name}",
    }
    environ = {**environ, **servers.environ, **own}
    async with cluster.opened(servers, environ, directory, users=runs.USERS) as target:
        told = await runs.run(target, plan, functools.partial(print, flush=True))
    print(runs.table(told), flush=True)
    return told


if __name__ == "__main__":
    sys.exit(main())
