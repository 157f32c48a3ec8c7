"""The parts of one process, and the only place that puts them together."""

import asyncio
import contextlib
import dataclasses
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cerberus import (
    brokers,
    claims,
    clock,
    consumer,
    errors,
    kafka,
    labels,
    producer,
    settings,
    supervision,
    window,
)
from cerberus.decisions import models
from cerberus.jobs import materializer, retention
from cerberus.online import layout, user_rows
from cerberus.online import pool as redis_pool
from cerberus.postgres import pool as postgres_pool
from cerberus.postgres import stores
from cerberus.serving import lookups
from cerberus.serving import outbox as decision_outbox
from cerberus.serving import predictor as serving_predictor
from cerberus.stream import dependencies, label_topic
from cerberus.telemetry import metrics

Run = Callable[[supervision.Progress], Awaitable[None]]
_CLOSE_S, _ASK_S = 2.0, 5.0
_MAKES_TABLES = frozenset({"consumer", "producer", "materializer", "retention"})


def _nobody(reason: str) -> None:
    """Ignore that a task was given up."""


@dataclass(frozen=True, eq=False)  # without slots, so that it can keep its parts
class Service:
    """The parts of a process; each is built on first use, together with the parts that it needs.

    No part contacts a server before it is used, and a command builds only the parts it needs.

    Attributes:
        config: Settings.
        redis: The shared pool.
        pool: The shared pool of Postgres.
        clock: The wall clock in ms since the Unix epoch, of every part.
        give_up: Called with the reason when a task cannot be kept alive.
    """

    config: settings.Settings
    redis: Any
    pool: Any
    clock: Callable[[], int] = clock.now_ms
    give_up: Callable[[str], None] = _nobody

    def check(self) -> None:
        """Build the parts that fail if a setting or a file in `models/` is wrong.

        Raises:
            ConfigError: A certificate cannot be read.
            ModelMismatch: The model, its policy or the feature plan does not fit these settings.
        """
        _ = self.tls, self.model, self.online

    async def ask(self) -> None:
        """Ask the servers whether they accept this process; a silent one is no error.

        Raises:
            ConfigError: One answers and refuses an address, a password or a permission.

        Deadline: 5 s.
        """
        asking = [asyncio.ensure_future(each) for each in self._questions()]
        _, waiting = await asyncio.wait(asking, timeout=_ASK_S)
        for each in waiting:
            each.cancel()
        for answer in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(answer, errors.ConfigError):
                raise answer

    def _questions(self) -> Iterator[Awaitable[None]]:
        yield redis_pool.check(self.config)
        yield self.postgres.schema.check(makes_tables=bool(_MAKES_TABLES & self.config.tasks))
        yield brokers.check(kafka.client_options(self.config.kafka))

    @functools.cached_property
    def spans(self) -> window.Spans:
        """The window definition."""
        return window.Spans.of(self.config.windows)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext | None:
        """How to trust the brokers; None without TLS."""
        context: ssl.SSLContext | None = kafka.client_options(self.config.kafka).get("ssl_context")
        return context

    @functools.cached_property
    def model(self) -> models.Model:
        """The model and its policy."""
        model = self.config.model
        return models.Model.load(model.path, self.spans.names, model.policy_path)

    @functools.cached_property
    def online(self) -> user_rows.OnlineStore:
        """The rows that decisions are made from, in Redis."""
        plan = layout.Plan.load(self.config.model.plan_path)
        topic = self.config.kafka.topic(kafka.TRANSACTIONS)
        return user_rows.OnlineStore(self.redis, plan, self.spans, topic, self.clock)

    @functools.cached_property
    def postgres(self) -> stores.Stores:
        """Facts, history, decisions and labels, in Postgres."""
        rules = labels.Rules(
            self.config.labels.maturity_ms, self.config.labels.friendly_fraud_is_fraud
        )
        # Only a process with `api` sets the rules that the views use.
        answers = "api" in self.config.tasks
        return stores.on(self.pool, self.spans.names, rules if answers else None)

    @functools.cached_property
    def claims(self) -> claims.Claims:
        """What knows which decision on a transaction came first."""
        return claims.Claims(
            self.config,
            self.redis,
            self.postgres.ledger,
            lambda: self.online.spoken,
            self.clock,
        )

    @functools.cached_property
    def outbox(self) -> decision_outbox.DecisionLog:
        """Decisions on requests, on their way to the stores; close it before the pools."""
        return decision_outbox.DecisionLog(self.config, self.model, self.postgres, self.claims)

    @functools.cached_property
    def sources(self) -> serving_predictor.Sources:
        """What predictions are made from."""
        return serving_predictor.Sources(
            self.config, self.spans, self.model, self.online, self.claims
        )

    @functools.cached_property
    def predictor(self) -> serving_predictor.Predictor:
        """What answers requests."""
        return serving_predictor.Predictor(
            self.sources, keep=self.outbox.put, meter=self.meter, clock=self.clock
        )

    @functools.cached_property
    def lookups(self) -> lookups.Lookups:
        """What answers questions about decisions and users."""
        ledger = self.postgres.ledger
        return lookups.Lookups(self.config, self.spans, self.online, ledger, self.clock)

    @functools.cached_property
    def consumer(self) -> consumer.Consumer:
        """The windowing task."""
        return consumer.Consumer(
            dependencies.Dependencies(
                self.config,
                self.spans,
                self.model,
                self.online,
                self.postgres,
                self.claims,
                self.clock,
            )
        )

    @functools.cached_property
    def label_consumer(self) -> label_topic.LabelConsumer:
        """The task that reads labels from their topic."""
        return label_topic.LabelConsumer(self.config, self.postgres, self.clock)

    @functools.cached_property
    def producer(self) -> producer.Producer:
        """The synthetic population's task."""
        return producer.Producer(self.config, self.postgres, self.clock)

    @functools.cached_property
    def materializer(self) -> materializer.Materializer:
        """The task that refreshes the batch views."""
        return materializer.Materializer(self.config, self.online, self.postgres)

    @functools.cached_property
    def retention(self) -> retention.Retention:
        """The task that keeps the tables in order."""
        return retention.Retention(self.config, self.postgres)

    @functools.cached_property
    def supervisor(self) -> supervision.Supervisor:
        """What keeps the tasks alive."""
        return supervision.Supervisor(self.give_up)

    @functools.cached_property
    def meter(self) -> metrics.Metrics:
        """The counters, and the parts' own counts at each scrape."""
        meter = metrics.Metrics()
        meter.snapshot = self._snapshot
        return meter

    def tasks(self) -> dict[str, Run]:
        """Return the tasks that the settings name, by their names in the supervisor."""
        named: dict[str, Callable[[], tuple[str, Run]]] = {
            "labels": lambda: ("labels", self.label_consumer.run),
            "api": lambda: ("decisions", self.outbox.run),
            "consumer": lambda: ("consumer", self.consumer.run),
            "producer": lambda: ("producer", self.producer.run),
            "materializer": lambda: ("materializer", self.materializer.run),
            "retention": lambda: ("retention", self.retention.run),
        }
        return dict(make() for name, make in named.items() if name in self.config.tasks)

    def _snapshot(self) -> metrics.Snapshot:
        consumes = "consumer" in self.config.tasks
        tasks = self.supervisor.status()
        return metrics.Snapshot(
            in_flight=self.predictor.in_flight,
            records=self.consumer.counts if consumes else {},
            lag=self.consumer.lag() if consumes else {},
            decisions={n: (r["waiting"], r["dropped"]) for n, r in self.outbox.report().items()},
            labels=self.postgres.labels.counts,
            up={name: task.sound for name, task in tasks.items()},
            restarts={name: task.restarts for name, task in tasks.items()},
        )


def check_files(config: settings.Settings) -> None:
    """Read the certificate files that the addresses name, before the pools do.

    Raises:
        ConfigError: One cannot be read.
    """
    config.postgres.address.tls()
    config.redis.address.check_files()
    kafka.client_options(config.kafka)


def for_command(config: settings.Settings) -> contextlib.AbstractAsyncContextManager[Service]:
    """Open the parts for a command, which runs no task and does not store the label rules."""
    return open(dataclasses.replace(config, tasks=frozenset()), onlooker=True)


@contextlib.asynccontextmanager
async def open(
    config: settings.Settings,
    *,
    clock: clock.Clock = clock.now_ms,
    give_up: Callable[[str], None] = _nobody,
    onlooker: bool = False,
) -> AsyncIterator[Service]:
    """Open the pools and yield the parts on them; at the end the pools are closed, within bounds.

    Args:
        config: Settings.
        clock: The wall clock in ms since the Unix epoch, of every part.
        give_up: Called with the reason when a task cannot be kept alive.
        onlooker: Whether to leave it to others to mark in Redis that its server has restarted: the
            mark is the time of this machine's clock.

    Raises:
        ConfigError: The address of Redis has a parameter that the client does not know.
    """
    redis = redis_pool.connect(config, None if onlooker else claims.recognise(config, clock))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(redis.aclose)
        pool = await postgres_pool.connect(config)
        stack.push_async_callback(postgres_pool.close, pool, _CLOSE_S)
        yield Service(config, redis, pool, clock, give_up)
