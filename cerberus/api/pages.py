"""The page at `/docs`: the contract, to read and to try. It loads nothing from other hosts."""

import html
from collections.abc import Mapping
from typing import Any

import orjson

from cerberus.api import codes

POLICY = (
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
<input id="key" type="password" placeholder="X-API-Key, if one is set">
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


def docs(told: Mapping[str, Any]) -> str:
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
        for code, known in codes.PROBLEMS.items()
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
