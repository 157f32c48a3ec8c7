"""`cerberus inspect`: show a user's window now, and the last decisions."""

import argparse
import asyncio
import os
from collections.abc import Mapping
from typing import Any

from cerberus import assembly, printable, settings
from cerberus.api import parameters
from cerberus.online import pool as redis_pool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument("user", help="a user id")


def run(arguments: argparse.Namespace) -> int:
    """Print the window and the decisions; return 0."""
    config = settings.load(os.environ)
    told = asyncio.run(_look_up(config, parameters.user_id(arguments.user)))
    printable.say(*describe(told).split("\n"))
    return 0


async def _look_up(config: settings.Settings, user_id: int) -> dict[str, Any]:
    await redis_pool.check(config)
    async with assembly.for_command(config) as service:
        return await service.lookups.user(user_id)


def describe(told: Mapping[str, Any]) -> str:
    """Lay out the result of `Lookups.user` for a person to read."""
    fence, doubts = told["fence"], ", ".join(told["degraded"])
    prefix = f"epoch {fence['epoch']}, offset {fence['offset']}" if fence else "no row"
    lines = [
        f"user {told['user_id']} as of {told['as_of']}",
        f"partition {told['partition']}, {prefix}",
        "values    " + (f"in doubt: {doubts}" if doubts else "exact"),
    ]
    lines += [f"  {name:<24}{value}" for name, value in told["features"].items()]
    lines.append(f"events in the window, newest first ({len(told['events'])} shown)")
    lines += [f"  {event['at']}{event['amount']:>14,.2f}" for event in told["events"]]
    lines.append(f"last decisions ({len(told['decisions'])} shown)")
    lines += [
        f"  {each['as_of']}  {each['decision']:<8}{each['probability']:>8.4f}  "
        f"{each['door']:<7}{each['decision_id']}  "
        # The client chose it, and it may contain a line end.
        f"{printable.escaped(each['transaction_id'] or '')}"
        for each in told["decisions"]
    ]
    return "\n".join(lines)
