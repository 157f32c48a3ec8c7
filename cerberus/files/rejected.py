"""The file that lists the rows of an import that were rejected."""

import os
import pathlib
from collections.abc import Sequence

import orjson

from cerberus import errors, printable

_LINE_BYTES = 100_000


class Rejects:
    """A file that lists rejected rows and why; it is created with the first one.

    Args:
        path: The file of rejects.
        size: How many bytes of an existing file of rejects are valid; the rest is cut off.

    Raises:
        InvalidInput: `path` is a file with other content.
    """

    def __init__(self, path: pathlib.Path, size: int) -> None:
        self._path = path
        self.size = size
        if path.exists():
            if not _tells_of_rejects(path):
                raise errors.InvalidInput(
                    "--rejects", f"{path} has other content: name another file, or remove it"
                )
            os.truncate(path, min(size, path.stat().st_size))

    def write(self, file: str, refused: Sequence[tuple[int, errors.InvalidInput]]) -> None:
        """Append rows of a file; they are on the disk when this returns."""
        if not refused:
            return
        lines = [
            printable.dumps(
                {"file": file, "line": line, "field": error.field, "reason": error.reason}
            )
            + b"\n"
            for line, error in refused
        ]
        with self._path.open("ab") as out:
            out.writelines(lines)
            out.flush()
            os.fsync(out.fileno())
            self.size = out.tell()


def _tells_of_rejects(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(_LINE_BYTES)
    try:
        return not line or set(orjson.loads(line)) == {"file", "line", "field", "reason"}
    except (ValueError, TypeError):
        return False
