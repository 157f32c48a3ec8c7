"""The service: HTTP in front, the eternal tasks behind, one process.

`uvicorn cerberus.app:app` is all that production runs.
"""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

import anyio
from starlette.applications import Starlette

from cerberus import assembly, errors, printable, settings, shutdown, supervision
from cerberus.api import connections, gate, protocol, routes
from cerberus.telemetry import logs

STOP_ORDER = ("producer", "retention", "materializer", "labels", "consumer", "decisions")
_CONFIG_STATUS, _STARTUP_FAILURE = 78, 3


@contextlib.asynccontextmanager
async def _lifespan(running: Starlette) -> AsyncIterator[Mapping[str, Any]]:
    leaving = shutdown.Exit()
    try:
        async with contextlib.AsyncExitStack() as stack:
            service = await _open(stack, leaving)
            leaving.watch()
            stack.callback(_blame, service.supervisor, leaving)
            stack.push_async_callback(service.outbox.close)
            for name, run in service.tasks().items():
                service.supervisor.add(name, run)
            running.state.parts = gate.Parts.of(service)
            _ = service.predictor, service.lookups, service.meter  # before the collector is frozen
            known = connections.Connections(service.config.connections)
            stack.callback(known.close)
            # Otherwise a full collection walks all that was imported: 25 ms without an answer.
            gc.collect()
            gc.freeze()
            async with anyio.create_task_group() as group:
                service.supervisor.start(group)
                group.start_soon(_stop, service.supervisor, leaving.asked)
                yield {"connections": known}
                leaving.asked.set()
    finally:
        leaving.finish()


async def _open(stack: contextlib.AsyncExitStack, leaving: shutdown.Exit) -> assembly.Service:
    try:
        config = settings.load(os.environ)
        settings.check_serving(config)
        opened = assembly.open(config, give_up=leaving.request)
        service = await stack.enter_async_context(opened)
        service.check()
        await service.ask()
    except (errors.ConfigError, errors.ModelMismatch) as error:
        _refuse_to_start(error)
    logs.configure(config.log_level)
    return service


def _blame(supervisor: supervision.Supervisor, leaving: shutdown.Exit) -> None:
    """Exit with status 78 too when a wrong setting becomes known only after the start."""
    if supervisor.misconfigured is not None:
        leaving.status = _CONFIG_STATUS
        sys.stderr.write(f"cerberus: {supervisor.misconfigured}\n")


async def _stop(supervisor: supervision.Supervisor, asked: asyncio.Event) -> None:
    """Stop the tasks when asked, while uvicorn still waits for its connections."""
    await asked.wait()
    await supervisor.stop(STOP_ORDER)


def _refuse_to_start(error: errors.CerberusError) -> NoReturn:
    """End the process with one sentence.

    An exception would not end it: uvicorn takes any exception in a lifespan, SystemExit too, as an
    application without one, and serves on. Under `--workers` its parent restarts a dead worker for
    ever, unless the worker ended with uvicorn's own status of a failed startup.
    """
    sys.stderr.write(printable.escaped(f"cerberus: {error}") + "\n")
    sys.stderr.flush()
    os._exit(_STARTUP_FAILURE if multiprocessing.parent_process() else _CONFIG_STATUS)


logs.configure("INFO")  # until the settings say otherwise
protocol.install()
app = routes.build(_lifespan)
