"""The HTTP contract: every problem by its stable code, the OpenAPI document, and a page to read it.

The page is one file without any host but our own.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from cerberus import labels, transactions
from cerberus.api import schemas

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
    "unknown_decision": Problem(404, "No such decision", "no decision that is kept has this id"),
    "conflict": Problem(
        409, "Decided with other content", "`field` is not what it was when this was decided"
    ),
    "too_large": Problem(413, "Body too large", "the body has more than 64 KiB, of labels 1 MiB"),
    "invalid": Problem(422, "A field is invalid", "`field` breaks the contract; `detail` says how"),
    "overloaded": Problem(503, "Too many requests", "retry after `Retry-After` seconds"),
    "features_unavailable": Problem(
        503, "Features unreachable", "no score from invented values; retry after `Retry-After` s"
    ),
    "decisions_unavailable": Problem(
        503,
        "Decisions unreachable",
        "Postgres cannot tell of decisions; retry after `Retry-After` s",
    ),
    "labels_unavailable": Problem(
        503, "Labels cannot be stored", "send all of the request again after `Retry-After` s"
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


def _problem_schema() -> dict[str, Any]:
    return schemas.object_of(
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
        field={"type": "string", "description": "with `invalid` and `conflict`: which field"},
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
