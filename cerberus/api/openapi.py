"""The HTTP contract as an OpenAPI document."""

from collections.abc import Mapping, Sequence
from typing import Any

from cerberus.api import codes, pages, schemas
from cerberus.serving import lookups

VERSION = "1.0.0"
_OF_PREDICT = (
    "not_json",
    "api_disabled",
    "method_not_allowed",
    "body_timeout",
    "too_large",
    "conflict",
    "invalid",
    "overloaded",
    "features_unavailable",
    "decisions_unavailable",
)
_OF_LOOKUPS = (
    "api_disabled",
    "method_not_allowed",
    "invalid",
    "overloaded",
    "decisions_unavailable",
)
_OF_LABELS = (
    "not_json",
    "api_disabled",
    "method_not_allowed",
    "body_timeout",
    "too_large",
    "invalid",
    "overloaded",
    "labels_unavailable",
)
_AT_THE_DOOR = ("bad_request", "head_timeout", "target_too_long", "head_too_large")
_EVERYWHERE = ("unauthorized", "forbidden", "starting", "internal", *_AT_THE_DOOR)


def document(spans: Sequence[str], currency: str, *, keyed: bool = False) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a deployment.

    Args:
        spans: Its windows.
        currency: Its currency.
        keyed: Whether callers must send a key.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cerberus",
            "version": VERSION,
            "summary": "Real-time card-fraud decisions.",
            "description": "If CERBERUS_API_KEY is set, every route except `/health/live` requires "
            "a key; with CERBERUS_OPEN=loopback alone it serves direct callers of its machine.",
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in ("decisions", "labels", "service")],
        "security": [{"ApiKey": []}, {"Bearer": []}] if keyed else [],
        "paths": {
            "/predict": {"post": _predict()},
            "/decisions/{decision_id}": {"get": _decision()},
            "/decisions": {"get": _decisions_of_transaction()},
            "/users/{user_id}/decisions": {"get": _decisions_of_user()},
            "/users/{user_id}": {"get": _user()},
            "/labels": {"post": _labels()},
            "/accuracy": {"get": _accuracy()},
            "/health": {"get": _health()},
            "/health/live": {"get": _live()},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _openapi()},
            "/docs": {"get": _docs()},
            "/docs/{file}": {"get": _docs_file()},
        },
        "components": {
            "schemas": schemas.every(spans, currency),
            "securitySchemes": {
                "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "Bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _operation(name: str, tag: str, summary: str, **more: Any) -> dict[str, Any]:
    return {"operationId": name, "tags": [tag], "summary": summary, **more}


def _predict() -> dict[str, Any]:
    answer = _answer("The decision.", schemas.ref("Prediction"))
    return _operation(
        "predict",
        "decisions",
        "Score a user, or a transaction in hand",
        description="`user_id` alone scores the user now, or at `timestamp`. With "
        "`transaction_id` and `amount`, the transaction in hand is counted exactly once, whether "
        "or not the stream has seen it. Send the same `timestamp` as the stream record; a "
        "different one makes it a different transaction. Each transaction gets one decision: "
        "repeated requests and the stream receive the first one (`replayed`). A request changes no "
        "window. Any content type is accepted. A `traceparent` header (W3C Trace Context) is "
        "stored with the decision.",
        requestBody={
            "required": True,
            "content": {
                "application/json": {
                    "schema": schemas.ref("Request"),
                    "examples": {
                        "user": {"value": {"user_id": 1005}},
                        "transaction": {
                            "value": {
                                "user_id": 1005,
                                "transaction_id": "0193a5b0-7c1e-7000-8000-000000000001",
                                "amount": 42.5,
                                "timestamp": "2026-01-31T12:00:00.000Z",
                            }
                        },
                    },
                }
            },
        },
        responses={"200": answer} | _problems(*_OF_PREDICT, *_EVERYWHERE),
    )


def _parameter(
    name: str,
    schema: Mapping[str, Any],
    meaning: str,
    *,
    place: str = "query",
    needed: bool = False,
) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": needed or place == "path",
        "schema": schema,
        "description": meaning,
    }


def _decision() -> dict[str, Any]:
    asked = _parameter("decision_id", schemas.UUID, "as `POST /predict` returned it", place="path")
    answer = _answer("The decision as it was made.", schemas.ref("Decision"))
    return _operation(
        "getDecision",
        "decisions",
        "Look up a decision",
        parameters=[asked],
        responses={"200": answer} | _problems("unknown_decision", *_OF_LOOKUPS, *_EVERYWHERE),
    )


def _page_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    limit = {"type": "integer", "format": "int32", "minimum": 1, "default": lookups.DEFAULT_LIMIT}
    before = "only older ones: `next` of the previous page, or an RFC 3339 time"
    return {
        "parameters": [
            asked,
            _parameter("before", schemas.BEFORE, before),
            _parameter("limit", limit | {"maximum": lookups.MAX_LIMIT}, "decisions per page"),
        ],
        "responses": {"200": _answer("A page.", schemas.ref("DecisionPage"))}
        | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    }


def _decisions_of_transaction() -> dict[str, Any]:
    # OpenAPI cannot express that one of two parameters is required. So one of them is declared
    # here, and the other has a path of its own.
    schema = schemas.TRANSACTION_ID
    return _operation(
        "listDecisionsOfTransaction",
        "decisions",
        "Look up the decisions on a transaction, newest first",
        description="`user_id` instead of `transaction_id` asks what "
        "`/users/{user_id}/decisions` answers; both together are refused.",
        **_page_of(_parameter("transaction_id", schema, "the transaction's id", needed=True)),
    )


def _decisions_of_user() -> dict[str, Any]:
    return _operation(
        "listDecisionsOfUser",
        "decisions",
        "Look up the decisions on a user, newest first",
        **_page_of(_parameter("user_id", schemas.USER_ID, "the user's id", place="path")),
    )


def _user() -> dict[str, Any]:
    answer = _answer("The window now.", schemas.ref("User"))
    problems = _problems("features_unavailable", *_OF_LOOKUPS, *_EVERYWHERE)
    return _operation(
        "getUser",
        "decisions",
        "Look up a user: the window now, and the last decisions",
        parameters=[_parameter("user_id", schemas.USER_ID, "the user's id", place="path")],
        responses={"200": answer} | problems,
    )


def _labels() -> dict[str, Any]:
    either = {"anyOf": [schemas.ref("Label"), schemas.ref("LabelList")]}
    return _operation(
        "sendLabels",
        "labels",
        "Send labels: the truth about transactions",
        description="Send one label, or a list of 1 to 1,000. Each label in a list is judged "
        "alone: an invalid one does not stop the others, and `results` names its field. The newest "
        "`labelled_at` wins. Sending a label again changes nothing. A label for an unknown "
        "transaction waits for it.",
        requestBody={"required": True, "content": {"application/json": {"schema": either}}},
        responses={"200": _answer("The result of each label.", schemas.ref("LabelResults"))}
        | _problems(*_OF_LABELS, *_EVERYWHERE),
    )


def _accuracy() -> dict[str, Any]:
    since = "only decisions since this date (its midnight in UTC) or RFC 3339 time"
    prefix = {"type": "string", "pattern": "^[0-9a-fA-F]{1,64}$"}
    answer = _answer("Figures about mature decisions.", schemas.ref("Accuracy"))
    return _operation(
        "getAccuracy",
        "labels",
        "Compare decisions with labels",
        description="Only mature decisions are judged; `immature` counts the others. A share "
        "is null where it is undefined.",
        parameters=[
            _parameter("since", schemas.SINCE, since),
            _parameter("model", prefix, "a prefix of a model's version"),
        ],
        responses={"200": answer} | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    )


def _health() -> dict[str, Any]:
    schema = schemas.ref("Health")
    return _operation(
        "getHealth",
        "service",
        "The state of each part, with reasons",
        responses={
            "200": _answer("`ready`, or `degraded`: predictions are answered.", schema),
            "503": _answer("`starting`, or `failed`: they are not.", schema),
        }
        | _problems("method_not_allowed", "unauthorized", "forbidden", "internal", *_AT_THE_DOOR),
    )


def _live() -> dict[str, Any]:
    return _operation(
        "getLiveness",
        "service",
        "Whether the process answers at all",
        security=[],
        responses={"200": _answer("It answers.", schemas.ref("Alive"))}
        | _problems("method_not_allowed", *_AT_THE_DOOR),
    )


def _metrics() -> dict[str, Any]:
    return _get("getMetrics", "Counters in Prometheus' text format", "text/plain", schemas.TEXT)


def _openapi() -> dict[str, Any]:
    return _get("getOpenApi", "This document", "application/json", schemas.ref("OpenApi"))


def _docs() -> dict[str, Any]:
    return _get("getDocs", "This document as a page (Swagger UI)", "text/html", schemas.TEXT)


def _docs_file() -> dict[str, Any]:
    of_page = _get("getDocsFile", "A file of the page", "text/javascript", schemas.TEXT)
    of_page["responses"]["200"]["content"] |= {
        kind: {"schema": schemas.TEXT} for kind in pages.FILES.values()
    }
    asked = _parameter("file", schemas.ref("PageFile"), "its name", place="path")
    of_page["responses"] |= _problems("not_found", "api_disabled", *_EVERYWHERE)
    return of_page | {"parameters": [asked]}


def _get(name: str, summary: str, content_type: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    answer = {"description": summary, "content": {content_type: {"schema": schema}}}
    of_api = () if content_type == "text/plain" else ("api_disabled",)
    responses = {"200": answer} | _problems("method_not_allowed", *of_api, *_EVERYWHERE)
    return _operation(name, "service", summary, responses=responses)


def _answer(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problems(*named: str) -> dict[str, Any]:
    by_status: dict[str, list[str]] = {}
    for code in named:
        by_status.setdefault(str(codes.PROBLEMS[code].status), []).append(code)
    return {
        status: {
            "description": "; ".join(f"`{code}`: {codes.PROBLEMS[code].when}" for code in found),
            "content": {codes.MEDIA_TYPE: {"schema": schemas.ref("Problem")}},
        }
        for status, found in sorted(by_status.items())
    }
