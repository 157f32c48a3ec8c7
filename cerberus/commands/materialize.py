"""`cerberus materialize`: load batch features from Postgres into Redis."""

import argparse
import os

from cerberus import clock, printable, settings
from cerberus.jobs import feast as feast_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: it needs only the settings."""


def run(arguments: argparse.Namespace) -> int:
    """Load new rows and print how many; return 0. Idempotent: yes."""
    loaded = feast_store.materialize(settings.load(os.environ), clock.now_ms())
    again = ", all loaded again" if loaded.full else ""
    printable.say(f"credit scores: {loaded.new_rows} new{again}")
    return 0
