"""`cerberus clean`: remove what `cerberus run` has left behind."""

import argparse

from cerberus.commands import run as service


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there is only one place to clean."""


def run(arguments: argparse.Namespace) -> int:
    """End leftover processes and remove local data; return 0."""
    service.clean()
    return 0
