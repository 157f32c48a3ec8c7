"""`cerberus migrate`: bring tables and topics up to date."""

import argparse
import asyncio
import os

from cerberus import assembly, kafka, printable, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: it needs only the settings."""


def run(arguments: argparse.Namespace) -> int:
    """Create what is missing and print it; return 0. Idempotent: yes."""
    asyncio.run(_migrate(settings.load(os.environ)))
    return 0


async def _migrate(config: settings.Settings) -> None:
    async with assembly.for_command(config) as service:
        applied = await service.postgres.schema.migrate()
    topics = await kafka.create_topics(config)
    printable.say(f"tables: {', '.join(applied) or 'up to date'}")
    printable.say(f"topics: {', '.join(topics) or 'all there'}")
