"""A consumer in the test's own loop, on real servers, and what the test knows of its log."""

import asyncio
import collections
import contextlib
import time

import oracle
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from changes import changed, rebuilt

from cerberus import assembly, clock, kafka, settings, supervision, transactions, window
from cerberus.api import gate, routes
from cerberus.features import declared, evaluation
from cerberus.learning import simulation, training
from cerberus.online import layout
from cerberus.serving import predictor
from cerberus.telemetry import metrics

now_ms = clock.now_ms


def payment(i, user_id, at_ms, amount=10.0, **more):
    """Return the bytes of one transaction."""
    return orjson.dumps(
        {
            "transaction_id": f"t{i}",
            "user_id": user_id,
            "amount": amount,
            "timestamp": transactions.format_ms(at_ms),
        }
        | more
    )


class World:
    """The stores of one test, shared by any number of consumers."""

    def __init__(self, service, producer):
        self.service = service
        self.config = service.config
        self.spans = service.spans
        self.model = service.model
        self.online = service.online
        self.postgres = service.postgres
        self.redis = service.redis
        self.pool = service.pool
        self.kafka = producer

    def another(self, config=None, clock=clock.now_ms, **parts):
        """Return the parts of one more process on these stores, with some settings or parts."""
        shared = {"model": self.model, "online": self.online, "postgres": self.postgres}
        fields = {"config": config or self.config, "clock": clock}
        return rebuilt(self.service, shared | parts, **fields)

    def claims(self, config):
        return self.another(config).claims

    def consumer(self):
        return self.another().consumer

    def predictor(self, keep):
        return predictor.Predictor(self.another().sources, keep=keep, meter=metrics.Metrics())

    def decision_log(self, **changes):
        """Build the log of decisions on requests, with some settings changed."""
        return self.another(changed(self.config, **changes)).outbox

    def app(self, kept, probes=None, consumed=None, clock=clock.now_ms):
        """Build the routes on these stores; `kept` takes the decisions."""
        built = routes.build()
        parts = {"outbox": kept} | ({"consumer": consumed} if consumed else {})
        built.state.parts = gate.Parts.of(self.another(clock=clock, **parts), probes or {})
        return built

    async def publish(self, records, partition=None):
        """Send (user id, value, timestamp ms) in order."""
        topic = self.config.kafka.topic(kafka.TRANSACTIONS)
        sent = [
            await self.kafka.send(
                topic, value, key=transactions.key(user), timestamp_ms=at, partition=partition
            )
            for user, value, at in records
        ]
        await asyncio.gather(*sent)

    async def read(self, user_id, as_of_ms, in_hand=None):
        """Evaluate a user's row as a request does."""
        [row] = await self.online.read([user_id], now_ms(), 1.0)
        return evaluation.as_of(
            row,
            as_of_ms,
            in_hand,
            now_ms=now_ms(),
            rules=evaluation.Rules(self.spans, self.config.windows.max_staleness_ms),
        )

    async def certain(self, user_id, as_of_ms):
        """Evaluate a user's row once nothing about it is in doubt: a busy machine may be late."""

        async def row():
            found = await self.read(user_id, as_of_ms)
            return found if found.degraded == () else None

        return await until(row, f"user {user_id} is read without a doubt")

    async def log(self, topic=kafka.TRANSACTIONS):
        """Read a whole topic back, partition by partition, into oracles."""
        name = self.config.kafka.topic(topic)
        reader = AIOKafkaConsumer(
            bootstrap_servers=self.config.kafka.bootstrap, auto_offset_reset="earliest"
        )
        await reader.start()
        try:
            await reader._client.set_topics([name])
            tps = [TopicPartition(name, p) for p in sorted(reader.partitions_for_topic(name))]
            reader.assign(tps)
            ends = await reader.end_offsets(tps)
            found = {tp.partition: [] for tp in tps}
            while any([await reader.position(tp) < ends[tp] for tp in tps]):
                for tp, records in (await reader.getmany(timeout_ms=200)).items():
                    found[tp.partition] += records
            return found
        finally:
            await reader.stop()

    async def published(self):
        """Return what topic `decisions` shows, by the decisions' names."""
        shown = collections.defaultdict(list)
        for records in (await self.log(kafka.DECISIONS)).values():
            for record in records:
                told = orjson.loads(record.value)
                shown[told["decision_id"]].append(told)
        return shown

    async def oracles(self):
        """Return the oracle of each partition, over all that was published."""
        told = {}
        for number, records in (await self.log()).items():
            told[number] = oracle.Partition(
                self.spans.longest_ms, self.spans.slack_ms, self.spans.max_future_skew_ms
            )
            for record in records:
                told[number].add(record.offset, record.timestamp, record.value)
        return told


def trained(environ, directory, spans):
    """Train a small model of these windows, and add to the settings that it decides."""
    model_path = directory / "fraud_model.json"
    training.train(simulation.Plan(spans=spans, events=3_000), model_path, lambda line: None)
    keep_ms = window.Spans(spans).keep_ms
    views = {"user_window": keep_ms, "user_transaction_stats": keep_ms, "user_credit": 0}
    schema = {declared.STATS_VIEW: dict.fromkeys(declared.names(declared.streamed(spans)), "")}
    plan = layout.Plan("cerberus", views, schema)
    (directory / "feature_plan.json").write_bytes(plan.pack())
    return environ | {"CERBERUS_SPANS": ",".join(spans), "CERBERUS_MODEL": str(model_path)}


@contextlib.asynccontextmanager
async def world(environ):
    """Open pools and a producer of the test's own."""
    config = settings.load(environ)
    await kafka.create_topics(config)
    producer = AIOKafkaProducer(
        bootstrap_servers=config.kafka.bootstrap, enable_idempotence=True, linger_ms=2
    )
    await producer.start()
    try:
        async with assembly.open(config) as service:
            await service.postgres.schema.migrate()
            yield World(service, producer)
    finally:
        await producer.stop()


@contextlib.asynccontextmanager
async def running(task):
    """Run an eternal task, without a supervisor: its failure is the test's, unless it was cut."""
    progress = supervision.Progress(time.monotonic)
    running = asyncio.create_task(task.run(progress))
    try:
        yield running
    finally:
        progress.stopping.set()
        async with asyncio.timeout(30):
            await asyncio.wait([running])
        if not running.cancelled():
            running.result()


async def until(condition, what, seconds=60):
    """Wait for a condition, sync or async, and say what did not come true."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                found = condition()
                if asyncio.iscoroutine(found):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None


def live(*consumers, partitions):
    """Say whether the consumers together own all partitions, live and caught up."""
    return _live([s for c in consumers for s in c.states().values()], partitions)


async def shown(here, partitions):
    """Say whether readers are told so, too, which is a moment after the owners know it."""
    return _live((await here.online.states()).values(), partitions)


def _live(states, partitions):
    return len(states) == partitions and all(
        s.state == "live" and now_ms() - s.caught_up_ms < 3_000 for s in states
    )
