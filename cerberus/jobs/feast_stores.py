"""Why the stores refuse Feast, whose own errors hide it. Calls block, as those of `jobs.feast`."""

import asyncio
import contextlib
import re

from cerberus import errors, settings
from cerberus.online import pool as redis_pool
from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import refusals
from cerberus.postgres import schema as postgres_schema


def raise_refusal(config: settings.Settings, reason: str, *, applies: bool = False) -> None:
    """Raise an error if a store refuses this process: Feast's errors hide the cause.

    Raises:
        ConfigError: It refuses an address, a user or a permission.
    """
    if denied := re.search(r"InsufficientPrivilege\) (.+)", reason):
        raise refusals.denied(denied[1])
    check_postgres(config, applies=applies)
    with contextlib.suppress(errors.FeaturesUnavailable):
        asyncio.run(redis_pool.check(config))


def check_postgres(config: settings.Settings, *, applies: bool = False) -> None:
    """Ask Postgres whether it takes this process: Feast would use a database of any encoding.

    Raises:
        ConfigError: It refuses the address, the user or a permission, or is not UTF-8.
    """

    async def ask() -> None:
        async with postgres_pool.connect(config) as pool:
            schema = postgres_schema.Schema(pool, config.windows.spans)
            await schema.check(makes_tables=applies)

    with contextlib.suppress(errors.StoreUnavailable):
        asyncio.run(ask())
