"""The routes: each reads a request, asks a part, and lays out the answer."""

import asyncio
import collections
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from cerberus import assembly, errors, labels, printable
from cerberus.api import bodies, gate, openapi, pages, parameters, problems
from cerberus.serving import predictor
from cerberus.telemetry import logs, metrics

LABELS_S = 5.0
"""How long a request may wait for its labels to be stored."""
_said = logs.Repeated(logging.getLogger(__name__))

_SLICE = 200  # labels: half a millisecond


def build(lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Build the HTTP side; it answers "starting" until `state.parts` holds the parts."""
    built = Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/decisions", decisions_of),
            Route("/decisions/{decision_id}", decision),
            Route("/users/{user_id}", user),
            Route("/users/{user_id}/decisions", decisions_of_user),
            Route("/labels", take_labels, methods=["POST"]),
            Route("/accuracy", judge),
            Route(gate.HEALTH, report),
            Route(gate.ALIVE, live),
            Route("/metrics", scrape),
            Route("/openapi.json", document),
            Route(pages.PATH, page),
            Route(f"{pages.PATH}/{{file}}", page_file),
        ],
        middleware=[Middleware(gate.Gate)],
        exception_handlers=problems.HANDLERS,
        lifespan=lifespan,
    )
    built.router.redirect_slashes = False
    built.state.parts = None
    return built


def _json(told: Any, status: int = 200) -> Response:
    return Response(printable.dumps(told), status_code=status, media_type="application/json")


async def predict(request: Request) -> Response:
    """Answer `POST /predict`."""
    began_s = time.perf_counter()
    parts: gate.Parts = request.app.state.parts
    parts.service.predictor.check()
    asked = await bodies.document(request, '{"user_id": 1005}')
    traced = request.headers.getlist("traceparent")
    # With two headers, nobody knows which is the caller's.
    parsed = parts.service.predictor.parse(asked, traced[0] if len(traced) == 1 else "")
    prediction = await parts.service.predictor.predict(parsed)
    total_ms = (time.perf_counter() - began_s) * 1000
    return _json(predictor.public(prediction, total_ms))


async def decision(request: Request) -> Response:
    """Answer `GET /decisions/{decision_id}`."""
    parts: gate.Parts = request.app.state.parts
    asked = parameters.decision_id(request.path_params["decision_id"])
    return _json(await parts.service.lookups.decision(asked))


async def decisions_of(request: Request) -> Response:
    """Answer `GET /decisions?transaction_id=…` and `GET /decisions?user_id=…`."""
    parts: gate.Parts = request.app.state.parts
    return _json(await parts.service.lookups.decisions(parameters.decisions(_query(request))))


async def decisions_of_user(request: Request) -> Response:
    """Answer `GET /users/{user_id}/decisions`."""
    parts: gate.Parts = request.app.state.parts
    asked = parameters.decisions_of_user(request.path_params["user_id"], _query(request))
    return _json(await parts.service.lookups.decisions(asked))


async def user(request: Request) -> Response:
    """Answer `GET /users/{user_id}`."""
    parts: gate.Parts = request.app.state.parts
    user_id = parameters.user_id(request.path_params["user_id"])
    return _json(await parts.service.lookups.user(user_id))


async def take_labels(request: Request) -> Response:
    """Answer `POST /labels`."""
    parts: gate.Parts = request.app.state.parts
    parts.label_turns.check()
    asked = await bodies.document(request, '{"labels": […]}', bodies.MAX_LABELS_BYTES)
    parts.label_turns.check()
    now_ms = parts.service.clock()
    told = await _parse(asked, now_ms + parts.service.config.windows.max_future_skew_ms)
    try:
        valid = [item for item in told if isinstance(item, labels.Label)]
        write = parts.service.postgres.labels.write
        new = await parts.label_turns.call(LABELS_S, write, valid, now_ms)
    except (TimeoutError, errors.StoreUnavailable, errors.ConfigError) as error:
        _said.warn(f"labels were refused: {type(error).__name__}: {error}", "labels_refused")
        raise problems.Refusal(
            "labels_unavailable",
            "Postgres takes no labels now; send the whole request again in a second.",
        ) from error
    stored = iter(new)
    became = [item if isinstance(item, errors.InvalidInput) else next(stored) for item in told]
    refused = [item for item in became if isinstance(item, errors.InvalidInput)]
    parts.service.postgres.labels.counts["invalid"] += len(refused)
    if refused and "labels" not in asked:
        raise refused[0]
    return _json(_laid_out(became))


async def _parse(asked: Mapping[str, Any], latest_ms: int) -> list[labels.Parsed]:
    """Parse labels in slices: a thousand at once would block the loop for milliseconds."""
    items = asked.get("labels")
    if not isinstance(items, list) or not _SLICE < len(items) <= labels.MAX_ITEMS:
        return labels.parse_request(asked, latest_ms)
    told: list[labels.Parsed] = []
    for start in range(0, len(items), _SLICE):
        told += labels.parse_request({"labels": items[start : start + _SLICE]}, latest_ms)
        await asyncio.sleep(0)
    return told


def _laid_out(became: Iterable[bool | errors.InvalidInput]) -> dict[str, Any]:
    """Lay out the result of each item: whether it is new, or why it is invalid."""
    results: list[Mapping[str, str]] = [
        {"result": "invalid", "field": item.field, "detail": item.reason}
        if isinstance(item, errors.InvalidInput)
        else {"result": "stored" if item else "known"}
        for item in became
    ]
    count = collections.Counter(result["result"] for result in results)
    return {"results": results, **{name: count[name] for name in ("stored", "known", "invalid")}}


async def judge(request: Request) -> Response:
    """Answer `GET /accuracy`."""
    parts: gate.Parts = request.app.state.parts
    asked = parameters.accuracy(_query(request))
    return _json(await parts.service.postgres.judged.report(parts.service.clock(), asked))


def _query(request: Request) -> dict[str, str]:
    asked = request.query_params.multi_items()
    for name, times in collections.Counter(name for name, _ in asked).items():
        if times > 1:
            raise errors.InvalidInput(name, "must be given once")
    return dict(asked)


async def report(request: Request) -> Response:
    """Answer `GET /health`: 503 while starting, without features, or after giving up."""
    parts: gate.Parts | None = request.app.state.parts
    if parts is None:
        return _json({"status": "starting", "reasons": ["the process is not serving yet"]}, 503)
    able, told = await parts.health.report(parts.service.clock(), parts.service.spans.longest_ms)
    return _json(told, 200 if able else 503)


async def live(request: Request) -> Response:
    """Answer `GET /health/live`: the process answers at all."""
    return _json({"status": "alive"})


async def scrape(request: Request) -> Response:
    """Answer `GET /metrics`."""
    parts: gate.Parts = request.app.state.parts
    return Response(parts.service.meter.render(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def document(request: Request) -> Response:
    """Answer `GET /openapi.json`."""
    service: assembly.Service = request.app.state.parts.service
    keyed = bool(service.config.serving.api_keys)
    return _json(openapi.document(service.spans.names, service.config.currency, keyed=keyed))


async def page(request: Request) -> Response:
    """Answer `GET /docs`."""
    return pages.page()


async def page_file(request: Request) -> Response:
    """Answer `GET /docs/{file}`."""
    return await pages.file(request.path_params["file"], request.scope)
