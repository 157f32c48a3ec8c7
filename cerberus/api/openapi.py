"""The HTTP contract as an OpenAPI document."""

from collections.abc import Mapping, Sequence
from typing import Any

from cerberus import labels, transactions
from cerberus.api import codes, schemas

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


def document(spans: Sequence[str], currency: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document for a deployment with these windows and this currency."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cerberus",
            "version": VERSION,
            "summary": "Real-time card-fraud decisions.",
            "description": "If CERBERUS_API_KEY is set, every route except `/health/live` requires "
            "a key; with CERBERUS_OPEN=loopback alone it serves direct callers of its machine.",
        },
        "security": [{"header": []}, {"bearer": []}, {}],
        "paths": {
            "/predict": {"post": _predict()},
            "/decisions/{decision_id}": {"get": _decision()},
            "/decisions": {"get": _decisions()},
            "/users/{user_id}": {"get": _user()},
            "/labels": {"post": _labels()},
            "/accuracy": {"get": _accuracy()},
            "/health": {"get": _health()},
            "/health/live": {
                "get": {
                    "summary": "Whether the process answers at all",
                    "security": [],
                    "responses": {"200": _answer("It answers.", {"const": {"status": "alive"}})},
                }
            },
            "/metrics": {"get": _get("Counters in Prometheus' text format", "text/plain")},
            "/openapi.json": {"get": _get("This document", "application/json")},
            "/docs": {"get": _get("This document as a page, with a form to try it", "text/html")},
        },
        "components": {
            "schemas": {**schemas.every(spans, currency), "Problem": _problem_schema()},
            "securitySchemes": {
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def _predict() -> dict[str, Any]:
    answer = _answer("The decision.", {"$ref": "#/components/schemas/Prediction"})
    return {
        "summary": "Score a user, or a transaction in hand",
        "description": "`user_id` alone scores the user now, or at `timestamp`. With "
        "`transaction_id` and `amount`, the transaction in hand is counted exactly once, whether "
        "or not the stream has seen it. Send the same `timestamp` as the stream record; a "
        "different one makes it a different transaction. Each transaction gets one decision: "
        "repeated requests and the stream receive the first one (`replayed`). A request changes no "
        "window. Any content type is accepted. A `traceparent` header (W3C Trace Context) is "
        "stored with the decision.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Request"},
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
        "responses": {"200": answer} | _problems(*_OF_PREDICT, *_EVERYWHERE),
    }


def _parameter(name: str, place: str, schema: Mapping[str, Any], meaning: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": schema,
        "description": meaning,
    }


def _decision() -> dict[str, Any]:
    schema = {"type": "string", "format": "uuid"}
    answer = _answer("The decision as it was made.", {"$ref": "#/components/schemas/Decision"})
    return {
        "summary": "Look up a decision",
        "parameters": [_parameter("decision_id", "path", schema, "as `POST /predict` returned it")],
        "responses": {"200": answer} | _problems("unknown_decision", *_OF_LOOKUPS, *_EVERYWHERE),
    }


def _decisions() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "integer", "minimum": 0}
    limit = {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    item = {"$ref": "#/components/schemas/Decision"}
    page = schemas.object_of(
        {
            "decisions": {"type": "array", "items": item},
            "next": {
                "type": ["string", "null"],
                "description": "pass it as `before`; null on the last page",
            },
        }
    )
    return {
        "summary": "Look up the decisions on a transaction or a user, newest first",
        "parameters": [
            _parameter("transaction_id", "query", text, "give either this or `user_id`"),
            _parameter("user_id", "query", number, "give either this or `transaction_id`"),
            _parameter("before", "query", text, "`next` of the previous page, or a time"),
            _parameter("limit", "query", limit, "decisions per page"),
        ],
        "responses": {"200": _answer("A page.", page)} | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    }


def _user() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": transactions.MAX_USER_ID}
    answer = _answer("The window now.", {"$ref": "#/components/schemas/User"})
    return {
        "summary": "Look up a user: the window now, and the last decisions",
        "parameters": [_parameter("user_id", "path", number, "the user's id")],
        "responses": {"200": answer}
        | _problems("features_unavailable", *_OF_LOOKUPS, *_EVERYWHERE),
    }


def _labels() -> dict[str, Any]:
    label = {"$ref": "#/components/schemas/Label"}
    items = {"type": "array", "items": label, "minItems": 1, "maxItems": labels.MAX_ITEMS}
    outcome = {"enum": ["stored", "known", "invalid"]}
    text = {"type": "string"}
    count = {"type": "integer", "minimum": 0}
    result = schemas.object_of({"result": outcome}, field=text, detail=text)
    answer = schemas.object_of(
        {
            "results": {
                "type": "array",
                "items": result,
                "description": "in the order of `labels`",
            },
            "stored": count,
            "known": count,
            "invalid": count,
        }
    )
    return {
        "summary": "Send labels: the truth about transactions",
        "description": "Send one label, or a list of 1 to 1,000. Each label in a list is judged "
        "alone: an invalid one does not stop the others, and `results` names its field. The newest "
        "`labelled_at` wins. Sending a label again changes nothing. A label for an unknown "
        "transaction waits for it.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"oneOf": [label, schemas.object_of({"labels": items})]}
                }
            },
        },
        "responses": {"200": _answer("The result of each label.", answer)}
        | _problems(*_OF_LABELS, *_EVERYWHERE),
    }


def _accuracy() -> dict[str, Any]:
    text = {"type": "string"}
    answer = _answer("Figures about mature decisions.", {"$ref": "#/components/schemas/Accuracy"})
    return {
        "summary": "Compare decisions with labels",
        "description": "Only mature decisions are judged; `immature` counts the others. A share "
        "is null where it is undefined.",
        "parameters": [
            _parameter("since", "query", text, "only decisions since this date or RFC 3339 time"),
            _parameter("model", "query", text, "a prefix of a model's version"),
        ],
        "responses": {"200": answer} | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    }


def _health() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Health"}
    return {
        "summary": "The state of each part, with reasons",
        "responses": {
            "200": _answer("`ready`, or `degraded`: predictions are answered.", schema),
            "503": _answer("`starting`, or `failed`: they are not.", schema),
        }
        | _problems("unauthorized", "forbidden", "internal", *_AT_THE_DOOR),
    }


def _get(summary: str, content_type: str) -> dict[str, Any]:
    answer = {"description": summary, "content": {content_type: {}}}
    return {"summary": summary, "responses": {"200": answer} | _problems(*_EVERYWHERE)}


def _answer(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problems(*named: str) -> dict[str, Any]:
    by_status: dict[str, list[str]] = {}
    for code in named:
        by_status.setdefault(str(codes.PROBLEMS[code].status), []).append(code)
    return {
        status: {
            "description": "; ".join(f"`{code}`: {codes.PROBLEMS[code].when}" for code in found),
            "content": {codes.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, found in sorted(by_status.items())
    }


def _problem_schema() -> dict[str, Any]:
    return schemas.object_of(
        {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "code": {
                "enum": list(codes.PROBLEMS),
                "description": "; ".join(
                    f"`{code}`: {p.when}" for code, p in codes.PROBLEMS.items()
                ),
            },
        },
        field={
            "type": "string",
            "description": "the field at fault, with `invalid` and `conflict`",
        },
    )
