"""The command line: `python -m cerberus COMMAND`, or `cerberus COMMAND`."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from cerberus import errors, printable
from cerberus.commands import (
    accuracy,
    clean,
    dlq,
    features,
    forget,
    inspect,
    load,
    materialize,
    migrate,
    replay,
    resume,
    run,
    send,
    settings,
    train,
)
from cerberus.telemetry import logs

_DESCRIPTION = "Real-time card-fraud decisions. `cerberus COMMAND --help` explains a command."
FAILED_STATUS, USAGE_STATUS = 1, 2
AWAY_STATUS, CONFIG_STATUS = 75, 78
_AWAY = (errors.StoreUnavailable, errors.FeaturesUnavailable, errors.DecisionsUnavailable)


class Command(Protocol):
    """The interface of a command's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments to its parser."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run it and return the exit status."""


_COMMANDS: Mapping[str, tuple[str, Command]] = {
    "run": ("start what is missing and serve, on this machine", run),
    "clean": ("remove what `run` has left behind", clean),
    "settings": ("show all settings in Markdown", settings),
    "migrate": ("bring tables and topics up to date", migrate),
    "features": ("render, compile or apply the feature definitions", features),
    "materialize": ("load batch features from Postgres into Redis", materialize),
    "inspect": ("show a user's window now, and the last decisions", inspect),
    "replay": ("make stored decisions again and compare them bit by bit", replay),
    "accuracy": ("compare decisions with labels", accuracy),
    "train": ("train the model on simulated traffic", train),
    "import": ("load past transactions, labels and credit scores from files", load),
    "send": ("publish a file of transactions", send),
    "dlq": ("list, show and send again refused records", dlq),
    "resume": ("let consumers continue after a schema break", resume),
    "forget": ("remove one person from every store", forget),
}
_READ_FILES = ("train", "import", "send", "forget")
"""These commands read files: a wrong value may come from a file, so it is not wrong usage."""


class _Parser(argparse.ArgumentParser):
    """A parser that escapes the wrong argument that it quotes, such as a file's name."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit."""
        super().error(printable.escaped(message))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error is one sentence on stderr, and the status says who must act."""
    if logging.lastResort is not None:  # what libraries log while a command runs
        logging.lastResort.setFormatter(logs.Lines())
    parser = _Parser(prog="cerberus", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (meaning, command) in _COMMANDS.items():
        sentence = f"{meaning[0].upper()}{meaning[1:]}."
        command.add_arguments(commands.add_parser(name, help=meaning, description=sentence))
    chosen = parser.parse_args(arguments)
    try:
        return _COMMANDS[chosen.command][1].run(chosen)
    except (errors.CerberusError, OSError) as error:
        told = f"cerberus {chosen.command}: {error}"
        # Only errors that quote the log of a local server have several lines.
        several = isinstance(error, errors.ServerUnavailable)
        printable.say(*(told.split("\n") if several else [told]), file=sys.stderr)
        return _status(chosen.command, error)
    except KeyboardInterrupt:
        return 130


def _status(command: str, error: Exception) -> int:
    if isinstance(error, errors.ConfigError | errors.ModelMismatch):
        return CONFIG_STATUS
    if isinstance(error, _AWAY):
        return AWAY_STATUS
    if isinstance(error, errors.InvalidInput) and command not in _READ_FILES:
        return USAGE_STATUS
    return FAILED_STATUS


if __name__ == "__main__":
    sys.exit(main())
