"""Import of existing data into Postgres, which continues where the last attempt was interrupted.

Every row is inserted or was there already, and the file's progress is stored in the same
transaction, so a repetition, or a start after a kill, ends in the same tables. A transaction of the
log wins over the same one in a file.
"""

import dataclasses
import datetime
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import tqdm

from cerberus import errors, settings
from cerberus.files import datafiles, layouts, rejected
from cerberus.files.rows import START, Position, Row
from cerberus.online import partition_states
from cerberus.online import pool as redis_pool
from cerberus.postgres import imports, months, stores

_ROWS, _USERS = 5_000, 500
_SHOWN = 12
# The previous release identified a file that it read without options by this.
_FORMERLY: dict[str, Any] = {
    "columns": {},
    "constants": {},
    "timestamp_format": "rfc3339",
    "amount_unit": "major",
}
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
        files: A file, a folder or a glob by kind.
        layouts: Layouts by kind.
        rejects: The file that lists rejected rows; None: one beside each file.
        again: Whether to read a file again that was completely imported.
    """

    files: Mapping[str, pathlib.Path]
    layouts: Mapping[str, layouts.Layout]
    rejects: pathlib.Path | None = None
    again: bool = False

    def rejects_of(self, kind: str) -> pathlib.Path:
        """Return the file that lists a kind's rejected rows: beside its file or folder."""
        path = datafiles.root_of(self.files[kind]) or self.files[kind]
        return self.rejects or path.with_name(f"{path.name}{datafiles.REJECTS}")


class Importer:
    """Reads files into Postgres.

    Args:
        config: The settings.
        plan: What to import.
        postgres: The stores, with up-to-date tables.
        say: Called with each sentence for the user.
    """

    def __init__(
        self,
        config: settings.Settings,
        plan: Plan,
        postgres: stores.Stores,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._plan = plan
        self._imports = postgres.imports
        self._say = say
        now = datetime.datetime.now(datetime.UTC)
        self._latest_ms = months.to_ms(now) + config.windows.max_future_skew_ms
        self._oldest_ms = 0
        if config.jobs.retention_days:
            self._oldest_ms = months.to_ms(months.kept_from(now, config.jobs.retention_days))
        self._rejects_bytes: dict[pathlib.Path, int] = {}

    async def load(self, kind: str) -> imports.Progress:
        """Import the rest of a file, or of all parts of a folder; return the progress in total.

        Raises:
            InvalidInput: A file lacks a column of its kind, or cannot be read to its end.
            StoreUnavailable: Postgres did not answer; start again.
        """
        asked = self._plan.files[kind]
        root = datafiles.root_of(asked)
        if others := datafiles.left_out(asked):
            self._say(others)
        done, before = imports.Progress(), imports.Progress()
        for path in datafiles.parts(asked):
            file = self._plan.layouts[kind].open(path, *FIELDS[kind], root)
            began, progress = await self._load(kind, file)
            done, before = _sum(done, progress), _sum(before, began)
        if not before.finished or done.position != before.position:
            self._say(_summary(kind, done, self._plan.rejects_of(kind)))
        return done

    async def _load(
        self, kind: str, file: datafiles.File
    ) -> tuple[imports.Progress, imports.Progress]:
        """Import the rest of one file; return its progress before and after."""
        source = _source(kind, file, self._plan.layouts[kind])
        progress, earlier = await self._imports.begin(source)
        path = self._plan.rejects_of(kind)
        told = self._told(file, source, progress, earlier)
        if told:
            self._say(told)
        if progress.finished and not self._plan.again:
            self._rejects_bytes[path] = progress.rejects_bytes
            return progress, progress
        began = progress = imports.Progress() if progress.finished else progress
        start = Position(*progress.position)
        # Later lines come from an attempt that was interrupted before it stored its progress.
        valid = progress.rejects_bytes if start != START else self._rejects_bytes.get(path, 0)
        rejects = rejected.Rejects(path, valid)
        with _bar(kind, file, start) as bar:
            for rows, position in file.pieces(_ROWS, start):
                read, refused = self._parse(kind, rows)
                rejects.write(file.name, refused)
                after = dataclasses.replace(
                    progress,
                    position=position,
                    rejected=progress.rejected + len(refused),
                    rejects_bytes=rejects.size,
                    left_out=progress.left_out + position.rows - progress.position[0] - len(rows),
                )
                progress = await self._store(source, read, after, rejects)
                bar.update(file.done(position) - bar.n)
        self._rejects_bytes[path] = rejects.size
        after = dataclasses.replace(progress, rejects_bytes=rejects.size, finished=True)
        return began, await self._imports.store(source.fingerprint, kind, (), after)

    def _told(
        self,
        file: datafiles.File,
        source: imports.Source,
        progress: imports.Progress,
        earlier: imports.Earlier | None,
    ) -> str:
        """Say what is known about an earlier import of this file, or of one with its name."""
        if progress.finished:
            rest = "reading it again" if self._plan.again else "--again reads it again"
            known = "is unchanged" if progress.recorded else "has the same size and first MiB"
            return (
                f"{file.name} was imported on {_date(progress.finished_at)} as "
                f"{progress.position[0]} rows and {known} (fingerprint "
                f"{source.content[:_SHOWN]}): {rest}"
            )
        if earlier is None or any(progress.position):
            return ""
        known = f"{file.name} was imported on {_date(earlier.finished_at)} as {earlier.rows} rows"
        if earlier.content is None:
            known += " by an earlier release, from a file or by options that differ"
        elif earlier.content != source.content:
            known += f" with fingerprint {earlier.content[:_SHOWN]}; it is another file now"
        else:
            known += " with another --select or --encoding"
        return f"{known} (fingerprint {source.content[:_SHOWN]}): its rows are merged by identity"

    async def compute(self) -> None:
        """Compute the history that is due, including what earlier attempts left."""
        with tqdm.tqdm(
            desc="history", total=await self._imports.due(), unit=" users", disable=None
        ) as bar:
            while done := await self._imports.compute(_USERS):
                bar.update(done)

    def _parse(
        self, kind: str, rows: Sequence[Row]
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

    async def _store(
        self,
        source: imports.Source,
        read: Sequence[tuple[int, Any]],
        after: imports.Progress,
        rejects: rejected.Rejects,
    ) -> imports.Progress:
        """Store records, without those that Postgres refuses; return the progress."""
        store = self._imports.store
        try:
            return await store(source.fingerprint, source.kind, read, after)
        except errors.DataRefused:
            why = await self._imports.refused(source.kind, read)
        told = [(read[at][0], errors.InvalidInput("row", why[at])) for at in sorted(why)]
        rejects.write(source.file, told)
        count = after.rejected + len(told)
        after = dataclasses.replace(after, rejected=count, rejects_bytes=rejects.size)
        taken = [record for at, record in enumerate(read) if at not in why]
        return await store(source.fingerprint, source.kind, taken, after)

    def _read(self, kind: str, row: Row) -> Any:
        if kind == "transactions":
            paid = layouts.transaction(row, self._config.currency)
            return self._in_time(paid, paid.event_ms, "timestamp")
        if kind == "labels":
            label = layouts.label(row, self._latest_ms)
            return self._in_time(label, label.labelled_ms, "labelled_at")
        score = layouts.score(row)
        return self._in_time(score, score.event_ms, "timestamp")

    def _in_time(self, record: Any, ms: int, field: str) -> Any:
        if ms > self._latest_ms:
            raise errors.InvalidInput(field, "lies in the future")
        if ms < self._oldest_ms:
            raise errors.InvalidInput(field, "is older than CERBERUS_RETENTION_DAYS keeps")
        return record


def _bar(kind: str, file: datafiles.File, start: Position) -> Any:
    return tqdm.tqdm(
        desc=kind,
        total=file.total,
        initial=file.done(start),
        unit=file.unit if file.unit == "B" else f" {file.unit}",
        unit_scale=True,
        disable=None,
    )


def _sum(one: imports.Progress, other: imports.Progress) -> imports.Progress:
    """Return the progress of two parts together; finished if the latter is."""
    return dataclasses.replace(
        other,
        position=Position(*map(sum, zip(one.position, other.position, strict=True))),
        added=one.added + other.added,
        rejected=one.rejected + other.rejected,
        differing=one.differing + other.differing,
        left_out=one.left_out + other.left_out,
    )


def _summary(kind: str, done: imports.Progress, rejects: pathlib.Path) -> str:
    there = done.position[0] - done.added - done.rejected - done.left_out
    said = f"{kind}: {done.added} added, {there} were there"
    if done.differing:
        said += f" ({done.differing} of them with another content, which stays)"
    if done.left_out:
        said += f", {done.left_out} left out"
    return f"{said}, {done.rejected} refused" + (f": {rejects}" if done.rejected else "")


def _date(moment: datetime.datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else ""


def _source(kind: str, file: datafiles.File, layout: layouts.Layout) -> imports.Source:
    """Return what identifies an import: the file's content, and how it is read."""
    reading = orjson.dumps(dataclasses.asdict(layout), option=orjson.OPT_SORT_KEYS)
    content = file.fingerprint()
    former = ""
    if layout == layouts.Layout():
        former = _hash((kind, file.first_fingerprint(), _FORMERLY, {}))
    name = _hash((kind, content, str(reading, "utf-8")))
    told = (file.name, file.size, content, str(reading, "utf-8"))
    return imports.Source(name, former, kind, *told)


def _hash(identity: Any) -> str:
    return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def load(
    config: settings.Settings,
    plan: Plan,
    postgres: stores.Stores,
    redis: Any,
    say: Callable[[str], None],
) -> dict[str, imports.Progress]:
    """Import files, and return the progress of each in total, by kind.

    Args:
        config: The settings.
        plan: The files, and how they are read.
        postgres: The stores to import into.
        redis: The shared pool; its marks are removed when there are new credit scores.
        say: Called with each sentence for the person who waits.

    Raises:
        InvalidInput: A file lacks a column of its kind, or cannot be read to its end.
        StoreUnavailable: A store did not answer; start again.
        NeedsOperator: Another import is running.
    """
    await postgres.schema.migrate()
    async with postgres.locks.singleton("import") as held:
        if held is None:
            raise errors.NeedsOperator("another import is running: wait until it has finished")
        importer = Importer(config, plan, postgres, say)
        done = {kind: await importer.load(kind) for kind in FIELDS if kind in plan.files}
        await importer.compute()
    if "credit_scores" in done and done["credit_scores"].added:
        # This forces a full load: some scores are older than those that were loaded last.
        for key in (partition_states.MATERIALIZED, partition_states.LOADING):
            await redis_pool.answers(redis, redis.delete(key))
    return done
