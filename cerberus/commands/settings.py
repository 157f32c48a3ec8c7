"""`cerberus settings`: show every setting with its default and meaning, in Markdown."""

import argparse
import pathlib

from cerberus import environment, printable, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        "--write", type=pathlib.Path, help="write the tables between the markers of this page"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, or write them between the markers of a page."""
    tables = environment.tables(settings.Settings, environment.ROOT)
    if arguments.write is None:
        printable.say(*tables.splitlines())
    else:
        page = arguments.write.read_text()
        arguments.write.write_text(environment.between_markers(page, tables))
    return 0
