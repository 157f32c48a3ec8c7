"""Two releases side by side, and what their logs say about them."""

import contextlib
import datetime
import json
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cerberus import errors
from cerberus.stack import process
from chaos import compare, service

HERE = pathlib.Path(__file__).resolve().parent.parent
# An instance logs whose code it runs: comparing a release with itself would prove nothing.
_APP = """
{changes}
import json, pathlib, sys
import cerberus
from cerberus.app import app
tree = pathlib.Path(cerberus.__file__).resolve().parent
modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "cerberus"]
files = [pathlib.Path(m.__file__).resolve() for m in modules if getattr(m, "__file__", None)]
strays = [str(file) for file in files if not file.is_relative_to(tree)]
print(json.dumps({{"action": "imported", "tree": str(tree.parent), "strays": strays}}), flush=True)
"""
_LOOK_BACK = 10  # records that a replay reads before the first one that matters
_START = re.compile(r"partition (\d+): epoch (\d+), reads from (\d+), silent below (\d+)")


@dataclass(frozen=True, slots=True)
class Release:
    """One version of the service.

    Attributes:
        name: "old" or "new"; the names of its instances begin with it.
        tree: Path of its checkout.
        changes: Python code that its instances run before they serve.
    """

    name: str
    tree: pathlib.Path
    changes: str = ""

    def instance(
        self, number: int, directory: pathlib.Path, environ: Mapping[str, str]
    ) -> service.Instance:
        """Make an instance with its files in a directory of the release."""
        own = directory / self.name
        own.mkdir(exist_ok=True)
        (own / "release.py").write_text(_APP.format(changes=self.changes))
        # Older versions are open to loopback by default, and refuse an unknown setting.
        knows = "CERBERUS_OPEN" in (self.tree / "cerberus" / "settings.py").read_text()
        environ = {k: v for k, v in environ.items() if knows or k != "CERBERUS_OPEN"}
        site = process.Site(own, environ, lambda line: None)
        return service.Instance(f"{self.name}-{number}", site, environ, "release:app", self.tree)


def known(commit: str) -> bool:
    """Say whether the history contains a commit."""
    found = _git("cat-file", "-e", f"{commit}^{{commit}}")
    return found is not None and found.returncode == 0


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[pathlib.Path]:
    """Check out a commit in a temporary directory, which is removed at the end.

    Raises:
        CerberusError: The history does not have it.
    """
    if not known(commit):
        raise errors.CerberusError(
            f"the history here has no commit {commit}: run `git fetch --unshallow`, or choose "
            "another commit, --old COMMIT"
        )
    with tempfile.TemporaryDirectory(prefix="cerberus-") as directory:
        tree = pathlib.Path(directory).resolve() / "tree"
        added = _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            if added is None or added.returncode:
                raise errors.CerberusError(
                    f"git cannot check out {commit}: {added.stderr.strip() if added else ''}"
                )
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False, timeout=60
        )
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Start:
    """An assignment of a partition, read from its new owner's log.

    Attributes:
        at_s: When it happened, wall clock.
        owner: Name of the instance.
        partition: Number of the partition.
        epoch: Epoch of the topic.
        reads_from: The first offset that it reads.
        silent_below: The group's commit, where its effects begin.
    """

    at_s: float
    owner: str
    partition: int
    epoch: int
    reads_from: int
    silent_below: int

    @property
    def release(self) -> str:
        """Name of the owner's release."""
        return self.owner.partition("-")[0]


def told(instance: service.Instance) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield all lines that an instance has logged, each with its time (wall clock, s)."""
    if not instance.log.exists():
        return
    for text in instance.log.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            moment = datetime.datetime.fromisoformat(line["time"].replace("Z", "+00:00"))
        except (ValueError, KeyError, TypeError):
            continue
        yield moment.timestamp(), line


def impostor(instance: service.Instance) -> str | None:
    """Say what is wrong with the code that an instance imported in its last run, if anything."""
    lines = [line for line in instance.log.read_text().splitlines() if '"imported"' in line]
    if not lines:
        return f"{instance.name} does not say which code it runs"
    found = json.loads(lines[-1])
    if found["strays"] or pathlib.Path(found["tree"]) != instance.tree.resolve():
        return f"{instance.name} runs {found['tree']} and {found['strays']}, not {instance.tree}"
    return None


def starts(instances: Sequence[service.Instance]) -> list[Start]:
    """Return all assignments of partitions, ordered by time."""
    found = []
    for instance in instances:
        for at_s, line in told(instance):
            if match := _START.match(str(line.get("message"))):
                found.append(Start(at_s, instance.name, *map(int, match.groups())))
    return sorted(found, key=lambda start: start.at_s)


def moves(found: Sequence[Start]) -> Iterator[tuple[Start, Start]]:
    """Yield each change of a partition's owner: the old owner's start, and the new owner's."""
    last: dict[int, Start] = {}
    for start in found:
        before = last.get(start.partition)
        if before is not None and before.owner != start.owner:
            yield before, start
        last[start.partition] = start


def needless(start: Start, log: compare.Log, stamps_ms: Mapping[int, Sequence[int]]) -> str | None:
    """Say if a start reads more than ten records that no window at its commit can need.

    Args:
        start: An assignment.
        log: One oracle for each partition.
        stamps_ms: Timestamps of each partition's records, by offset, ms since the Unix epoch.
    """
    rules, number = compare.RULES, start.partition
    reach_ms = rules.keep_ms + rules.skew_ms
    since_ms = log[number].frontier_ms(start.silent_below) - reach_ms
    below = enumerate(stamps_ms[number][: start.silent_below])
    due = next((offset for offset, at_ms in below if at_ms >= since_ms), start.silent_below)
    if start.reads_from >= due - _LOOK_BACK:
        return None
    return (
        f"{start.owner} reads partition {number} from offset {start.reads_from}, but {due} would "
        f"suffice: the commit is {start.silent_below}"
    )
