"""`cerberus train`: train the fraud model on simulated traffic."""

import argparse
import os
import pathlib
import sys

from cerberus import printable, settings, window


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; CERBERUS_SPANS and CERBERUS_MODEL give the defaults."""
    path = os.environ.get("CERBERUS_MODEL") or settings.MODEL_PATH
    spans = os.environ.get("CERBERUS_SPANS") or ",".join(settings.Windows().spans)
    parser.add_argument("--out", type=pathlib.Path, default=path, help="the model file to write")
    parser.add_argument("--seed", type=int, default=7, help="seed of all random draws")
    parser.add_argument(
        "--spans", type=_spans, default=spans, help="window lengths, such as 10m,1h,24h"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; return 0, or 1 when the files cannot be written."""
    # A second of imports that no other command needs.
    from cerberus.learning import simulation, training

    try:
        training.train(simulation.Plan(spans=arguments.spans, seed=arguments.seed), arguments.out)
    except OSError as error:
        printable.say(f"cannot write the model: {error}; give another --out", file=sys.stderr)
        return 1
    return 0


def _spans(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    try:
        lengths = window.Spans(names).spans_ms
    except (KeyError, ValueError, IndexError):
        lengths = ()
    if not lengths or lengths[0] <= 0 or sorted(set(lengths)) != list(lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not increasing lengths such as 10m,1h,24h")
    return names
