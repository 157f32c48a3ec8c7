"""Every problem that a caller can meet, by its stable code (RFC 9457)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

MEDIA_TYPE = "application/problem+json"


class Problem(NamedTuple):
    """One thing that can go wrong, with its status, its title and when it happens."""

    status: int
    title: str
    when: str


PROBLEMS: Mapping[str, Problem] = {
    "bad_request": Problem(
        400, "Not valid HTTP/1.1", "the request breaks the protocol; the connection is closed"
    ),
    "not_json": Problem(400, "Not a JSON object", "the body is not a JSON object"),
    "unauthorized": Problem(
        401, "Key missing or wrong", "a key is set, and the request did not send it"
    ),
    "forbidden": Problem(
        403, "Only local callers", "no key is set and the caller is not a direct local one"
    ),
    "not_found": Problem(404, "No such path", "the path is not served"),
    "api_disabled": Problem(
        404, "Predictions are off", "CERBERUS_TASKS of this process does not include `api`"
    ),
    "method_not_allowed": Problem(
        405, "Wrong method", "the path is served, but not with this method"
    ),
    "head_timeout": Problem(
        408, "Head too slow", "the head did not arrive within `CERBERUS_HEAD_TIMEOUT_S`"
    ),
    "body_timeout": Problem(
        408, "Body too slow", "the body did not arrive within `CERBERUS_BODY_TIMEOUT_S`"
    ),
    "unknown_decision": Problem(404, "No such decision", "no stored decision has this id"),
    "conflict": Problem(
        409,
        "Decided with other content",
        "`field` differs from the transaction that was decided under this id",
    ),
    "too_large": Problem(
        413, "Body too large", "the body is larger than 64 KiB, or 1 MiB for labels"
    ),
    "target_too_long": Problem(
        414, "Request target too long", "path and query have more than `CERBERUS_MAX_TARGET_BYTES`"
    ),
    "head_too_large": Problem(
        431, "Head too large", "the head has more than `CERBERUS_MAX_HEAD_BYTES`"
    ),
    "invalid": Problem(422, "A field is invalid", "`field` breaks the contract; `detail` says how"),
    "overloaded": Problem(503, "Too many requests", "retry after `Retry-After` seconds"),
    "features_unavailable": Problem(
        503, "Features unreachable", "Redis did not answer; retry after `Retry-After` seconds"
    ),
    "decisions_unavailable": Problem(
        503,
        "Decisions unreachable",
        "Postgres did not answer; retry after `Retry-After` seconds",
    ),
    "labels_unavailable": Problem(
        503, "Labels cannot be stored", "send the whole request again after `Retry-After` seconds"
    ),
    "starting": Problem(503, "Starting", "the process is not serving yet"),
    "internal": Problem(500, "Internal error", "the log of the process has the cause"),
}


def problem(code: str, detail: str, field: str | None = None) -> dict[str, Any]:
    """Lay out a problem as RFC 9457 says; `code` is stable, `detail` is for people."""
    status, title, _ = PROBLEMS[code]
    told = {"type": f"/docs#{code}", "title": title, "status": status, "detail": detail}
    told["code"] = code
    if field is not None:
        told["field"] = field
    return told
