"""`cerberus replay`: make stored decisions again and compare them bit by bit."""

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import tqdm

from cerberus import assembly, printable, settings
from cerberus.api import parameters
from cerberus.decisions import models as scoring_models
from cerberus.decisions import records as decision_records
from cerberus.postgres import ledger

_SHOWN = 20
_DIFFER, _UNKNOWN = 1, 3


@dataclass(slots=True)
class Verified:
    """The result of a verification.

    Attributes:
        repeated: Decisions that were made again.
        differing: Decisions that came out differently.
        unknown: Decisions whose model or policy is not stored or cannot be read.
        examples: The first that differ, a sentence each.
    """

    repeated: int = 0
    differing: int = 0
    unknown: int = 0
    examples: list[str] = field(default_factory=list)


async def verify(stored: ledger.Ledger, since_ms: int, seen: Callable[[int], None]) -> Verified:
    """Make every decision as of `since_ms` or later again. Cost: 50 s per million.

    Args:
        stored: Holds the decisions, with their models and policies.
        since_ms: Event time, ms since the Unix epoch.
        seen: Called with the number of decisions of each page.

    Raises:
        StoreUnavailable: Postgres did not answer.
    """
    found = Verified()
    models: dict[tuple[str, str], scoring_models.Model | None] = {}
    async for page in stored.since(since_ms):
        groups: dict[tuple[str, str], list[decision_records.Record]] = {}
        for record in page:
            decided = record.decision
            groups.setdefault((decided.model_sha256, decided.policy_sha256), []).append(record)
        for versions, records in groups.items():
            if versions not in models:
                models[versions] = await stored.model(*versions)
            if (model := models[versions]) is None:
                found.unknown += len(records)
            else:
                _repeat(model, records, found)
        seen(len(page))
    return found


def _repeat(
    model: scoring_models.Model, records: list[decision_records.Record], found: Verified
) -> None:
    fitting = [record for record in records if record.spans == model.manifest.spans]
    again = dict(
        zip(
            (record.decision_id for record in fitting),
            model.decide([record.decision.row for record in fitting]),
            strict=True,
        )
    )
    for record in records:
        found.repeated += 1
        before, now = record.decision, again.get(record.decision_id)
        if before != now:
            found.differing += 1
            if len(found.examples) < _SHOWN:
                got = now and (now.score, now.probability, now.prediction, now.action)
                was = (before.score, before.probability, before.prediction, before.action)
                found.examples.append(f"{record.decision_id}: stored {was}, repeated {got}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.epilog = f"""Exit status: 0 if all come out the same, {_DIFFER} if some differ, 2 if an
argument is wrong, {_UNKNOWN} if none differ but some cannot be made again because their model or
policy is not stored, 75 if Postgres does not answer, 78 if a setting is wrong."""
    parser.add_argument("--verify", action="store_true", required=True, help="compare the results")
    parser.add_argument(
        "--since", default="1970-01-01", help="only decisions since this date or RFC 3339 time"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the result; return 0, 1 if some differ, 3 if some cannot be made again."""
    config = settings.load(os.environ)
    found = asyncio.run(_verify(config, parameters.since_ms(arguments.since)))
    printable.say(
        *found.examples, f"{found.repeated} decisions made again, {found.differing} differ"
    )
    if found.unknown:
        printable.say(
            f"{found.unknown} decisions cannot be made again: their model or policy is not stored "
            "in table artifacts, or this version cannot read it",
            file=sys.stderr,
        )
    return _DIFFER if found.differing else _UNKNOWN if found.unknown else 0


async def _verify(config: settings.Settings, since_ms: int) -> Verified:
    async with assembly.for_command(config) as service:
        ledger = service.postgres.ledger
        total = await ledger.count(since_ms)
        with tqdm.tqdm(total=total, unit=" decisions", disable=None) as bar:
            return await verify(ledger, since_ms, bar.update)
