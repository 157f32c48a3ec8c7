"""The task that removes expired months from Postgres and adds the partitions of coming months.

All tables share one limit: the beginning of the oldest month that is still kept in part. So no kept
row lacks the rows that belong to it, and up to a month more than configured is kept.
"""

import contextlib
import datetime
import logging
from collections.abc import Callable

from cerberus import errors, settings, supervision
from cerberus.postgres import expiry, locks, months, stores

log = logging.getLogger(__name__)

_LOOK_S, _RETRY_S = 3600.0, 60.0


class Retention:
    """The task that removes expired rows, on one instance at a time.

    Args:
        config: The settings; when `retention_days` is 0, nothing is removed.
        postgres: Holds the tables, and the lock that only one instance can have.
        clock: Returns the time, in UTC.
    """

    def __init__(
        self,
        config: settings.Settings,
        postgres: stores.Stores,
        clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._days = config.jobs.retention_days
        self._postgres = postgres
        self._clock = clock

    async def run(self, progress: supervision.Progress) -> None:
        """Remove what has expired every hour, until asked to stop."""
        while not progress.stopping.is_set():
            wait_s = _LOOK_S
            try:
                await self._postgres.schema.migrate(self._clock())
                async with self._postgres.locks.singleton("retention") as still_held:
                    if still_held is not None and not await self.sweep(progress, still_held):
                        wait_s = _RETRY_S
            except errors.StoreUnavailable as error:
                log.warning("waiting: %s", error, extra={"action": "retention_waits"})
                wait_s = _RETRY_S
            progress.beat()
            await progress.wait(wait_s)

    async def sweep(self, progress: supervision.Progress, still_held: locks.StillHeld) -> bool:
        """Remove what has expired; False when a month in use is left for later.

        Idempotent: yes. Tables without expired rows are not read. The earlier of
        this clock and that of Postgres counts, so a fast clock removes nothing too early.

        Raises:
            StoreUnavailable: Postgres did not answer.
        """
        if not self._days:
            return True
        old = self._postgres.expiry
        before = months.kept_from(min(self._clock(), await old.now()), self._days)
        all_gone = True
        for table in expiry.BY_MONTH:
            all_gone &= await old.drop(table, before)
        for table in expiry.BY_ROW:
            await still_held()
            async with contextlib.aclosing(old.clear(table, before)) as deleted:
                async for _ in deleted:
                    progress.beat()
                    if progress.stopping.is_set():
                        break
        return all_gone
