"""The command line: `python -m cerberus COMMAND`, or `cerberus COMMAND`."""

import argparse
import asyncio
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import AsyncIterator, Sequence

from cerberus import errors, feature_store, kafka, offline, producer, run, settings

CONFIG_STATUS, FAILED_STATUS = 78, 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a mistake is one sentence on stderr, and the status says whose it is."""
    parser = argparse.ArgumentParser(prog="cerberus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (meaning, _) in _COMMANDS.items():
        command = commands.add_parser(name, help=meaning, add_help=name not in _OWN_ARGUMENTS)
        if name in _OWN_ARGUMENTS:
            continue
        if name == "send":
            command.add_argument("file", type=pathlib.Path, help="one JSON object a line")
        if name == "features":
            command.add_argument("action", choices=("render", "compile", "apply"))
    known, rest = parser.parse_known_args(arguments)
    if rest and known.command not in _OWN_ARGUMENTS:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[known.command][1](known, rest)
    except errors.ConfigError as error:
        print(f"cerberus {known.command}: {error}", file=sys.stderr)
        return CONFIG_STATUS
    except (errors.CerberusError, OSError) as error:
        print(f"cerberus {known.command}: {error}", file=sys.stderr)
        return FAILED_STATUS
    except KeyboardInterrupt:
        return 130


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


def _send(known: argparse.Namespace, rest: list[str]) -> int:
    config = settings.load(os.environ)
    with known.file.open("rb") as lines:
        count = asyncio.run(producer.send(config, lines))
    print(f"{count} transactions sent to {config.kafka.topic(kafka.TRANSACTIONS)}")
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
    async with offline.connect(config) as pool:
        yield offline.OfflineStore(pool, config.spans)


_OWN_ARGUMENTS = ("run", "train")
_COMMANDS = {
    "run": ("start what is missing and serve, on this machine", _run),
    "clean": ("remove what `run` has left behind", _clean),
    "migrate": ("bring tables and topics up to date", _migrate),
    "features": ("render, compile or apply the feature definitions", _features),
    "materialize": ("load the batch views from Postgres to Redis", _materialize),
    "train": ("train the model on simulated traffic", _train),
    "send": ("publish transactions of one's own", _send),
}

if __name__ == "__main__":
    sys.exit(main())
