"""`cerberus resume`: let all consumers continue after a schema break."""

import argparse
import asyncio
import os

from cerberus import assembly, kafka, printable, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command; it has no options."""
    parser.epilog = """Refused records that topic `transactions` holds when this runs go to
`transactions.dlq` and stop no consumer. For later records the test starts from zero. It is safe to
repeat the command."""


def run(arguments: argparse.Namespace) -> int:
    """Store the resume, print what it means; return 0."""
    config = settings.load(os.environ)
    number, records = asyncio.run(_resume(config))
    topic, letters = (config.kafka.topic(n) for n in (kafka.TRANSACTIONS, kafka.DEAD_LETTERS))
    printable.say(
        f"resume {number}: every consumer of {topic} continues within seconds. Refused "
        f"records among the {records} received so far stop none of them and go to {letters}."
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
