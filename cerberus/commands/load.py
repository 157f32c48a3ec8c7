"""`cerberus import`: load past transactions, labels and credit scores from files."""

import argparse
import asyncio
import contextlib
import os
import pathlib

from cerberus import assembly, errors, printable, settings
from cerberus.files import importing, layouts
from cerberus.online import pool as redis_pool
from cerberus.postgres import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    parser.description = (
        "Load past transactions, labels and credit scores. Each file is CSV, JSON lines or "
        "Parquet, as its suffix says."
    )
    for kind in importing.FIELDS:
        parser.add_argument(
            _flag(kind),
            type=pathlib.Path,
            metavar="FILE",
            help=f"a file of {kind.replace('_', ' ')}",
        )
    parser.add_argument(
        "--rejects", type=pathlib.Path, metavar="FILE", help="write refused rows here"
    )
    parser.add_argument("--again", action="store_true", help="read finished files again")
    parser.add_argument(
        "--label-value",
        action="append",
        default=[],
        type=layouts.pair,
        metavar="VALUE=LABEL",
        help="what a value of the label column means, such as 1=fraud; repeatable",
    )
    layouts.add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Import and print the result; return 0, or 1 if every row of a file was refused."""
    plan = _plan(arguments)
    done = asyncio.run(load(settings.load(os.environ), plan))
    for kind, progress in done.items():
        there = progress.position[0] - progress.added - progress.rejected
        said = f"{kind}: {progress.added} added, {there} were there, {progress.rejected} refused"
        printable.say(said + (f": {plan.rejects_of(kind)}" if progress.rejected else ""))
    if "transactions" in done and done["transactions"].added:
        printable.say("windows count them after the next start of the consumers")
    return int(any(p.rejected and p.rejected == p.position[0] for p in done.values()))


async def load(config: settings.Settings, plan: importing.Plan) -> dict[str, imports.Progress]:
    """Open the parts and import the files; see `importing.load`."""
    with contextlib.suppress(errors.FeaturesUnavailable):
        await redis_pool.check(config)
    async with assembly.for_command(config) as service:
        return await importing.load(config, plan, service.postgres, service.redis)


def _flag(kind: str) -> str:
    return f"--{kind.replace('_', '-')}"


def _plan(chosen: argparse.Namespace) -> importing.Plan:
    fields = importing.FIELDS
    files = {kind: path for kind in fields if (path := getattr(chosen, kind)) is not None}
    if not files:
        names = ", ".join(map(_flag, fields))
        raise errors.InvalidInput("FILE", f"give at least one of {names}")
    return importing.Plan(
        files=files,
        layouts=layouts.read_options(chosen, {k: (*fields[k][0], *fields[k][1]) for k in files}),
        label_values=dict(chosen.label_value),
        rejects=chosen.rejects,
        again=chosen.again,
    )
