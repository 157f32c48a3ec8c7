"""The task that lets Feast load batch views from Postgres into Redis, on one instance at a time.

Feast's SDK takes seconds and a hundred megabytes to import and blocks while it works, so the
serving process never imports it: the task starts a child process.
"""

import asyncio
import datetime
import logging
import sys
import time
from collections.abc import Awaitable, Callable

from cerberus import errors, settings, supervision, synthetic
from cerberus.online import user_rows
from cerberus.postgres import stores
from cerberus.telemetry import logs

log = logging.getLogger(__name__)

_CHILD_S, _LOOK_S = 600.0, 2.0
_SEEDED = 2_000  # a score takes 5 µs, in which the loop answers nobody


class Materializer:
    """The task that refreshes the batch views.

    Args:
        config: The settings; `materialize_s` is the interval between two loads.
        online_store: Says whether Redis has lost the loaded views.
        postgres: Holds the lock that only one instance can have.
    """

    def __init__(
        self,
        config: settings.Settings,
        online_store: user_rows.OnlineStore,
        postgres: stores.Stores,
    ) -> None:
        self._config = config
        self._online = online_store
        self._postgres = postgres
        self._said = logs.Repeated(log)

    async def run(self, progress: supervision.Progress) -> None:
        """Refresh the views until asked to stop."""
        while not progress.stopping.is_set():
            try:
                async with self._postgres.locks.singleton("materializer") as still_held:
                    while still_held is not None and not progress.stopping.is_set():
                        # This also makes the partitions of the coming months.
                        await self._postgres.schema.migrate()
                        await self._refresh(progress)
                        progress.beat()
                        await self._rest(progress, still_held)
            except (errors.StoreUnavailable, errors.FeaturesUnavailable) as error:
                self._said.warn(f"waiting: {error}", "materializer_waits")
            await progress.wait(_LOOK_S)

    async def _refresh(self, progress: supervision.Progress) -> None:
        if self._config.rate > 0:
            await seed_credit_scores(self._config, self._postgres)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cerberus",
            "materialize",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = asyncio.create_task(child.communicate())
        stopping = asyncio.create_task(progress.stopping.wait())
        try:
            await asyncio.wait(
                (output, stopping), timeout=_CHILD_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stopping.cancel()
            if child.returncode is None:
                child.kill()  # an interrupted load is repeated
            said, _ = await output
        if progress.stopping.is_set():
            return
        text = said.decode(errors="replace").strip()
        if child.returncode != 0:
            raise errors.StoreUnavailable(f"`cerberus materialize` failed: {text[-2000:]}")
        log.info("%s", text.rpartition("\n")[2], extra={"action": "materialized"})

    async def _rest(
        self, progress: supervision.Progress, still_held: Callable[[], Awaitable[None]]
    ) -> None:
        """Wait until the next load is due, or until Redis has lost the loaded views."""
        next_s = time.monotonic() + self._config.jobs.materialize_s
        while time.monotonic() < next_s and not progress.stopping.is_set():
            await still_held()
            if await self._online.materialized_ms() is None:
                return
            await progress.wait(_LOOK_S)


async def seed_credit_scores(config: settings.Settings, postgres: stores.Stores) -> None:
    """Write the synthetic population's scores for this week; they are the same every week."""
    today = datetime.datetime.now(datetime.UTC).date()
    monday = today - datetime.timedelta(days=today.weekday())
    since = datetime.datetime.combine(monday, datetime.time(), datetime.UTC)
    people = range(
        config.synthetic.first_user_id, config.synthetic.first_user_id + config.synthetic.users
    )
    for at in range(0, len(people), _SEEDED):
        some = [
            (u, synthetic.credit_score(u, config.synthetic.seed)) for u in people[at : at + _SEEDED]
        ]
        await postgres.credit_scores.seed(some, since)
