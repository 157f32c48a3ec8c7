"""`cerberus features`: render, compile or apply Feast's definitions."""

import argparse
import os
import pathlib

from cerberus import printable, settings
from cerberus.jobs import feast as feast_store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument(
        "action",
        choices=("render", "compile", "apply"),
        help="render: write feature_store.yaml; compile: write the feature plan of this version; "
        "apply: register the definitions with Feast",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the action and print its result; return 0."""
    config = settings.load(os.environ)
    if arguments.action == "render":
        directory = feast_store.place() or pathlib.Path.cwd()
        printable.say(f"{feast_store.render(config, directory)} written")
    elif arguments.action == "apply":
        printable.say(*feast_store.apply(config).strip().split("\n"))
    else:
        config.model.plan_path.write_bytes(feast_store.compile_plan(config).pack())
        printable.say(f"{config.model.plan_path} written")
    return 0
