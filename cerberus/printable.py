r"""Text of outsiders on its way to a terminal or a log: what could command either is escaped.

Names, paths, cells, keys and messages of others may hold terminal codes, line ends and marks that
turn the direction of a line. Such a character, any that `str.isprintable` denies, is written as
JSON writes it: `\u001b`. So a line stays one line, and JSON keeps its meaning.
"""

import json
import sys
from typing import Any, TextIO

import orjson


def escaped(text: str) -> str:
    """Return the text with each character that is not printable escaped, line ends too."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else json.dumps(character)[1:-1]


def lines(text: str) -> str:
    """Return the text with each of its lines escaped; its line ends stay."""
    return "\n".join(map(escaped, text.split("\n")))


def say(*each: str, file: TextIO | None = None) -> None:
    """Print each argument as a line of its own, escaped; commands print by this and the next."""
    print(*map(escaped, each), sep="\n", file=file or sys.stdout)


def say_columns(*cells: object) -> None:
    """Print a line of cells, each escaped, with tabs between them."""
    print(*(escaped(str(each)) for each in cells), sep="\t")


def dumps(told: Any) -> bytes:
    """Write JSON in one line, without characters that are not printable.

    Raises:
        TypeError: It holds what JSON cannot.

    Cost: 0.1 µs more than orjson's for ASCII.
    """
    written = orjson.dumps(told)
    if written.isascii() and 0x7F not in written:  # in ASCII, orjson leaves only this one
        return written
    return escaped(written.decode()).encode()
