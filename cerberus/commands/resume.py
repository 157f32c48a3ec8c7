"""`cerberus resume`: let all consumers go on that a schema break has stopped."""

import argparse
import asyncio
import os

from cerberus import assembly, kafka, printable, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command; it has no options."""
    parser.epilog = """What topic `transactions` holds when this runs is no longer a reason to stop:
what is refused of it goes to `transactions.dlq`. Later records are judged anew, from zero.
Repeating the command is harmless."""


def run(arguments: argparse.Namespace) -> int:
    """Tell the consumers, print what that means; return 0."""
    config = settings.load(os.environ)
    number, records = asyncio.run(_resume(config))
    topic, letters = (config.kafka.topic(n) for n in (kafka.TRANSACTIONS, kafka.DEAD_LETTERS))
    printable.say(
        f"resume {number}: every consumer of {topic} goes on within seconds. What is refused of "
        f"the {records} records that it has received so far stops nobody and goes to {letters}."
    )
    return 0


async def _resume(config: settings.Settings) -> tuple[int, int]:
    """Store where the log ends; return the resume's number and the sum of the ends."""
    topic = config.kafka.topic(kafka.TRANSACTIONS)
    async with kafka.reader(config, topic) as (client, tps), asyncio.timeout(kafka.CALL_S):
        found = await client.end_offsets(tps)
    ends = [found[tp] for tp in sorted(tps)]
    async with assembly.for_command(config) as service:
        await service.postgres.schema.migrate()
        return await service.postgres.lives.resume(topic, ends), sum(ends)
