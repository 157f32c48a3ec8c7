"""`cerberus settings`: every setting with its default and meaning, in Markdown."""

import argparse
import pathlib

from cerberus import environment, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("--write", type=pathlib.Path, help="a page with markers to write between")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables, or write them between the markers of a page."""
    tables = environment.tables(settings.Settings, settings.ROOT)
    if arguments.write is None:
        print(tables, end="")
    else:
        page = arguments.write.read_text()
        arguments.write.write_text(environment.between_markers(page, tables))
    return 0
