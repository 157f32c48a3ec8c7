"""`python -m chaos`: real servers, three instances, faults while records flow; then exactness.

Prints what was injected and compared; the status is 1 on any difference.
"""

import argparse
import asyncio
import os
import pathlib
import secrets
import sys

import asyncpg
import redis.asyncio

from cerberus import errors, stack
from chaos import cluster, runs

DIRECTORY = pathlib.Path(".cerberus/chaos")


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
    # What was killed before leaves servers behind; their directory names them.
    try:
        with stack.servers(DIRECTORY, os.environ, durable=False) as servers:
            told = asyncio.run(_run(servers, plan))
    except errors.CerberusError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    if not told.differences:
        stack.clean(DIRECTORY)
    return 1 if told.differences else 0


async def _run(servers: stack.Stack, plan: runs.Plan) -> runs.Told:
    name = f"chaos{secrets.token_hex(4)}"
    connection = await asyncpg.connect(servers.postgres.url, timeout=10)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    async with redis.asyncio.Redis.from_url(servers.redis.url) as client:
        await client.flushall()
    environ = (
        os.environ
        | servers.environ
        | {
            "KAFKA_PREFIX": f"{name}.",
            "DATABASE_URL": f"{servers.postgres.url.rpartition('/')[0]}/{name}",
        }
    )
    async with cluster.opened(servers, environ, DIRECTORY, users=runs.USERS) as target:
        told = await runs.run(target, plan, print)
    print(runs.table(told))
    return told


if __name__ == "__main__":
    sys.exit(main())
