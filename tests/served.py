"""What serving reads, written by hand into a real Redis as the consumer writes it."""

import asyncio
import dataclasses
import functools
from typing import Any

import redis
from changes import changed, rebuilt

from cerberus import assembly, claims, settings, supervision, transactions, window
from cerberus.api import gate, routes
from cerberus.decisions import models
from cerberus.features import declared, fences
from cerberus.features import packed as packed_windows
from cerberus.online import layout, user_rows
from cerberus.online import pool as redis_pool
from cerberus.postgres import pool as postgres_pool
from cerberus.serving import predictor
from cerberus.telemetry import metrics

NOW_MS = 1_790_000_000_000
model = functools.cache(models.Model.load)


def transaction(name, user_id=1, amount_minor=1_000, at_ms=NOW_MS):
    return transactions.Transaction(name, user_id, amount_minor, "USD", "m", at_ms)


def redis_only(servers):
    """Return settings of a world that has a Redis database of its own, flushed, and no more."""
    url = f"{servers.redis.url.rpartition('/')[0]}/15"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return {**servers.environ, "REDIS_URL": url, "CERBERUS_OPEN": "loopback"}


class Served:
    """One partition's windows and the store that its rows are in, at a clock set by hand."""

    def __init__(self, environ, **changes):
        self.config = changed(settings.load(environ), **changes)
        self.client: Any = redis_pool.connect(self.config)
        self.pool = postgres_pool.connect(self.config)
        self.service = assembly.Service(self.config, self.client, self.pool, self.clock)
        self.spans = self.service.spans
        self.model = model(self.config.model.path, self.spans.names)
        self.store = self.service.online
        self.postgres = self.service.postgres
        self.claimed = self.service.claims
        self.supervisor = supervision.Supervisor(lambda reason: None)
        self.windows = window.PartitionWindows(self.spans)
        self.offset = 0
        self.now_ms = NOW_MS
        self.meter = metrics.Metrics()
        self.kept = []
        self.predictor = predictor.Predictor(
            rebuilt(self.service, self.shared()).sources,
            keep=self.kept.append,
            meter=self.meter,
            clock=self.clock,
        )

    def shared(self):
        """Return the parts that what a test asks directly and what it asks by HTTP share."""
        return {
            "model": self.model,
            "online": self.store,
            "postgres": self.postgres,
            "claims": self.claimed,
            "supervisor": self.supervisor,
        }

    def clock(self):
        return self.now_ms

    def app(self, probes=None):
        built = routes.build()
        built.state.parts = gate.Parts.of(rebuilt(self.service, self.shared()), probes or {})
        return built

    async def live(self, **changes):
        """Let the owner say that it stands at the end of the log, and Redis know all claims."""
        for bucket in range(64):
            await self.client.set(claims._mark(self.config, bucket), 0, nx=True)
        state = fences.PartitionState(1, self.offset, "live", self.now_ms)
        await self.store.write_states(1, {0: dataclasses.replace(state, **changes)}, create=True)

    async def forget(self):
        """Lose all claims, as if nothing had been decided."""
        if keys := await self.client.keys(f"{claims._prefix(self.config)}*:*"):
            await self.client.delete(*keys)

    async def stream(self, *seen):
        """Let the stream see transactions."""
        for each in seen:
            self.windows.observe(each)
            self.offset += 1
        fence = fences.Fence(1, self.offset, self.windows.frontier_ms)
        rows = []
        for user_id in sorted({each.user_id for each in seen}):
            user = self.windows.user(user_id)
            assert user is not None
            packed = packed_windows.pack(user, fence, 0, self.windows.lower_ms, self.spans)
            stats = self.windows.stats(user_id, fence.as_of_ms)
            rows.append(user_rows.StreamRow(user_id, packed, stats, fence, 0))
        await self.store.write(rows)
        await self.live()

    async def reading(self):
        """Wait until a round trip for predictions is under way."""
        async with asyncio.timeout(5):
            while not self.predictor.in_flight:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *raised):
        await self.close()

    async def close(self):
        """Let go of Redis and of Postgres."""
        await self.store.close()
        await (await self.pool).close()

    async def migrated(self):
        """Let there be tables to look decisions up in."""
        await self.pool
        await self.postgres.schema.migrate()

    async def ask(self, **document):
        """Ask the predictor."""
        return await self.predictor.predict(self.predictor.parse(document))

    async def credit(self, user_id, score, at_ms=NOW_MS):
        """Write a credit score as Feast's materialization does."""
        view = declared.CREDIT_VIEW
        await self.client.hset(
            layout.entity_key(user_id, layout.PROJECT),
            mapping={
                layout.field(view, "credit_score"): layout.encode_int64(score),
                layout.ts_field(view): layout.encode_timestamp(at_ms * 1000),
            },
        )

    def batches(self):
        """Return how many round trips were made for predictions."""
        for line in self.meter.render().decode().splitlines():
            if line.startswith('cerberus_stage_seconds_count{stage="features"}'):
                return int(float(line.split()[-1]))
        return 0
