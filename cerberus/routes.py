"""The HTTP side: routes, and who passes the gate."""

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from cerberus import (
    claims,
    clock,
    consumer,
    decision_log,
    errors,
    health,
    label_consumer,
    labels,
    lookups,
    metrics,
    online,
    openapi,
    parameters,
    pools,
    problems,
    scoring,
    security,
    serving,
    settings,
    stores,
    supervision,
    window,
)

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
_ROUTES = frozenset((*_OF_API, _ALIVE, _HEALTH, "/metrics"))


@dataclass(frozen=True, slots=True)
class Parts:
    """What answers requests.

    Attributes:
        config: Settings.
        spans: The window definition.
        model: Decides.
        guard: Knows who may call.
        predictor: Answers `POST /predict`.
        lookups: Answers `GET /decisions` and `GET /users`.
        postgres: Takes `POST /labels` and answers `GET /accuracy`.
        health: Answers `GET /health`.
        meter: Answers `GET /metrics`.
        clock: The wall clock in ms since the Unix epoch.
        label_turns: Lets a few requests at a time write labels.
    """

    config: settings.Settings
    spans: window.Spans
    model: scoring.Model
    guard: security.Guard
    predictor: serving.Predictor
    lookups: lookups.Lookups
    postgres: stores.Stores
    health: health.Health
    meter: metrics.Metrics
    clock: Callable[[], int]
    label_turns: pools.Turns


def assemble(
    config: settings.Settings,
    spans: window.Spans,
    model: scoring.Model,
    store: online.OnlineStore,
    postgres: stores.Stores,
    supervisor: supervision.Supervisor,
    *,
    claimed: claims.Claims,
    kept: decision_log.DecisionLog,
    probes: Mapping[str, health.Probe],
    consumed: consumer.Consumer | None = None,
    labelled: label_consumer.LabelConsumer | None = None,
    clock: clock.Clock = clock.now_ms,
) -> Parts:
    """Put together what answers requests.

    Args:
        config: Settings.
        spans: The window definition.
        model: Decides.
        store: Where features are read.
        postgres: Where decisions are looked up and judged, and labels go.
        supervisor: Of the eternal tasks.
        claimed: Says which decision on a transaction was the first.
        kept: Takes the decisions that are answered.
        probes: Of the servers behind, beside Redis, which is always asked.
        consumed: None where this process consumes nothing.
        labelled: None likewise.
        clock: The wall clock in ms since the Unix epoch.
    """
    meter = metrics.Metrics()
    predictor = serving.Predictor(
        config, spans, model, store, claimed, keep=kept.put, meter=meter, clock=clock
    )

    def snapshot() -> metrics.Snapshot:
        tasks = supervisor.status()
        return metrics.Snapshot(
            in_flight=predictor.in_flight,
            records=consumed.counts if consumed else {},
            lag=consumed.lag() if consumed else {},
            decisions={n: (r["waiting"], r["dropped"]) for n, r in kept.report().items()},
            labels=postgres.labels.counts,
            up={name: task.sound for name, task in tasks.items()},
            restarts={name: task.restarts for name, task in tasks.items()},
        )

    meter.snapshot = snapshot
    servers = health.Servers({"redis": store.states, **probes})
    return Parts(
        config=config,
        spans=spans,
        model=model,
        guard=security.Guard(config.serving.api_keys),
        predictor=predictor,
        lookups=lookups.Lookups(config, spans, store, postgres.ledger, clock),
        postgres=postgres,
        health=health.Health(config, model, servers, supervisor, kept, consumed, labelled),
        meter=meter,
        clock=clock,
        label_turns=pools.Turns(2),
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
                parts.meter.request(route if route in _ROUTES else "other", status)


def _admit(parts: Parts | None, scope: Scope) -> None:
    path = scope["path"]
    if path == _ALIVE or (parts is None and path == _HEALTH):
        return
    if parts is None:
        raise problems.Refusal("starting", "The process does not serve yet; try again in a second.")
    parts.guard.check(scope)
    if path.startswith(_OF_API) and "api" not in parts.config.tasks:
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
    parsed = parts.predictor.parse(asked, request.headers.get("traceparent", ""))
    prediction = await parts.predictor.predict(parsed)
    total_ms = (time.perf_counter() - began_s) * 1000
    return _json(serving.public(prediction, total_ms))


async def decision(request: Request) -> Response:
    """Answer `GET /decisions/{decision_id}`."""
    parts: Parts = request.app.state.parts
    asked = parameters.decision_id(request.path_params["decision_id"])
    return _json(await parts.lookups.decision(asked))


async def decisions_of(request: Request) -> Response:
    """Answer `GET /decisions?transaction_id=…` and `GET /decisions?user_id=…`."""
    parts: Parts = request.app.state.parts
    return _json(await parts.lookups.decisions(parameters.decisions(_query(request))))


async def user(request: Request) -> Response:
    """Answer `GET /users/{user_id}`."""
    parts: Parts = request.app.state.parts
    user_id = parameters.user_id(request.path_params["user_id"])
    return _json(await parts.lookups.user(user_id))


async def take_labels(request: Request) -> Response:
    """Answer `POST /labels`."""
    parts: Parts = request.app.state.parts
    asked = await _document(request, '{"labels": […]}', MAX_LABELS_BYTES)
    now_ms = parts.clock()
    told = labels.parse_request(asked, now_ms + parts.config.windows.max_future_skew_ms)
    try:
        valid = [item for item in told if isinstance(item, labels.Label)]
        write = parts.postgres.labels.write
        new = await parts.label_turns.call(pools.QUERY_S, write, valid, now_ms)
    except (TimeoutError, errors.StoreUnavailable, errors.ConfigError) as error:
        log.warning("labels were refused: %r", error)
        raise problems.Refusal(
            "labels_unavailable",
            "Postgres takes no labels now; send all of the request again in a second.",
        ) from error
    parts.postgres.labels.counts["invalid"] += len(told) - len(valid)
    return _json(_became(told, new))


def _became(told: Sequence[labels.Parsed], new: Iterable[bool]) -> dict[str, Any]:
    """Lay out what became of each item of a request; `new` says of the valid ones which are."""
    stored = iter(new)
    results: list[Mapping[str, str]] = [
        {"result": "invalid", "field": item.field, "detail": item.reason}
        if isinstance(item, errors.InvalidTransaction)
        else {"result": "stored" if next(stored) else "known"}
        for item in told
    ]
    count = collections.Counter(result["result"] for result in results)
    return {"results": results, **{name: count[name] for name in ("stored", "known", "invalid")}}


async def judge(request: Request) -> Response:
    """Answer `GET /accuracy`."""
    parts: Parts = request.app.state.parts
    asked = parameters.accuracy(_query(request))
    return _json(await parts.postgres.judged.report(parts.clock(), asked))


def _query(request: Request) -> dict[str, str]:
    asked = request.query_params.multi_items()
    for name, times in collections.Counter(name for name, _ in asked).items():
        if times > 1:
            raise errors.InvalidTransaction(name, "must be given once")
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
    able, told = await parts.health.report(parts.clock(), parts.spans.longest_ms)
    return _json(told, 200 if able else 503)


async def live(request: Request) -> Response:
    """Answer `GET /health/live`: the process answers at all."""
    return _json({"status": "alive"})


async def scrape(request: Request) -> Response:
    """Answer `GET /metrics`."""
    parts: Parts = request.app.state.parts
    return Response(parts.meter.render(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def document(request: Request) -> Response:
    """Answer `GET /openapi.json`."""
    parts: Parts = request.app.state.parts
    return _json(openapi.document(parts.spans.names, parts.config.currency))


async def page(request: Request) -> Response:
    """Answer `GET /docs`."""
    parts: Parts = request.app.state.parts
    shown = openapi.page(openapi.document(parts.spans.names, parts.config.currency))
    policy = {"Content-Security-Policy": openapi.PAGE_POLICY}
    return Response(shown, media_type="text/html", headers=policy)
