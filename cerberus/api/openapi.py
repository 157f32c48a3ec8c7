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
_EVERYWHERE = ("unauthorized", "forbidden", "starting", "internal")


def document(spans: Sequence[str], currency: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a deployment with these windows and this currency."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cerberus",
            "version": VERSION,
            "summary": "Real-time card-fraud decisions.",
            "description": "With CERBERUS_API_KEY set, every route but `/health/live` wants a "
            "key; with none, only direct callers on the same machine are served.",
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
                    "responses": {"200": _answer("It does.", {"const": {"status": "alive"}})},
                }
            },
            "/metrics": {"get": _get("Counters in Prometheus' text format", "text/plain")},
            "/openapi.json": {"get": _get("This document", "application/json")},
            "/docs": {"get": _get("This document, to read and to try", "text/html")},
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
        "description": "`user_id` alone scores the present, with `timestamp` that moment. With "
        "`transaction_id` and `amount` the transaction in hand is counted exactly once, whether or "
        "not the stream has seen it: give the `timestamp` that it carries there, or the two are "
        "different transactions. There is one decision on a transaction: repeats, and the stream, "
        "get the first one (`replayed`). Asking feeds no window. The content type may be any, or "
        "none. A `traceparent` header (W3C Trace Context) is kept with the decision.",
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
    answer = _answer("The decision as it was taken.", {"$ref": "#/components/schemas/Decision"})
    return {
        "summary": "Look up a decision",
        "parameters": [_parameter("decision_id", "path", schema, "as `POST /predict` gave it")],
        "responses": {"200": answer} | _problems("unknown_decision", *_OF_LOOKUPS, *_EVERYWHERE),
    }


def _decisions() -> dict[str, Any]:
    text, number = {"type": "string"}, {"type": "integer", "minimum": 0}
    limit = {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    item = {"$ref": "#/components/schemas/Decision"}
    page = schemas.object_of(
        {
            "decisions": {"type": "array", "items": item},
            "next": {"type": ["string", "null"], "description": "goes into `before`"},
        }
    )
    return {
        "summary": "Look up the decisions on a transaction or a user, newest first",
        "parameters": [
            _parameter("transaction_id", "query", text, "either this"),
            _parameter("user_id", "query", number, "or this"),
            _parameter("before", "query", text, "`next` of the page before, or a time"),
            _parameter("limit", "query", limit, "of one page"),
        ],
        "responses": {"200": _answer("A page.", page)} | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    }


def _user() -> dict[str, Any]:
    number = {"type": "integer", "minimum": 0, "maximum": transactions.MAX_USER_ID}
    answer = _answer("The window now.", {"$ref": "#/components/schemas/User"})
    return {
        "summary": "Look up a user: the window now, and the last decisions",
        "parameters": [_parameter("user_id", "path", number, "of the user")],
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
        "summary": "Tell the truth about transactions",
        "description": "One label, or a list of 1 to 1,000. In a list each stands for itself: a "
        "wrong one does not stop the others, and `results` names its field. The newest "
        "`labelled_at` wins; sending a label again changes nothing; one for a transaction that is "
        "not known yet waits for it.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"oneOf": [label, schemas.object_of({"labels": items})]}
                }
            },
        },
        "responses": {"200": _answer("What became of each.", answer)}
        | _problems(*_OF_LABELS, *_EVERYWHERE),
    }


def _accuracy() -> dict[str, Any]:
    text = {"type": "string"}
    answer = _answer("Figures of what is mature.", {"$ref": "#/components/schemas/Accuracy"})
    return {
        "summary": "Compare decisions with the truth, once that is known",
        "description": "Only mature decisions are judged; how many are not stands beside. A share "
        "is null where nothing can be said.",
        "parameters": [
            _parameter("since", "query", text, "of decisions: a date, or RFC 3339"),
            _parameter("model", "query", text, "the beginning of a model's version"),
        ],
        "responses": {"200": answer} | _problems(*_OF_LOOKUPS, *_EVERYWHERE),
    }


def _health() -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Health"}
    return {
        "summary": "How each part is, and why",
        "responses": {
            "200": _answer("`ready`, or `degraded`: predictions are answered.", schema),
            "503": _answer("`starting`, or `failed`: they are not.", schema),
        }
        | _problems("unauthorized", "forbidden", "internal"),
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
        field={"type": "string", "description": "with `invalid` and `conflict`: which field"},
    )
