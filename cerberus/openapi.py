"""The HTTP contract: every problem by its stable code, the OpenAPI document, and a page to read it.

The page is one file without any host but our own.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from cerberus import transactions

PROBLEM_TYPE = "application/problem+json"
VERSION = "1.0.0"


class Problem(NamedTuple):
    """One thing that can go wrong, as RFC 9457 tells it: status, title, and when it happens."""

    status: int
    title: str
    when: str


PROBLEMS: Mapping[str, Problem] = {
    "not_json": Problem(400, "Not a JSON object", "the body is not JSON, or not an object"),
    "unauthorized": Problem(401, "Key missing or wrong", "a key is set and was not sent"),
    "forbidden": Problem(
        403, "Only local callers", "no key is set and the caller is not a direct local one"
    ),
    "not_found": Problem(404, "No such path", "the path is not served"),
    "api_disabled": Problem(
        404, "Predictions are off", "CERBERUS_TASKS of this process has no `api`"
    ),
    "method_not_allowed": Problem(405, "Wrong method", "the path is served, by another method"),
    "body_timeout": Problem(408, "Body too slow", "the body did not arrive within 10 s"),
    "too_large": Problem(413, "Body too large", "the body has more than 64 KiB"),
    "invalid": Problem(422, "A field is invalid", "`field` breaks the contract; `detail` says how"),
    "overloaded": Problem(503, "Too many requests", "retry after `Retry-After` seconds"),
    "features_unavailable": Problem(
        503, "Features unreachable", "no score from invented values; retry after `Retry-After` s"
    ),
    "starting": Problem(503, "Starting", "the process does not serve yet"),
    "internal": Problem(500, "A fault of ours", "the log of the process has the cause"),
}
_OF_PREDICT = (
    "not_json",
    "api_disabled",
    "method_not_allowed",
    "body_timeout",
    "too_large",
    "invalid",
    "overloaded",
    "features_unavailable",
)
_EVERYWHERE = ("unauthorized", "forbidden", "starting", "internal")
_TIME = {"type": "string", "format": "date-time", "examples": ["2026-01-31T12:00:00.000Z"]}


def problem(code: str, detail: str, field: str | None = None) -> dict[str, Any]:
    """Lay out a problem as RFC 9457 says; `code` is stable, `detail` is for people."""
    status, title, _ = PROBLEMS[code]
    told = {"type": f"/docs#{code}", "title": title, "status": status, "detail": detail}
    told["code"] = code
    if field is not None:
        told["field"] = field
    return told


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
            "schemas": {
                "Request": _request_schema(currency),
                "Prediction": _prediction_schema(spans),
                "Health": _health_schema(),
                "Problem": _problem_schema(),
            },
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
        "different transactions. Asking feeds no window. The content type may be any, or none.",
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


def _problems(*codes: str) -> dict[str, Any]:
    by_status: dict[str, list[str]] = {}
    for code in codes:
        by_status.setdefault(str(PROBLEMS[code].status), []).append(code)
    return {
        status: {
            "description": "; ".join(f"`{code}`: {PROBLEMS[code].when}" for code in found),
            "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status, found in sorted(by_status.items())
    }


def _request_schema(currency: str) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1, "maxLength": transactions.MAX_TEXT}
    amount = {"type": "number", "minimum": 0, "description": "at most two places"}
    return {
        "type": "object",
        "description": "Null counts as absent; fields that are not listed are ignored.",
        "required": ["user_id"],
        "properties": {
            "user_id": {"type": "integer", "minimum": 0, "maximum": transactions.MAX_USER_ID},
            "transaction_id": text,
            "amount": amount | {"maximum": transactions.MAX_AMOUNT_MINOR // 100},
            "timestamp": _TIME | {"description": "now when absent"},
            "currency": {"const": currency},
            "merchant_id": {**text, "minLength": 0},
        },
        "dependentRequired": {
            "transaction_id": ["amount"],
            "amount": ["transaction_id"],
            "currency": ["transaction_id"],
            "merchant_id": ["transaction_id"],
        },
    }


def _object(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    properties = {**required, **optional}
    return {"type": "object", "required": list(required), "properties": properties}


def _prediction_schema(spans: Sequence[str]) -> dict[str, Any]:
    features: dict[str, Any] = {}
    for span in spans:
        features[f"txn_count_{span}"] = {"type": ["integer", "null"], "minimum": 0}
        features[f"total_amount_{span}"] = {"type": ["number", "null"], "minimum": 0}
    features["credit_score"] = {"type": ["integer", "null"]}
    fence = _object({name: {"type": "integer"} for name in ("epoch", "offset", "partition")})
    milliseconds = {"type": "number", "minimum": 0}
    return _object(
        {
            "user_id": {"type": "integer"},
            "prediction": {"enum": ["FRAUD", "LEGIT"]},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "features": _object(features) | {"description": "null: could not be had, never 0"},
            "latency_stats": _object(
                {"feature_retrieval_ms": milliseconds, "total_latency_ms": milliseconds}
            ),
            "as_of": _TIME,
            "degraded": {
                "type": "array",
                "items": {"type": "string"},
                "description": "why the values may be wrong; empty when they are exact",
            },
            "approximate": {"type": "boolean", "description": "an edge cut a summed slice"},
            "fence": {
                "oneOf": [fence, {"type": "null"}],
                "description": "the prefix of the log behind the values; null without a row",
            },
            "model": _object({"sha256": {"type": "string"}, "threshold": {"type": "number"}}),
        },
        transaction_id={"type": "string"},
    )


def _health_schema() -> dict[str, Any]:
    reason = {"type": ["string", "null"]}
    task = _object(
        {
            "state": {"type": "string"},
            "since_s": {"type": "number"},
            "restarts": {"type": "integer"},
            "last_error": reason,
        }
    )
    partition = _object(
        {
            "state": {"type": "string"},
            "progress": {"type": "number"},
            "lag": {"type": ["integer", "null"]},
        }
    )
    return _object(
        {
            "status": {"enum": ["ready", "degraded", "starting", "failed"]},
            "reasons": {"type": "array", "items": {"type": "string"}},
        },
        tasks={"type": "object", "additionalProperties": task},
        model=_object({"sha256": {"type": "string"}, "threshold": {"type": "number"}}),
        servers={
            "type": "object",
            "additionalProperties": reason,
            "description": "null: it answers; else why not",
        },
        partitions={"type": "object", "additionalProperties": partition},
        producer=_object({"rate": {"type": "number"}, "reason": {"type": "string"}}),
    )


def _problem_schema() -> dict[str, Any]:
    return _object(
        {
            "type": {"type": "string", "format": "uri-reference"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "code": {
                "enum": list(PROBLEMS),
                "description": "; ".join(f"`{code}`: {p.when}" for code, p in PROBLEMS.items()),
            },
        },
        field={"type": "string", "description": "with `invalid`: which field"},
    )


PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Cerberus</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:54rem;margin:2rem auto;padding:0 1rem}}
code,pre,textarea,input{{font:14px/1.4 ui-monospace,monospace}}
textarea,input{{width:100%;box-sizing:border-box}}
pre{{background:#f4f4f4;padding:1rem;overflow:auto}}
td,th{{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}}</style>
<h1>Cerberus</h1><p>{description}</p>
<h2>Try it</h2><p><textarea id="body" rows="2">{{"user_id": 1005}}</textarea>
<input id="key" type="password" placeholder="X-API-Key, when one is set">
<button id="send">POST /predict</button><pre id="answer"></pre>
<h2>Routes</h2><table>{routes}</table><h2>Request</h2><p>{predict}</p><table>{fields}</table>
<h2>Problems</h2><p>Errors are <code>application/problem+json</code>; <code>code</code> is stable.
<table>{problems}</table><h2>Document</h2><p><a href="/openapi.json">/openapi.json</a>
<pre>{document}</pre>
<script>document.getElementById("send").onclick = async () => {{
  const of = id => document.getElementById(id), key = of("key").value;
  const headers = {{"Content-Type": "application/json"}};
  if (key) headers["X-API-Key"] = key;
  const answer = await fetch("/predict", {{method: "POST", headers, body: of("body").value}});
  of("answer").textContent = answer.status + "\\n" + JSON.stringify(await answer.json(), null, 2);
}};</script></html>"""


def page(told: Mapping[str, Any]) -> str:
    """Render the document as one HTML page."""
    routes = [
        (f"{method.upper()} {path}", operation["summary"])
        for path, methods in told["paths"].items()
        for method, operation in methods.items()
    ]
    request = told["components"]["schemas"]["Request"]["properties"]
    problems = "".join(
        f'<tr id="{code}"><th>{known.status}<td><code>{code}</code>'
        f"<td>{html.escape(known.title)}: {html.escape(known.when)}"
        for code, known in PROBLEMS.items()
    )
    return _PAGE.format(
        description=html.escape(told["info"]["description"]),
        routes=_table(routes),
        predict=html.escape(told["paths"]["/predict"]["post"]["description"]),
        fields=_table((name, orjson.dumps(schema).decode()) for name, schema in request.items()),
        problems=problems,
        document=html.escape(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode()),
    )


def _table(rows: Any) -> str:
    return "".join(
        f"<tr><th><code>{html.escape(name)}</code><td>{html.escape(text)}" for name, text in rows
    )
