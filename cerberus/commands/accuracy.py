"""`cerberus accuracy`: decisions compared with labels, as a table."""

import argparse
import asyncio
import os
from collections.abc import Mapping
from typing import Any

from cerberus import assembly, printable, settings
from cerberus.api import parameters

_REPORT_S = 600.0
_COLUMNS = (
    ("matured", 8),
    ("fraud", 7),
    ("precision", 10),
    ("recall", 8),
    ("false pos.", 11),
    ("caught", 13),
    ("reviewed", 13),
    ("missed", 13),
    ("wrongly declined", 17),
    ("excluded", 9),
    ("immature", 9),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--since", help="only decisions since this date or RFC 3339 time")
    parser.add_argument("--model", help="only models whose sha256 begins with this")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 0."""
    config = settings.load(os.environ)
    given = {"since": arguments.since, "model": arguments.model}
    asked = parameters.accuracy({name: v for name, v in given.items() if v is not None})

    async def judge() -> dict[str, Any]:
        async with assembly.for_command(config) as service:
            return await service.postgres.judged.report(service.clock(), asked, _REPORT_S)

    printable.say(*describe(asyncio.run(judge())).split("\n"))
    return 0


def describe(told: Mapping[str, Any]) -> str:
    """Lay out a report for a person to read."""
    lines = [
        f"as of {told['as_of']}; a decision is judged {_length(told['label_maturity_days'])} after "
        "it was made"
    ]
    for model in told["models"]:
        heads = "".join(f"{name:>{width}}" for name, width in _COLUMNS)
        lines += ["", f"model {model['model_version']}", f"{'day':<10}{heads}"]
        lines += [_line(each["day"], each) for each in model["days"]]
        lines.append(_line("all", model["total"]))
    if not told["models"]:
        lines.append("no decision on a transaction is stored")
    elif not any(model["total"]["matured"] for model in told["models"]):
        lines += ["", "nothing can be judged yet"]
    return "\n".join(lines)


def _length(days: float) -> str:
    return f"{days:g} days" if days >= 1 or days == 0 else f"{days * 1440:.3g} minutes"


def _line(day: str, shown: Mapping[str, Any]) -> str:
    shares = (shown[name] for name in ("precision", "recall", "false_positive_rate"))
    cells = (
        str(shown["matured"]),
        str(shown["positives"]),
        *("-" if share is None else f"{share:.2%}" for share in shares),
        *(f"{amount:,.2f}" for amount in shown["money"].values()),
        str(shown["excluded"]),
        str(shown["immature"]),
    )
    return f"{day:<10}" + "".join(
        f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)
    )
