"""Decisions on requests, on their way to Postgres and to topic `decisions`.

A reply waits for no store. Its record goes into bounded buffers, one for each store, so that
neither waits for the other; a task empties them in batches. What a full buffer cannot take is
counted and reported. A `kill -9` loses the decisions of the last `CERBERUS_DECISION_FLUSH_MS`, and
those that a store that is down has not acknowledged.
"""

import asyncio
import collections
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cerberus import claims, errors, kafka, publishing, settings, supervision
from cerberus.decisions import models, records
from cerberus.postgres import apart, stores

log = logging.getLogger(__name__)

_ROWS, _MESSAGES = 50, 500  # laying out rows blocks the loop: half a millisecond
_RETRY_S, _CLOSE_S = 1.0, 5.0


class _Buffer:
    """What one store has not acknowledged yet."""

    def __init__(
        self,
        most: int,
        batch: int,
        prepare: Callable[[], Awaitable[Any]],
        store: Callable[[Sequence[records.Record]], Awaitable[None]],
    ) -> None:
        self._most = most
        self._batch = batch
        self._prepare = prepare
        self._store = store
        self._ready = False
        # By id: a repeated request must not store the waiting decision twice.
        self._records: collections.OrderedDict[uuid.UUID, tuple[float, records.Record]] = (
            collections.OrderedDict()
        )
        self.dropped = 0
        self.problem: str | None = None

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: records.Record) -> None:
        if record.decision_id in self._records:
            return
        if len(self._records) >= self._most:
            self.dropped += 1
        else:
            self._records[record.decision_id] = time.monotonic(), record

    def older(self, age_s: float) -> list[records.Record]:
        until_s = time.monotonic() - age_s
        waiting = itertools.takewhile(lambda each: each[0] <= until_s, self._records.values())
        return [record for _, record in waiting]

    async def flush(self) -> None:
        """Store all that wait; those not acknowledged keep waiting, and `problem` says why."""
        try:
            if not self._ready:
                await self._prepare()
                self._ready = True
            while self._records:
                waiting = itertools.islice(self._records.values(), self._batch)
                batch = [record for _, record in waiting]
                for at, why in (await apart.write(self._store, batch)).items():
                    self.dropped += 1
                    log.error(
                        "decision %s is not stored: %s",
                        batch[at].decision_id,
                        why,
                        extra={"action": "decision_refused"},
                    )
                for record in batch:
                    del self._records[record.decision_id]
        except (errors.StoreUnavailable, errors.ConfigError) as error:
            if self.problem is None:
                log.warning("decisions wait: %s", error, extra={"action": "decisions_wait"})
            self.problem = str(error)
            self._ready = False  # a store that was replaced lacks what was prepared in it
        else:
            self.problem = None

    def report(self) -> dict[str, Any]:
        oldest_s = 0.0
        if self._records:
            oldest_s = time.monotonic() - next(iter(self._records.values()))[0]
        return {
            "waiting": len(self._records),
            "oldest_s": round(oldest_s, 1),
            "dropped": self.dropped,
            "problem": self.problem,
        }


class DecisionLog:
    """The buffers and the task that empties them.

    Args:
        config: Settings.
        model: Stored with its decisions.
        postgres: Stores the decisions. Missing tables and topics are created.
        claimed: Renews the claims of decisions that Postgres does not have yet.
    """

    def __init__(
        self,
        config: settings.Settings,
        model: models.Model,
        postgres: stores.Stores,
        claimed: claims.Claims,
    ) -> None:
        self._config = config
        self._model = model
        self._postgres = postgres
        self._claims = claimed
        self._publisher = publishing.Publisher(config)
        self._buffers = {
            "postgres": _Buffer(
                config.decisions.buffer, _ROWS, self._register, postgres.ledger.write
            ),
            "kafka": _Buffer(config.decisions.buffer, _MESSAGES, self._create, self._publish),
        }

    def put(self, record: records.Record) -> None:
        """Take a record, or count it as dropped if a buffer is full. Never waits."""
        for buffer in self._buffers.values():
            buffer.put(record)

    def report(self) -> Mapping[str, Mapping[str, Any]]:
        """Return how many records wait for each store, since when (s), how many were dropped."""
        return {name: buffer.report() for name, buffer in self._buffers.items()}

    async def run(self, progress: supervision.Progress) -> None:
        """Store records until asked to stop."""
        async with asyncio.TaskGroup() as group:
            for buffer in self._buffers.values():
                group.create_task(self._empty(buffer, progress))
            group.create_task(self._renew(self._buffers["postgres"], progress))

    async def _empty(self, buffer: _Buffer, progress: supervision.Progress) -> None:
        while not progress.stopping.is_set():
            await progress.wait(self._config.decisions.flush_ms / 1000)
            await buffer.flush()
            progress.beat()

    async def _renew(self, buffer: _Buffer, progress: supervision.Progress) -> None:
        """Renew the claims of what waits long: else neither Redis nor Postgres has it."""
        pause_s = self._config.decisions.claim_ms / 3000
        wait_s = pause_s
        while not progress.stopping.is_set():
            await progress.wait(wait_s)
            wait_s = pause_s
            try:
                await self._claims.renew(buffer.older(pause_s))
            except errors.FeaturesUnavailable:
                wait_s = _RETRY_S

    async def close(self) -> None:
        """Store what is left, within 5 s, and close the connection to Kafka."""
        flushing = [asyncio.create_task(b.flush()) for b in self._buffers.values() if b]
        if flushing:
            _, late = await asyncio.wait(flushing, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
        for name, buffer in self._buffers.items():
            if buffer:
                log.error(
                    "%d decisions did not reach %s: %s",
                    len(buffer),
                    name,
                    buffer.problem or "it was too slow",
                    extra={"action": "decisions_lost"},
                )
        await self._publisher.close()

    async def _register(self) -> None:
        await self._postgres.schema.migrate()
        await self._postgres.ledger.register(self._model)

    async def _create(self) -> None:
        await kafka.create_topics(self._config)

    async def _publish(self, batch: Sequence[records.Record]) -> None:
        messages = [publishing.decision_message(self._config, record) for record in batch]
        self._buffers["kafka"].dropped += len(await self._publisher.publish(messages))
