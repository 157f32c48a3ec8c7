"""Import of existing data into Postgres, which continues where the last attempt was interrupted.

Every row is inserted or was there already, and the file's progress is stored in the same
transaction, so a repetition, or a start after a kill, ends in the same tables. A transaction of the
log wins over the same one in a file.
"""

import dataclasses
import datetime
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import tqdm

from cerberus import errors, labels, printable, settings, transactions
from cerberus.files import datafiles, layouts
from cerberus.online import partition_states
from cerberus.online import pool as redis_pool
from cerberus.postgres import facts, imports, months, stores

_ROWS, _USERS = 5_000, 500
_REJECT_BYTES = 100_000
_MAX_SCORE = 100_000
_LABEL_FIELDS = ("transaction_id", "label", "labelled_at")
_SCORE_FIELDS = ("user_id", "credit_score", "timestamp")
FIELDS = {
    "transactions": (layouts.REQUIRED, layouts.OPTIONAL),
    "labels": (_LABEL_FIELDS, ("source", "user_id")),
    "credit_scores": (_SCORE_FIELDS, ()),
}
"""For each kind of file: its required fields, and its optional ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to import.

    Attributes:
        files: Paths by kind.
        layouts: Layouts by kind.
        label_values: Labels by the value in the file.
        rejects: The file that lists rejected rows; None: one beside each file.
        again: Whether to read a file again that was completely imported.
    """

    files: Mapping[str, pathlib.Path]
    layouts: Mapping[str, layouts.Layout]
    label_values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rejects: pathlib.Path | None = None
    again: bool = False

    def rejects_of(self, kind: str) -> pathlib.Path:
        """Return the path of the file that lists a kind's rejected rows."""
        path = self.files[kind]
        return self.rejects or path.with_name(f"{path.name}.rejects.jsonl")


class Rejects:
    """A file that lists rejected rows and why; it is created with the first one.

    Args:
        path: The file of rejects.
        file: Name of the file that the rows come from.
        size: How many bytes of an existing file of rejects are valid; the rest is cut off.

    Raises:
        InvalidInput: `path` holds something else.
    """

    def __init__(self, path: pathlib.Path, file: str, size: int) -> None:
        self._path = path
        self._file = file
        self.size = size
        if path.exists():
            if not _tells_of_rejects(path):
                raise errors.InvalidInput(
                    "--rejects", f"{path} holds something else: name another file, or remove it"
                )
            os.truncate(path, min(size, path.stat().st_size))

    def write(self, refused: Sequence[tuple[int, errors.InvalidInput]]) -> None:
        """Append rows; they are on the disk when this returns."""
        if not refused:
            return
        lines = [
            printable.dumps(
                {"file": self._file, "line": line, "field": error.field, "reason": error.reason}
            )
            + b"\n"
            for line, error in refused
        ]
        with self._path.open("ab") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            self.size = file.tell()


def _tells_of_rejects(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(_REJECT_BYTES)
    try:
        return not line or set(orjson.loads(line)) == {"file", "line", "field", "reason"}
    except (ValueError, TypeError):
        return False


class Importer:
    """Reads files into Postgres.

    Args:
        config: The settings.
        plan: What to import.
        postgres: The stores, with up-to-date tables.
    """

    def __init__(self, config: settings.Settings, plan: Plan, postgres: stores.Stores) -> None:
        self._config = config
        self._plan = plan
        self._imports = postgres.imports
        now = datetime.datetime.now(datetime.UTC)
        self._latest_ms = months.to_ms(now) + config.windows.max_future_skew_ms
        self._oldest_ms = 0
        if config.jobs.retention_days:
            self._oldest_ms = months.to_ms(months.kept_from(now, config.jobs.retention_days))
        self._begun = False

    async def load(self, kind: str) -> imports.Progress:
        """Import the rest of one file, and return its progress in total.

        Raises:
            InvalidInput: The file lacks a column of its kind.
            StoreUnavailable: Postgres did not answer; start again.
        """
        plan = self._plan
        file = plan.layouts[kind].open(plan.files[kind], *FIELDS[kind])
        name = _fingerprint(kind, file, plan)
        progress = await self._imports.begin(name, kind, file.path.name, file.size)
        if progress.finished and plan.again:
            progress = imports.Progress()
        first, self._begun = not self._begun, True
        if progress.finished:
            return progress
        path, start = plan.rejects_of(kind), datafiles.Position(*progress.position)
        rejects_bytes = progress.rejects_bytes
        if start == datafiles.START and not first and path == plan.rejects:
            rejects_bytes = path.stat().st_size if path.exists() else 0
        rejects = Rejects(path, file.path.name, rejects_bytes)
        with _bar(kind, file, start) as bar:
            for rows, position in file.pieces(_ROWS, start):
                read, refused = self._parse(kind, rows)
                rejects.write(refused)
                rejected = progress.rejected + len(refused)
                after = imports.Progress(position, progress.added, rejected, rejects.size)
                progress = await self._imports.store(name, kind, read, after)
                bar.update(file.done(position) - bar.n)
        done = dataclasses.replace(progress, rejects_bytes=rejects.size, finished=True)
        return await self._imports.store(name, kind, (), done)

    async def compute(self) -> None:
        """Compute the history that is due, including what earlier attempts left."""
        with tqdm.tqdm(
            desc="history", total=await self._imports.due(), unit=" users", disable=None
        ) as bar:
            while done := await self._imports.compute(_USERS):
                bar.update(done)

    def _parse(
        self, kind: str, rows: Sequence[datafiles.Row]
    ) -> tuple[list[tuple[int, Any]], list[tuple[int, errors.InvalidInput]]]:
        """Return the records of valid rows and the errors of the others, each with its line."""
        read: list[tuple[int, Any]] = []
        refused: list[tuple[int, errors.InvalidInput]] = []
        for row in rows:
            try:
                read.append((row.line, self._read(kind, row)))
            except errors.InvalidInput as error:
                refused.append((row.line, error))
        return read, refused

    def _read(self, kind: str, row: datafiles.Row) -> Any:
        layout = self._plan.layouts[kind]
        if kind == "transactions":
            paid = layout.transaction(row, self._config.currency)
            return self._in_time(paid, paid.event_ms, "timestamp")
        found = layout.pick(row, (*FIELDS[kind][0], *FIELDS[kind][1]))
        if kind == "labels":
            label = read_label(found, layout, self._plan.label_values, self._latest_ms)
            return self._in_time(label, label.labelled_ms, "labelled_at")
        score = read_score(found, layout)
        return self._in_time(score, score.event_ms, "timestamp")

    def _in_time(self, record: Any, ms: int, field: str) -> Any:
        if ms > self._latest_ms:
            raise errors.InvalidInput(field, "lies in the future")
        if ms < self._oldest_ms:
            raise errors.InvalidInput(field, "is older than CERBERUS_RETENTION_DAYS keeps")
        return record


def _bar(kind: str, file: datafiles.File, start: datafiles.Position) -> Any:
    return tqdm.tqdm(
        desc=kind,
        total=file.total,
        initial=file.done(start),
        unit=file.unit if file.unit == "B" else f" {file.unit}",
        unit_scale=True,
        disable=None,
    )


def read_label(
    found: Mapping[str, Any],
    layout: layouts.Layout,
    values: Mapping[str, str],
    latest_ms: int,
) -> labels.Label:
    """Read a label; `values` maps values of the file to the vocabulary.

    Raises:
        InvalidInput: naming the field.
    """
    said = found.get("label")
    word = str(said).lower() if isinstance(said, bool) else layouts.text(said)
    if isinstance(word, str):
        word = values.get(word, word)
    document = {
        "transaction_id": layouts.text(found.get("transaction_id")),
        "label": word,
        "source": layouts.text(found.get("source", facts.IMPORTED)),
        "labelled_at": layout.moment(found.get("labelled_at"), "labelled_at"),
        "user_id": layouts.whole(found.get("user_id")),
    }
    return labels.parse(document, latest_ms)


def read_score(found: Mapping[str, Any], layout: layouts.Layout) -> imports.Score:
    """Read a credit score.

    Raises:
        InvalidInput: naming the field.
    """
    score = layouts.whole(found.get("credit_score"))
    if type(score) is not int or not 0 <= score <= _MAX_SCORE:
        raise errors.InvalidInput("credit_score", f"must be a whole number from 0 to {_MAX_SCORE}")
    return imports.Score(
        user_id=transactions.parse_user_id({"user_id": layouts.whole(found.get("user_id"))}),
        event_ms=transactions.parse_timestamp({"timestamp": layout.moment(found.get("timestamp"))}),
        score=score,
    )


def _fingerprint(kind: str, file: datafiles.File, plan: Plan) -> str:
    """Return a hash that identifies an import: the file, and how it is read."""
    layout = plan.layouts[kind]
    identity = (kind, file.fingerprint(), dataclasses.asdict(layout), dict(plan.label_values))
    return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def load(
    config: settings.Settings, plan: Plan, postgres: stores.Stores, redis: Any
) -> dict[str, imports.Progress]:
    """Import files, and return the progress of each in total, by kind.

    Args:
        config: The settings.
        plan: The files, and how they are read.
        postgres: The stores to import into.
        redis: The shared pool; its marks are removed when there are new credit scores.

    Raises:
        InvalidInput: A file lacks a column of its kind.
        StoreUnavailable: A store did not answer; start again.
        NeedsOperator: Another import is running.
    """
    await postgres.schema.migrate()
    async with postgres.locks.singleton("import") as held:
        if held is None:
            raise errors.NeedsOperator("another import is running: wait until it has finished")
        importer = Importer(config, plan, postgres)
        done = {kind: await importer.load(kind) for kind in FIELDS if kind in plan.files}
        await importer.compute()
    if "credit_scores" in done and done["credit_scores"].added:
        # This forces a full load: some scores are older than those that were loaded last.
        for key in (partition_states.MATERIALIZED, partition_states.LOADING):
            await redis_pool.answers(redis, redis.delete(key))
    return done
