"""Errors over HTTP: each is answered as a problem of RFC 9457, with its code from `codes`."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from cerberus import errors, printable
from cerberus.api import access, codes
from cerberus.telemetry import logs

_said = logs.Repeated(logging.getLogger(__name__))

_CODES: Mapping[type[Exception], str] = {
    errors.InvalidInput: "invalid",
    errors.Unauthorized: "unauthorized",
    access.Forbidden: "forbidden",
    errors.Overloaded: "overloaded",
    errors.FeaturesUnavailable: "features_unavailable",
    errors.FeaturesRefused: "features_unavailable",
    errors.DecisionsUnavailable: "decisions_unavailable",
    errors.StoreUnavailable: "decisions_unavailable",
    errors.NeedsOperator: "decisions_unavailable",
    errors.ConfigError: "decisions_unavailable",
    errors.Conflict: "conflict",
    errors.UnknownDecision: "unknown_decision",
}
_POSTGRES_AWAY = errors.DecisionsUnavailable(
    "Postgres does not answer; try again in a second. The log of this process has the cause."
)
_HIDDEN: Mapping[type[Exception], Exception] = {
    # What the servers answered belongs in the log and in /health.
    errors.FeaturesUnavailable: errors.FeaturesUnavailable(),
    errors.FeaturesRefused: errors.FeaturesRefused(),
    errors.StoreUnavailable: _POSTGRES_AWAY,
    errors.NeedsOperator: _POSTGRES_AWAY,
    errors.ConfigError: errors.DecisionsUnavailable(
        "Postgres rejects this process; try again when its DATABASE_URL has been corrected."
    ),
}
_AGAIN = (
    "overloaded",
    "features_unavailable",
    "decisions_unavailable",
    "labels_unavailable",
    "starting",
)
_HEADERS = {
    "unauthorized": {"WWW-Authenticate": "Bearer"},
    **{code: {"Retry-After": "1"} for code in _AGAIN},
}


class Refusal(errors.CerberusError):
    """The HTTP side refuses the request; the detail says why."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def problem(code: str, detail: str, field: str | None = None) -> Response:
    """Answer with the problem of this code."""
    return Response(
        printable.dumps(codes.problem(code, detail, field)),
        status_code=codes.PROBLEMS[code].status,
        headers=_HEADERS.get(code),
        media_type=codes.MEDIA_TYPE,
    )


async def refuse(request: Request, error: Exception) -> Response:
    """Answer an error with its code.

    Raises:
        Exception: `error`, if it has no code: the cause belongs in the log.
    """
    if isinstance(error, Refusal):
        return problem(error.code, str(error))
    if isinstance(error, errors.InvalidInput):
        return problem("invalid", error.reason, error.field)
    if (code := _CODES.get(type(error))) is None:
        raise error
    field = error.field if isinstance(error, errors.Conflict) else None
    if isinstance(error, errors.StoreUnavailable | errors.ConfigError):
        route = request.scope["path"].lstrip("/").partition("/")[0]
        _said.warn(f"/{route} was refused: {error}", "refused")
    return problem(code, str(_HIDDEN.get(type(error), error)), field)


async def _refuse_route(request: Request, error: Exception) -> Response:
    known = {404: "not_found", 405: "method_not_allowed"}
    if not isinstance(error, HTTPException) or error.status_code not in known:
        raise error
    detail = f"{request.method} {request.scope['path']} is not served here."
    response = problem(known[error.status_code], detail)
    response.headers.update(error.headers or {})
    return response


async def _refuse_rest(request: Request, error: Exception) -> Response:
    return problem("not_json", "The connection ended before the body was complete.")


async def _fault(request: Request, error: Exception) -> Response:
    response = problem("internal", "The request failed; the log of this process has the cause.")
    response.raw_headers.extend(access.HEADERS)  # it does not pass the gate
    return response


HANDLERS: Mapping[Any, ExceptionHandler] = {
    errors.CerberusError: refuse,
    HTTPException: _refuse_route,
    ClientDisconnect: _refuse_rest,
    Exception: _fault,
}
"""The handler of each exception, for Starlette."""
