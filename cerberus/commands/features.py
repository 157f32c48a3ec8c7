"""`cerberus features`: Feast's definitions, rendered, compiled or applied."""

import argparse
import os

from cerberus import settings
from cerberus.jobs import feast as feast_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument("action", choices=("render", "compile", "apply"))


def run(arguments: argparse.Namespace) -> int:
    """Do it and print what was written; return 0."""
    config = settings.load(os.environ)
    if arguments.action == "render":
        print(f"{feast_store.render(config)} written")
    elif arguments.action == "apply":
        print(feast_store.apply(config).strip())
    else:
        config.model.plan_path.write_bytes(feast_store.compile_plan(config).pack())
        print(f"{config.model.plan_path} written")
    return 0
