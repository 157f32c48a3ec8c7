"""`cerberus features`: Feast's definitions, rendered, compiled or applied."""

import argparse
import os

from cerberus import feature_store, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument."""
    parser.add_argument("action", choices=("render", "compile", "apply"))


def run(arguments: argparse.Namespace) -> int:
    """Do it and print what was written; return 0."""
    config = settings.load(os.environ)
    if arguments.action == "render":
        print(f"{feature_store.render(config)} written")
    elif arguments.action == "apply":
        print(feature_store.apply(config).strip())
    else:
        config.model.plan_path.write_bytes(feature_store.compile_plan(config).pack())
        print(f"{config.model.plan_path} written")
    return 0
