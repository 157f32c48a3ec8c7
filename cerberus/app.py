"""The service: HTTP in front, the eternal tasks behind, one process.

`uvicorn cerberus.app:app` is all that production runs.
"""

import asyncio
import contextlib
import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import anyio
from starlette.applications import Starlette

from cerberus import (
    claims,
    consumer,
    decision_log,
    errors,
    feast_layout,
    health,
    kafka,
    label_consumer,
    labels,
    logs,
    materializer,
    online,
    pools,
    producer,
    retention,
    routes,
    scoring,
    settings,
    shutdown,
    stores,
    supervision,
    window,
)

STOP_ORDER = ("producer", "retention", "materializer", "labels", "consumer", "decisions")
_CLOSE_S = 2.0
_CONFIG_STATUS, _STARTUP_FAILURE = 78, 3
Run = Callable[[supervision.Progress], Awaitable[None]]


@contextlib.asynccontextmanager
async def _lifespan(running: Starlette) -> AsyncIterator[None]:
    try:
        config = settings.load(os.environ)
        tls = kafka.client_options(config.kafka).get("ssl_context")
        model = scoring.Model.load(
            config.model.path, config.windows.spans, config.model.policy_path
        )
        spans = window.Spans.of(config.windows)
        topic = config.kafka.topic(kafka.TRANSACTIONS)
        plan = feast_layout.Plan.load(config.model.plan_path)
        redis = pools.connect_redis(config, claims.recognise(config))
        store = online.OnlineStore(redis, plan, spans, topic)
    except (errors.ConfigError, errors.ModelMismatch) as error:
        _refuse_to_start(error)
    logs.configure(config.log_level)
    leaving = shutdown.Exit()
    leaving.watch()
    supervisor = supervision.Supervisor(leaving.request)
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(store.close)
            pool = await pools.connect_postgres(config)
            stack.push_async_callback(_close, pool)
            rules = labels.Rules(config.labels.maturity_ms, config.labels.friendly_fraud_is_fraud)
            # Who answers for them says what they are.
            postgres = stores.on(pool, spans.names, rules if "api" in config.tasks else None)
            claimed = claims.Claims(config, redis, postgres.ledger, lambda: store.spoken)
            kept = decision_log.DecisionLog(config, model, postgres, claimed)
            stack.push_async_callback(kept.close)
            consumed = consumer.Consumer(config, spans, model, store, postgres, claimed)
            labelled = label_consumer.LabelConsumer(config, postgres)
            others = {"labels": labelled.run, "api": kept.run, "consumer": consumed.run}
            for name, run in _tasks(config, others, store, postgres).items():
                supervisor.add(name, run)
            running.state.parts = routes.assemble(
                config,
                spans,
                model,
                store,
                postgres,
                supervisor,
                claimed=claimed,
                kept=kept,
                probes=_probes(config, postgres, tls),
                consumed=consumed if "consumer" in config.tasks else None,
                labelled=labelled,
            )
            # Or a full collection walks all that was imported: 25 ms in which nobody is answered.
            gc.collect()
            gc.freeze()
            async with anyio.create_task_group() as group:
                supervisor.start(group)
                group.start_soon(_stop, supervisor, leaving.asked)
                yield
                leaving.asked.set()
    finally:
        leaving.finish()


def _tasks(
    config: settings.Settings,
    others: Mapping[str, Run],
    store: online.OnlineStore,
    postgres: stores.Stores,
) -> dict[str, Run]:
    every = {
        **others,
        "producer": producer.Producer(config, postgres).run,
        "materializer": materializer.Materializer(config, store, postgres).run,
        "retention": retention.Retention(config, postgres).run,
    }
    names = {"api": "decisions"}
    return {names.get(n, n): run for n, run in every.items() if n in config.tasks}


async def _stop(supervisor: supervision.Supervisor, asked: asyncio.Event) -> None:
    """Drain when asked to end, beside uvicorn, which still waits for its connections."""
    await asked.wait()
    await supervisor.stop(STOP_ORDER)


def _probes(
    config: settings.Settings, postgres: stores.Stores, tls: Any
) -> dict[str, health.Probe]:
    if config.tasks == {"api"}:
        return {}
    return {
        "postgres": postgres.schema.check,
        "kafka": functools.partial(health.reach_kafka, config.kafka, tls),
    }


async def _close(pool: Any) -> None:
    """Close the pool of Postgres; a connection that does not end is cut."""
    try:
        async with asyncio.timeout(_CLOSE_S):
            await pool.close()
    except TimeoutError:
        pool.terminate()


def _refuse_to_start(error: errors.CerberusError) -> NoReturn:
    """End the process with one sentence.

    An exception would not end it: uvicorn takes any in a lifespan, SystemExit too, for an
    application without one, and serves on. Under `--workers` its parent starts a dead worker anew
    for ever, unless that ended with uvicorn's own status of a failed startup.
    """
    sys.stderr.write(f"cerberus: {error}\n")
    sys.stderr.flush()
    os._exit(_STARTUP_FAILURE if multiprocessing.parent_process() else _CONFIG_STATUS)


logs.configure("INFO")  # until the settings say otherwise
app = routes.build(_lifespan)
