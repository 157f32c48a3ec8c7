"""The command line: `python -m cerberus COMMAND`, or `cerberus COMMAND`."""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import tqdm

from cerberus import (
    accuracy,
    errors,
    feast_layout,
    feature_store,
    forgetting,
    importing,
    kafka,
    lookups,
    offline,
    online,
    pools,
    run,
    sending,
    serving,
    settings,
    verification,
    window,
)

FAILED_STATUS, USAGE_STATUS, UNVERIFIED_STATUS = 1, 2, 3
AWAY_STATUS, CONFIG_STATUS = 75, 78
_REPORT_S = 600.0
_AWAY = (errors.StoreUnavailable, errors.FeaturesUnavailable, errors.DecisionsUnavailable)
_STATUSES = f"""Status: 0 all come out the same, {FAILED_STATUS} some differ, {USAGE_STATUS} wrong
arguments, {UNVERIFIED_STATUS} none differ but some cannot be taken again, for their model or policy
is not kept, {AWAY_STATUS} Postgres does not answer, {CONFIG_STATUS} a setting is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake is one sentence on stderr, and the status says whose it is."""
    parser = argparse.ArgumentParser(prog="cerberus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (meaning, _) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=meaning, description=meaning, add_help=name not in _OWN_ARGUMENTS
        )
        if name in _OWN_ARGUMENTS:
            continue
        if name == "inspect":
            command.add_argument("user", help="a user id")
        if name == "replay":
            command.epilog = _STATUSES
            command.add_argument("--verify", action="store_true", required=True, help="compare")
            command.add_argument("--since", default="1970-01-01", help="a date, or RFC 3339")
        if name == "accuracy":
            command.add_argument("--since", help="of decisions: a date, or RFC 3339")
            command.add_argument("--model", help="the beginning of a model's sha256")
        if name == "features":
            command.add_argument("action", choices=("render", "compile", "apply"))
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in _OWN_ARGUMENTS:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[known.command][1](known, rest)
    except (errors.CerberusError, OSError) as error:
        print(f"cerberus {known.command}: {error}", file=sys.stderr)
        return _status(known.command, error)
    except KeyboardInterrupt:
        return 130


def _status(command: str, error: Exception) -> int:
    if isinstance(error, errors.ConfigError):
        return CONFIG_STATUS
    if isinstance(error, _AWAY):
        return AWAY_STATUS
    # Those with arguments of their own find it in their files, too.
    if isinstance(error, errors.InvalidTransaction) and command not in _OWN_ARGUMENTS:
        return USAGE_STATUS
    return FAILED_STATUS


def _run(known: argparse.Namespace, rest: list[str]) -> int:
    return run.main(rest)


def _clean(known: argparse.Namespace, rest: list[str]) -> int:
    run.clean()
    return 0


def _train(known: argparse.Namespace, rest: list[str]) -> int:
    from cerberus import training  # a second of imports that no other command needs

    return training.main(rest)


def _migrate(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)

    async def migrate() -> None:
        async with _offline(config) as store:
            applied = await store.migrate()
        topics = await kafka.create_topics(config)
        print(f"tables: {', '.join(applied) or 'up to date'}")
        print(f"topics: {', '.join(topics) or 'all there'}")

    asyncio.run(migrate())
    return 0


def _import(known: argparse.Namespace, rest: list[str]) -> int:
    return importing.main(rest)


def _send(known: argparse.Namespace, rest: list[str]) -> int:
    return sending.main(rest)


def _forget(known: argparse.Namespace, rest: list[str]) -> int:
    return forgetting.main(rest)


def _inspect(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    spans = window.Spans(config.spans, config.allowed_lateness_ms, config.max_future_skew_ms)
    plan = feast_layout.Plan.load(config.plan_path)

    async def look_up() -> dict[str, Any]:
        topic = config.kafka.topic(kafka.TRANSACTIONS)
        redis = pools.connect_redis(config)
        async with redis, _offline(config) as history:
            store = online.OnlineStore(redis, plan, spans, topic)
            asked = lookups.Lookups(config, spans, store, history.ledger, serving.now_ms)
            return await asked.user(known.user)

    print(lookups.describe(asyncio.run(look_up())))
    return 0


def _replay(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    since_ms = accuracy.parse_since(known.since)

    async def verify() -> verification.Verified:
        async with _offline(config) as history:
            total = await history.ledger.count(since_ms)
            with tqdm.tqdm(total=total, unit=" decisions", disable=None) as bar:
                return await verification.verify(history.ledger, since_ms, bar.update)

    found = asyncio.run(verify())
    for line in found.examples:
        print(line)
    print(f"{found.repeated} decisions taken again, {found.differing} differ")
    if found.unknown:
        print(
            f"{found.unknown} decisions cannot be taken again: their model or policy is not kept "
            "in table artifacts, or this version cannot read it",
            file=sys.stderr,
        )
    return FAILED_STATUS if found.differing else UNVERIFIED_STATUS if found.unknown else 0


def _accuracy(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    query = {name: v for name in ("since", "model") if (v := getattr(known, name)) is not None}

    async def judge() -> dict[str, Any]:
        async with _offline(config) as history:
            return await history.accuracy.report(serving.now_ms(), query, _REPORT_S)

    print(accuracy.describe(asyncio.run(judge())))
    return 0


def _features(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    if known.action == "render":
        print(f"{feature_store.render(config)} written")
    elif known.action == "apply":
        print(feature_store.apply(config).strip())
    else:
        config.plan_path.write_bytes(feature_store.compile_plan(config).pack())
        print(f"{config.plan_path} written")
    return 0


def _materialize(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    loaded = feature_store.materialize(config, time.time_ns() // 1_000_000)
    print(f"credit scores: {loaded.new_rows} new" + (", all loaded again" if loaded.full else ""))
    return 0


@contextlib.asynccontextmanager
async def _offline(config: settings.Settings) -> AsyncIterator[offline.OfflineStore]:
    async with pools.connect_postgres(config) as pool:
        yield offline.OfflineStore(pool, config.spans)


_OWN_ARGUMENTS = ("run", "train", "import", "send", "forget")
_COMMANDS = {
    "run": ("start what is missing and serve, on this machine", _run),
    "clean": ("remove what `run` has left behind", _clean),
    "migrate": ("bring tables and topics up to date", _migrate),
    "features": ("render, compile or apply the feature definitions", _features),
    "materialize": ("load the batch views from Postgres to Redis", _materialize),
    "inspect": ("show a user's window now, and the last decisions", _inspect),
    "replay": ("take stored decisions again and compare them, bit by bit", _replay),
    "accuracy": ("compare decisions with the truth, once that is known", _accuracy),
    "train": ("train the model on simulated traffic", _train),
    "import": ("load a bank's past from files", _import),
    "send": ("publish a file of transactions", _send),
    "forget": ("remove one person from every store", _forget),
}

if __name__ == "__main__":
    sys.exit(main())
