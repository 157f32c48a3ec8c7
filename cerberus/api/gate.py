"""Who passes: the service has started, the caller may call, and this process runs what it asks."""

import asyncio
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cerberus import assembly, errors, supervision
from cerberus.api import access, health, pages, problems
from cerberus.postgres import pool as postgres_pool

ALIVE, HEALTH = "/health/live", "/health"
OF_API = ("/predict", "/decisions", "/users", "/labels", "/accuracy", "/openapi.json", "/docs")
"""What only a process with the task `api` serves."""
_Probes = Mapping[str, health.Probe]
_ROUTES = frozenset((*OF_API, ALIVE, HEALTH, "/metrics"))


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that answer requests after the gate.

    Attributes:
        service: The parts behind the HTTP side.
        guard: Checks who may call.
        health: Answers `GET /health`.
        label_turns: Limits how many requests write labels at once.
        parsing: Held while a large body is parsed, so that other tasks run in between.
    """

    service: assembly.Service
    guard: access.Guard
    health: health.Health
    label_turns: postgres_pool.Turns
    parsing: asyncio.Semaphore

    @classmethod
    def of(cls, service: assembly.Service, probes: _Probes | None = None) -> "Parts":
        """Put the HTTP side in front of a service.

        Args:
            service: The parts behind the HTTP side.
            probes: Ask the servers other than Redis, which is always asked; None asks all that
                the process needs.
        """
        asked = health.probes(service) if probes is None else probes
        prove = functools.partial(service.online.prove, clustered=service.config.redis.cluster)
        servers = health.Servers({"redis": prove, **asked})
        return cls(
            service=service,
            guard=access.Guard(service.config.serving),
            health=health.Health(service, servers),
            label_turns=postgres_pool.Turns(2),
            parsing=asyncio.Semaphore(1),
        )


class Gate:
    """Middleware that refuses what may not pass, and counts every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        supervision.current_task.set("api")
        parts: Parts | None = scope["app"].state.parts
        path = scope["path"]
        status = 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *access.HEADERS]
            await send(message)

        try:
            try:
                _admit(parts, scope)
            except errors.CerberusError as error:
                refusal = await _refuse(Request(scope), error)
                await refusal(scope, receive, note)
            else:
                await self._app(scope, receive, note)
        finally:
            if parts is not None:
                # The path may be `*`, or empty.
                route = path if path in _ROUTES else f"/{path[1:].partition('/')[0]}"
                parts.service.meter.request(route if route in _ROUTES else "other", status)


async def _refuse(request: Request, error: errors.CerberusError) -> Response:
    asks_for_a_page = "text/html" in request.headers.get("accept", "")
    if isinstance(error, errors.Unauthorized) and request.url.path == pages.PATH:
        if asks_for_a_page and request.method == "GET":
            return pages.page(401)
    return await problems.refuse(request, error)


def _admit(parts: Parts | None, scope: Scope) -> None:
    path = scope["path"]
    if path == ALIVE or (parts is None and path == HEALTH):
        return
    if parts is None:
        raise problems.Refusal("starting", "The process is not serving yet; try again in a second.")
    parts.guard.check(scope)
    if path.startswith(OF_API) and "api" not in parts.service.config.tasks:
        raise problems.Refusal(
            "api_disabled",
            "CERBERUS_TASKS of this process does not include api; ask a process that runs it.",
        )
