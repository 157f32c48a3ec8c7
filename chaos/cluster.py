"""The system under test: three servers, instances of the service, and access to their stores."""

import asyncio
import contextlib
import datetime
import pathlib
import shutil
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import NewPartitions, RecordsToDelete

from cerberus import assembly, kafka, settings, stack, window
from cerberus.features import declared
from cerberus.jobs import feast as feast_store
from cerberus.learning import simulation, training
from cerberus.online import layout, user_rows
from cerberus.online import pool as redis_pool
from cerberus.postgres import pool as postgres_pool
from cerberus.stack import process
from chaos import forwarder, replica, service, swelling

APP = "cerberus.app:app"
PARTITIONS = 6
SESSION_S = 6
SETTINGS = {
    "CERBERUS_SPANS": "20s",
    "CERBERUS_ALLOWED_LATENESS_S": "5",
    "CERBERUS_MAX_FUTURE_SKEW_S": "5",
    "CERBERUS_SESSION_TIMEOUT_S": str(SESSION_S),
    "CERBERUS_PARTITIONS": str(PARTITIONS),
    "CERBERUS_RATE": "0",
    "CERBERUS_MAX_REJECTED_SHARE": "1",
    "CERBERUS_MATERIALIZE_S": "86400",
}


async def until(condition: Callable[[], Any], what: str, within_s: float) -> float:
    """Wait for a condition, sync or async, and return how long that took, s.

    Raises:
        TimeoutError: It did not become true within `within_s`; the message contains `what`.
    """
    began_s = time.monotonic()
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        took_s = time.monotonic() - began_s
        if found:
            return took_s
        if took_s > within_s:
            raise TimeoutError(f"not within {within_s:g} s: {what}")
        await asyncio.sleep(0.05)


def credit_score(user_id: int) -> int:
    """Return the fixed credit score of a user."""
    return 300 + user_id % 551


@dataclass
class Cluster:
    """Servers, instances, and this process' own clients.

    Attributes:
        servers: Kafka, Redis and Postgres.
        config: The settings of the instances.
        spans: The window definition.
        instances: The instances of the service.
        online: Reads what they wrote to Redis.
        redis: A client of the same Redis.
        pool: Connections to Postgres.
        credit: Whether fixed credit scores are materialized.
        pair: The Redis behind the address that instances know, and one to fail over to.
        former: The greatest epoch of the topic's former lives.
        removed: The transactions' records that were deleted from the log, by partition.
    """

    servers: stack.Stack
    config: settings.Settings
    spans: window.Spans
    instances: Sequence[service.Instance]
    online: user_rows.OnlineStore
    redis: Any
    pool: Any
    credit: bool
    pair: replica.Pair
    former: int = 0
    removed: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """The topic of transactions."""
        return self.config.kafka.topic(kafka.TRANSACTIONS)

    def producer(self) -> AIOKafkaProducer:
        """Build a producer that discovers a new partition within 0.5 s."""
        return AIOKafkaProducer(
            bootstrap_servers=self.servers.kafka.url,
            enable_idempotence=True,
            linger_ms=2,
            metadata_max_age_ms=500,
            request_timeout_ms=10_000,
        )

    async def add_partition(self) -> int:
        """Add one partition to the topic and return how many there are."""
        async with kafka.admin(self.config.kafka) as client:
            count = await kafka.partition_count(client, self.topic) + 1
            await client.create_partitions({self.topic: NewPartitions(count)})
        return count

    async def recreate_topic(self) -> None:
        """Delete the topic with all its records and create it again."""
        self.removed.clear()
        self.former = max(s.epoch for s in (await self.online.states()).values())
        async with kafka.admin(self.config.kafka) as client:
            await client.delete_topics([self.topic])

        async def gone() -> bool:
            async with kafka.admin(self.config.kafka) as client:
                return self.topic not in await client.list_topics()

        await until(gone, "the topic is gone", 30)
        await kafka.create_topics(self.config)

    async def log(self, name: str) -> dict[int, list[Any]]:
        """Read all records of a topic with a plain consumer, by partition; add the deleted ones."""
        topic = self.config.kafka.topic(name)
        reader = AIOKafkaConsumer(
            bootstrap_servers=self.servers.kafka.url, isolation_level="read_committed"
        )
        async with asyncio.timeout(600), reader:
            await reader._client.set_topics([topic])
            tps = [TopicPartition(topic, p) for p in sorted(reader.partitions_for_topic(topic))]
            reader.assign(tps)
            await reader.seek_to_beginning(*tps)
            ends = await reader.end_offsets(tps)
            gone = self.removed if topic == self.topic else {}
            found: dict[int, list[Any]] = {p: list(gone.get(p, ())) for _, p in tps}
            while any([await reader.position(tp) < ends[tp] for tp in tps]):
                polled = await reader.getmany(timeout_ms=200, max_records=200)
                for tp, records in polled.items():
                    found[tp.partition] += map(swelling.lean, records)
        return found

    async def cut_log(self, back_ms: int) -> None:
        """Delete the records older than `back_ms`, which are all stored; keep a copy of them."""
        since_ms = int(time.time() * 1000) - back_ms
        async with AIOKafkaConsumer(bootstrap_servers=self.servers.kafka.url) as reader:
            await reader._client.set_topics([self.topic])
            tps = [TopicPartition(self.topic, p) for p in reader.partitions_for_topic(self.topic)]
            found = await reader.offsets_for_times(dict.fromkeys(tps, since_ms))
        cuts = {tp.partition: at.offset for tp, at in found.items() if at}

        async def stored() -> bool:
            states = await self.online.states()
            return all(p in states and states[p].offset >= at for p, at in cuts.items())

        await until(stored, "what will be deleted is stored", 60)
        log = await self.log(kafka.TRANSACTIONS)
        self.removed = {p: [r for r in log[p] if r.offset < at] for p, at in cuts.items()}
        places = {TopicPartition(self.topic, p): RecordsToDelete(at) for p, at in cuts.items()}
        async with kafka.admin(self.config.kafka) as client:
            await client.delete_records(places)

    async def ends(self) -> dict[int, int]:
        """Return where each partition of the topic ends now."""
        reader = AIOKafkaConsumer(bootstrap_servers=self.servers.kafka.url)
        async with asyncio.timeout(20), reader:
            await reader._client.set_topics([self.topic])
            tps = [TopicPartition(self.topic, p) for p in reader.partitions_for_topic(self.topic)]
            return {tp.partition: end for tp, end in (await reader.end_offsets(tps)).items()}

    async def answer(self) -> bool:
        """Say whether every instance answers."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            urls = [f"http://127.0.0.1:{i.port}/health/live" for i in self.instances]
            asked = await asyncio.gather(*map(client.get, urls), return_exceptions=True)
        return all(isinstance(a, httpx.Response) and a.status_code == 200 for a in asked)

    async def kept(self) -> bool:
        """Say whether no instance holds a decision that its stores have not acknowledged."""
        async with httpx.AsyncClient(timeout=5.0) as client:
            urls = [f"http://127.0.0.1:{i.port}/health" for i in self.instances]
            told = [(await client.get(url)).json()["decisions"] for url in urls]
        return not any(buffer["waiting"] for buffers in told for buffer in buffers.values())

    async def live(self, since_s: float = 0.0) -> bool:
        """Say whether each partition's owner is live and has reached the log's end since then."""
        try:
            async with kafka.admin(self.config.kafka) as client:
                count = await kafka.partition_count(client, self.topic)
            states = await self.online.states()
        except Exception:
            return False
        since_ms = max(since_s, time.time() - 3) * 1000
        return states.keys() == set(range(count)) and all(
            s.state == "live" and s.epoch > self.former and s.caught_up_ms >= since_ms
            for s in states.values()
        )

    async def drained(self) -> bool:
        """Say whether the whole log is stored."""
        if not await self.live():
            return False
        ends, states = await self.ends(), await self.online.states()
        return all(p in states and states[p].offset >= end for p, end in ends.items())


def environment(
    environ: Mapping[str, str], directory: pathlib.Path, *, credit: bool
) -> dict[str, str]:
    """Return the environment that instances are started with."""
    return {
        **environ,
        **SETTINGS,
        "CERBERUS_MODEL": str(directory / "fraud_model.json"),
        "CERBERUS_POLICY": str(settings.POLICY_PATH),
        "CERBERUS_TASKS": "api,consumer,materializer" if credit else "api,consumer",
        "CERBERUS_OPEN": "loopback",
    }


@dataclass(frozen=True, slots=True)
class Setup:
    """What a cluster starts from.

    Attributes:
        users: The users who get a credit score.
        instances: How many instances there are.
        app: The ASGI application that they run.
        credit: Whether fixed credit scores are materialized.
        prepared: Whether topics and tables exist; if not, the first instance makes them.
    """

    users: Sequence[int]
    instances: int = 3
    app: str = APP
    credit: bool = True
    prepared: bool = True


@contextlib.asynccontextmanager
async def opened(
    servers: stack.Stack, environ: Mapping[str, str], directory: pathlib.Path, setup: Setup
) -> AsyncIterator[Cluster]:
    """Prepare topics, tables, model and scores, and yield the cluster with nothing running.

    At the end, every instance that still runs is killed.
    """
    environ = environment(environ, directory, credit=setup.credit)
    site = process.Site(directory, environ, lambda line: None)
    async with contextlib.AsyncExitStack() as exits:
        address = urllib.parse.urlsplit(environ["REDIS_URL"])
        front = exits.enter_context(forwarder.Forwarder(address.port or 6379))
        pair = replica.Pair(front.port, site, front)
        exits.callback(pair.stop)
        netloc = f"127.0.0.1:{front.address}"
        environ = environ | {"REDIS_URL": address._replace(netloc=netloc).geturl()}
        config = settings.load(environ)
        spans = window.Spans.of(config.windows)
        pin_model(config, spans)
        pool = await exits.enter_async_context(postgres_pool.connect(config))
        redis = await exits.enter_async_context(redis_pool.connect(config))
        # Not `assembly.open`: an observer must not be the one that detects a restarted Redis.
        parts = assembly.Service(config, redis, pool)
        await _prepare(parts, setup, directory)
        cluster = Cluster(
            servers=servers,
            config=config,
            spans=spans,
            instances=[
                service.Instance(f"service-{i}", site, environ, setup.app)
                for i in range(setup.instances)
            ],
            online=parts.online,
            redis=redis,
            pool=pool,
            credit=setup.credit,
            pair=pair,
        )
        with contextlib.ExitStack() as undo:
            for instance in cluster.instances:
                undo.callback(instance.kill)
            yield cluster


async def _prepare(parts: assembly.Service, setup: Setup, directory: pathlib.Path) -> None:
    if setup.prepared:
        await parts.postgres.schema.migrate()
        await kafka.create_topics(parts.config)
    if setup.credit:
        scores = [(user_id, credit_score(user_id)) for user_id in setup.users]
        await parts.postgres.credit_scores.seed(scores, datetime.datetime.now(datetime.UTC))
        await asyncio.to_thread(_apply, parts.config, directory)


def pin_model(config: settings.Settings, spans: window.Spans) -> layout.Plan:
    """Train a small model at the path in the settings, and write the feature plan beside it."""
    training.train(
        simulation.Plan(spans=config.windows.spans, events=3_000), config.model.path, lambda _: None
    )
    plan = layout.Plan(
        project=layout.PROJECT,
        ttl_ms={
            declared.WINDOW_VIEW: spans.keep_ms,
            declared.STATS_VIEW: spans.keep_ms,
            declared.CREDIT_VIEW: 30 * 86_400_000,
        },
        schema={
            declared.STATS_VIEW: {
                each.name: each.kind.feast for each in declared.streamed(config.windows.spans)
            }
        },
    )
    config.model.plan_path.write_bytes(plan.pack())
    return plan


def _apply(config: settings.Settings, directory: pathlib.Path) -> None:
    """Apply a copy of the feature definitions, so that the checkout stays unchanged."""
    repo = directory / "feature_repo"
    repo.mkdir(exist_ok=True)
    shutil.copy(feast_store.REPO / "features.py", repo)
    (directory / "cerberus").unlink(missing_ok=True)
    (directory / "cerberus").symlink_to(pathlib.Path(feast_store.__file__).parent.parent)
    feast_store.apply(config, repo)
