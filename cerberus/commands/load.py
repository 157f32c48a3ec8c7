"""`cerberus import`: load past transactions, labels and credit scores from files."""

import argparse
import asyncio
import contextlib
import os
import pathlib
from typing import Any

from cerberus import assembly, errors, printable, settings
from cerberus.files import importing, layouts
from cerberus.online import pool as redis_pool
from cerberus.postgres import imports


class _OfFile(argparse.Action):
    """Assigns an option to the file before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Assign the option, or begin a file."""
        if self.dest in importing.FIELDS:
            if self.dest in namespace.files:
                parser.error(f"{option_string} is given twice")
            namespace.files = namespace.files | {self.dest: {"path": values}}
            return
        if not namespace.files:
            parser.error(f"{option_string} must follow the file that it belongs to")
        kind = list(namespace.files)[-1]
        if self.dest in namespace.files[kind]:
            parser.error(f"{option_string} is given twice for one file")
        told = namespace.files[kind] | {self.dest: values}
        namespace.files = namespace.files | {kind: told}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    parser.description = (
        "Load past transactions, labels and credit scores, each from a file, a folder or a glob. "
        "The suffix says whether a file is CSV, JSON or Parquet."
    )
    parser.set_defaults(files={})
    for kind in importing.FIELDS:
        parser.add_argument(
            _flag(kind),
            action=_OfFile,
            dest=kind,
            type=pathlib.Path,
            metavar="FILE",
            help=f"a file of {kind.replace('_', ' ')}",
        )
    about = "; it belongs to the file before it"
    for option, metavar, said in (
        ("--select", "SQL", layouts.SELECT_HELP),
        ("--encoding", "NAME", layouts.ENCODING_HELP),
    ):
        parser.add_argument(option, action=_OfFile, metavar=metavar, help=said + about)
    parser.add_argument(
        "--rejects", type=pathlib.Path, metavar="FILE", help="write refused rows here"
    )
    parser.add_argument("--again", action="store_true", help="read finished files again")


def run(arguments: argparse.Namespace) -> int:
    """Import and print the result; return 0, or 1 if every row of a file was refused."""
    plan = _plan(arguments)
    done = asyncio.run(load(settings.load(os.environ), plan))
    if "transactions" in done and done["transactions"].added:
        printable.say("windows count imported transactions after the next start of the consumers")
    return int(any(p.rejected and p.rejected == p.position[0] for p in done.values()))


async def load(config: settings.Settings, plan: importing.Plan) -> dict[str, imports.Progress]:
    """Open the parts and import the files; see `importing.load`."""
    with contextlib.suppress(errors.FeaturesUnavailable):
        await redis_pool.check(config)
    async with assembly.for_command(config) as service:
        return await importing.load(config, plan, service.postgres, service.redis, printable.say)


def _flag(kind: str) -> str:
    return f"--{kind.replace('_', '-')}"


def _plan(chosen: argparse.Namespace) -> importing.Plan:
    if not chosen.files:
        names = ", ".join(map(_flag, importing.FIELDS))
        raise errors.InvalidInput("FILE", f"give at least one of {names}")
    return importing.Plan(
        files={kind: told["path"] for kind, told in chosen.files.items()},
        layouts={
            kind: layouts.Layout(told.get("select", ""), told.get("encoding", ""))
            for kind, told in chosen.files.items()
        },
        rejects=chosen.rejects,
        again=chosen.again,
    )
