"""The HTTP side: routes, and who passes the gate."""

import asyncio
import collections
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from cerberus import assembly, errors, labels, supervision
from cerberus.api import access, health, openapi, parameters, problems
from cerberus.postgres import pool as postgres_pool
from cerberus.serving import predictor
from cerberus.telemetry import metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES, MAX_LABELS_BYTES = 64 * 1024, 1024 * 1024
_BODY_S = 10.0
_ALIVE, _HEALTH = "/health/live", "/health"
_OF_API = (
    "/predict",
    "/decisions",
    "/users",
    "/labels",
    "/accuracy",
    "/openapi.json",
    "/docs",
)
_Probes = Mapping[str, health.Probe]
_ROUTES = frozenset((*_OF_API, _ALIVE, _HEALTH, "/metrics"))


@dataclass(frozen=True, slots=True)
class Parts:
    """What answers requests.

    Attributes:
        service: The parts behind.
        guard: Knows who may call.
        health: Answers `GET /health`.
        label_turns: Lets a few requests at a time write labels.
    """

    service: assembly.Service
    guard: access.Guard
    health: health.Health
    label_turns: postgres_pool.Turns

    @classmethod
    def of(cls, service: assembly.Service, probes: _Probes | None = None) -> "Parts":
        """Put the HTTP side before a service.

        Args:
            service: The parts behind.
            probes: Of the servers beside Redis, which is always asked; None asks what it needs.
        """
        asked = health.probes(service) if probes is None else probes
        servers = health.Servers({"redis": service.online.states, **asked})
        return cls(
            service=service,
            guard=access.Guard(service.config.serving.api_keys),
            health=health.Health(service, servers),
            label_turns=postgres_pool.Turns(2),
        )


def build(lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Build the HTTP side; it answers "starting" until `state.parts` holds the parts."""
    built = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/decisions", decisions_of),
            Route("/decisions/{decision_id}", decision),
            Route("/users/{user_id}", user),
            Route("/labels", take_labels, methods=["POST"]),
            Route("/accuracy", judge),
            Route(_HEALTH, report),
            Route(_ALIVE, live),
            Route("/metrics", scrape),
            Route("/openapi.json", document),
            Route("/docs", page),
        ],
        middleware=[Middleware(_Gate)],
        exception_handlers=problems.HANDLERS,
        lifespan=lifespan,
    )
    built.router.redirect_slashes = False
    built.state.parts = None
    return built


class _Gate:
    """What every request passes: is the service started, may the caller, what became of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            await send(message)

        try:
            try:
                _admit(parts, scope)
            except errors.CerberusError as error:
                refusal = await problems.refuse(Request(scope), error)
                await refusal(scope, receive, note)
            else:
                await self._app(scope, receive, note)
        finally:
            if parts is not None:
                route = path if path in _ROUTES else f"/{path.split('/')[1]}"
                parts.service.meter.request(route if route in _ROUTES else "other", status)


def _admit(parts: Parts | None, scope: Scope) -> None:
    path = scope["path"]
    if path == _ALIVE or (parts is None and path == _HEALTH):
        return
    if parts is None:
        raise problems.Refusal("starting", "The process does not serve yet; try again in a second.")
    parts.guard.check(scope)
    if path.startswith(_OF_API) and "api" not in parts.service.config.tasks:
        raise problems.Refusal(
            "api_disabled", "CERBERUS_TASKS of this process does not name api; ask another."
        )


def _json(told: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(told), status_code=status, media_type="application/json")


async def predict(request: Request) -> Response:
    """Answer `POST /predict`."""
    began_s = time.perf_counter()
    parts: Parts = request.app.state.parts
    asked = await _document(request, '{"user_id": 1005}')
    parsed = parts.service.predictor.parse(asked, request.headers.get("traceparent", ""))
    prediction = await parts.service.predictor.predict(parsed)
    total_ms = (time.perf_counter() - began_s) * 1000
    return _json(predictor.public(prediction, total_ms))


async def decision(request: Request) -> Response:
    """Answer `GET /decisions/{decision_id}`."""
    parts: Parts = request.app.state.parts
    asked = parameters.decision_id(request.path_params["decision_id"])
    return _json(await parts.service.lookups.decision(asked))


async def decisions_of(request: Request) -> Response:
    """Answer `GET /decisions?transaction_id=…` and `GET /decisions?user_id=…`."""
    parts: Parts = request.app.state.parts
    return _json(await parts.service.lookups.decisions(parameters.decisions(_query(request))))


async def user(request: Request) -> Response:
    """Answer `GET /users/{user_id}`."""
    parts: Parts = request.app.state.parts
    user_id = parameters.user_id(request.path_params["user_id"])
    return _json(await parts.service.lookups.user(user_id))


async def take_labels(request: Request) -> Response:
    """Answer `POST /labels`."""
    parts: Parts = request.app.state.parts
    asked = await _document(request, '{"labels": […]}', MAX_LABELS_BYTES)
    now_ms = parts.service.clock()
    told = labels.parse_request(asked, now_ms + parts.service.config.windows.max_future_skew_ms)
    try:
        valid = [item for item in told if isinstance(item, labels.Label)]
        write = parts.service.postgres.labels.write
        new = await parts.label_turns.call(postgres_pool.QUERY_S, write, valid, now_ms)
    except (TimeoutError, errors.StoreUnavailable, errors.ConfigError) as error:
        log.warning("labels were refused: %r", error)
        raise problems.Refusal(
            "labels_unavailable",
            "Postgres takes no labels now; send all of the request again in a second.",
        ) from error
    parts.service.postgres.labels.counts["invalid"] += len(told) - len(valid)
    return _json(_became(told, new))


def _became(told: Sequence[labels.Parsed], new: Iterable[bool]) -> dict[str, Any]:
    """Lay out what became of each item of a request; `new` says of the valid ones which are."""
    stored = iter(new)
    results: list[Mapping[str, str]] = [
        {"result": "invalid", "field": item.field, "detail": item.reason}
        if isinstance(item, errors.InvalidInput)
        else {"result": "stored" if next(stored) else "known"}
        for item in told
    ]
    count = collections.Counter(result["result"] for result in results)
    return {"results": results, **{name: count[name] for name in ("stored", "known", "invalid")}}


async def judge(request: Request) -> Response:
    """Answer `GET /accuracy`."""
    parts: Parts = request.app.state.parts
    asked = parameters.accuracy(_query(request))
    return _json(await parts.service.postgres.judged.report(parts.service.clock(), asked))


def _query(request: Request) -> dict[str, str]:
    asked = request.query_params.multi_items()
    for name, times in collections.Counter(name for name, _ in asked).items():
        if times > 1:
            raise errors.InvalidInput(name, "must be given once")
    return dict(asked)


async def _document(
    request: Request, example: str, most_bytes: int = MAX_BODY_BYTES
) -> dict[str, Any]:
    try:
        asked = orjson.loads(await _body(request, most_bytes))
    except orjson.JSONDecodeError as error:
        raise problems.Refusal("not_json", f"The body is not JSON: {error}.") from error
    if not isinstance(asked, dict):
        raise problems.Refusal("not_json", f"The body must be a JSON object such as {example}.")
    return asked


async def _body(request: Request, most_bytes: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise problems.Refusal(
                        "too_large", f"The body has more than {most_bytes} bytes."
                    )
    except TimeoutError as error:
        raise problems.Refusal(
            "body_timeout", f"No whole body came within {_BODY_S:g} s."
        ) from error
    return bytes(body)


async def report(request: Request) -> Response:
    """Answer `GET /health`: 503 while starting, without features, or after giving up."""
    parts: Parts | None = request.app.state.parts
    if parts is None:
        return _json({"status": "starting", "reasons": ["the process does not serve yet"]}, 503)
    able, told = await parts.health.report(parts.service.clock(), parts.service.spans.longest_ms)
    return _json(told, 200 if able else 503)


async def live(request: Request) -> Response:
    """Answer `GET /health/live`: the process answers at all."""
    return _json({"status": "alive"})


async def scrape(request: Request) -> Response:
    """Answer `GET /metrics`."""
    parts: Parts = request.app.state.parts
    return Response(parts.service.meter.render(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def document(request: Request) -> Response:
    """Answer `GET /openapi.json`."""
    parts: Parts = request.app.state.parts
    return _json(openapi.document(parts.service.spans.names, parts.service.config.currency))


async def page(request: Request) -> Response:
    """Answer `GET /docs`."""
    parts: Parts = request.app.state.parts
    shown = openapi.page(openapi.document(parts.service.spans.names, parts.service.config.currency))
    policy = {"Content-Security-Policy": openapi.PAGE_POLICY}
    return Response(shown, media_type="text/html", headers=policy)
