"""The real Feast SDK beside our stores, for the tests that compare the two."""

import asyncio
import contextlib
import datetime
import importlib.util
import pathlib
import random
import shutil
from dataclasses import dataclass
from typing import Any

import psycopg
import redis

from cerberus import settings, transactions, window
from cerberus.features import fences, packed
from cerberus.jobs import feast as feast_store
from cerberus.online import layout, user_rows
from cerberus.online import pool as redis_pool
from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import stores

NOW_MS = 1_790_000_000_123
SPANS = window.Spans()
CREDIT_TTL_MS = 30 * 86_400_000


def utc(ms=NOW_MS, us=0):
    """Return a moment: ms since the Unix epoch, and µs."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return epoch + datetime.timedelta(milliseconds=ms, microseconds=us)


def load(directory):
    """Run the definitions of a rendered feature repo."""
    spec = importlib.util.spec_from_file_location("definitions", directory / "features.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objects(module, kind):
    """Return a module's values of one kind."""
    return [value for value in vars(module).values() if isinstance(value, kind)]


def compiled(module):
    """Compile a module of definitions as they stand."""
    import feast

    services = objects(module, feast.FeatureService)
    return feast_store.plan(objects(module, feast.FeatureView), services)


def frame(rows):
    """Lay rows out for Feast."""
    import pandas as pd

    return pd.DataFrame(rows)


def stream_rows(count, seed):
    """Make rows as of NOW_MS: empty windows, small ones, and some with tiles."""
    rng = random.Random(seed)
    rows = []
    for user_id in range(1000, 1000 + count):
        user = window.UserWindow()
        for _ in range((0, 1, 3, 400)[user_id % 4]):
            event_ms = NOW_MS - rng.randrange(SPANS.keep_ms)
            amount_minor, merchant = rng.randrange(1, 10**6), rng.getrandbits(32)
            user.insert(window.Event(event_ms, amount_minor, rng.getrandbits(64), merchant))
        fence = fences.Fence(1, rng.randrange(10**9), NOW_MS)
        partition = transactions.partition_of(user_id, 6)
        recent = packed.pack(user, fence, partition, NOW_MS - SPANS.keep_ms, SPANS)
        stats = (user.stats(NOW_MS - SPANS.longest_ms, NOW_MS),)
        rows.append(user_rows.StreamRow(user_id, recent, stats, fence, partition))
    return rows


@dataclass
class Rig:
    """Feast's store with the definitions applied, and ours, on the same servers."""

    config: settings.Settings
    plan: layout.Plan
    store: Any
    redis: redis.Redis

    def online(self, call):
        """Call our online store."""

        async def run():
            async with redis_pool.connect(self.config) as client:
                return await call(user_rows.OnlineStore(client, self.plan, SPANS, "transactions"))

        return asyncio.run(run())

    def read(self, user_id, now_ms=NOW_MS):
        """Read one user as serving does."""
        return self.online(lambda store: store.read([user_id], now_ms, 5.0))[0]

    def feast_reads(self, user_ids):
        """Read all features of all views through the SDK."""
        names = [f"{view}:{name}" for view, schema in self.plan.schema.items() for name in schema]
        answer = self.store.get_online_features(names, [{"user_id": u} for u in user_ids])
        return answer.to_dict()

    def sql(self, query, *arguments):
        """Run a statement in a session of its own."""
        with psycopg.connect(self.config.postgres.url) as connection:
            cursor = connection.execute(query, arguments)
            return cursor.fetchall() if cursor.description else []

    def hashes(self):
        """Return all users' hashes to the byte."""
        keys = [key for key in self.redis.keys("*") if not key.startswith(b"cerberus:")]
        return {key: self.redis.hgetall(key) for key in keys}


def repo(environ, tmp_path):
    """Render a copy of the feature repo, so that the checkout's own is left alone."""
    directory = tmp_path / "feature_repo"
    if not directory.exists():
        directory.mkdir()
        shutil.copy(feast_store.REPO / "features.py", directory)
        (tmp_path / "cerberus").symlink_to(pathlib.Path(feast_store.__file__).parent.parent)
    return feast_store.render(settings.load(environ), directory).parent


@contextlib.contextmanager
def opened(environ, tmp_path):
    """Make our tables, apply the definitions, and yield the rig."""
    import feast

    config = settings.load(environ)

    async def migrate():
        async with postgres_pool.connect(config) as pool:
            await stores.on(pool, config.windows.spans).schema.migrate()

    asyncio.run(migrate())
    module = load(repo(environ, tmp_path))
    store: Any = feast.FeatureStore(config=feast.RepoConfig(**feast_store.repo_config(config)))
    store.apply([module.user, *objects(module, feast.FeatureView), module.fraud_model])
    try:
        with redis.Redis.from_url(config.redis.url) as client:
            yield Rig(config, compiled(module), store, client)
    finally:
        store.registry.write_engine.dispose()
