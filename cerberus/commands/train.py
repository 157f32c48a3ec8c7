"""`cerberus train`: train the fraud model on simulated traffic."""

import argparse
import os
import pathlib
import sys

from cerberus import environment, errors, printable, settings, window

_MOST_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; CERBERUS_SPANS and CERBERUS_MODEL give the defaults."""
    parser.add_argument("--out", type=pathlib.Path, help="the model file to write")
    parser.add_argument("--seed", type=_seed, default=7, help="seed of all random draws")
    parser.add_argument("--spans", type=_spans, help="window lengths, such as 10m,1h,24h")


def run(arguments: argparse.Namespace) -> int:
    """Train; return 0, or 1 when the files cannot be written.

    Raises:
        ConfigError: A setting is wrong.
    """
    environment.check_names(os.environ, settings.names())
    spans = arguments.spans or environment.read(settings.Windows, os.environ).spans
    out = arguments.out or environment.read(settings.Model, os.environ).path
    if out.is_dir() or (out.parent.is_dir() and not os.access(out.parent, os.W_OK)):
        # Before the training, which takes minutes.
        if arguments.out is None:
            raise errors.ConfigError(
                f"CERBERUS_MODEL: cannot write {out}; name a file in a writable directory"
            )
        printable.say(f"cannot write the model to {out}; give another --out", file=sys.stderr)
        return 1
    # A second of imports that no other command needs.
    from cerberus.learning import simulation, training

    try:
        training.train(simulation.Plan(spans=spans, seed=arguments.seed), out)
    except OSError as error:
        printable.say(f"cannot write the model: {error}; give another --out", file=sys.stderr)
        return 1
    return 0


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > _MOST_SEED:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {_MOST_SEED}")
    return int(text)


def _spans(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    try:
        lengths = window.Spans(names).spans_ms
    except (KeyError, ValueError, IndexError):
        lengths = ()
    if not lengths or lengths[0] <= 0 or sorted(set(lengths)) != list(lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not increasing lengths such as 10m,1h,24h")
    return names
