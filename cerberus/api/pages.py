"""The page at `/docs`: Swagger UI on the document, and the table of problems.

It loads nothing from other hosts: the files of Swagger UI come from a Python package. A browser
cannot send a key when it opens a page. So where a key is needed, it gets this page with status 401.
The page says nothing about the deployment; it asks for the key and sends it with every request.
"""

import asyncio
import base64
import functools
import hashlib
import html
import importlib.util
import mimetypes
import pathlib

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from cerberus.api import codes

PATH = "/docs"
FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""The files of the page, with their types."""
_PACKAGE = (
    "flask_swagger_ui"  # not imported, because that would import Flask; only its files are read
)
_SCRIPT = """"use strict";
const at = id => document.getElementById(id);
let key = "";
async function load(path) {
  const answer = await fetch(path, {headers: key ? {"X-API-Key": key} : {}});
  if (!answer.ok) throw answer;
  return answer;
}
async function local(name) {
  return URL.createObjectURL(await (await load("/docs/" + name)).blob());
}
async function show() {
  at("key").hidden = true;
  at("said").textContent = "";
  try {
    const spec = await (await load("/openapi.json")).json();
    at("style").href = await local("swagger-ui.css");
    const script = document.createElement("script");
    script.onload = () => SwaggerUIBundle({
      spec, dom_id: "#ui", validatorUrl: null,
      requestInterceptor: asked => {
        if (key && !asked.headers["X-API-Key"]) asked.headers["X-API-Key"] = key;
        return asked;
      },
    });
    script.src = await local("swagger-ui-bundle.js");
    document.head.append(script);
  } catch (refused) {
    at("key").hidden = refused.status !== 401;
    if (refused.status !== 401 || key)
      at("said").textContent = refused.json ? (await refused.json()).detail : String(refused);
  }
}
at("key").onsubmit = event => {
  event.preventDefault();
  key = at("value").value;
  show();
};
show();
"""
_DIGEST = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_DIGEST}' blob:; style-src 'unsafe-inline' blob:; "
    "img-src data:; font-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Cerberus</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<link rel="stylesheet" id="style">
<style>body{{font:16px/1.5 system-ui,sans-serif;margin:0}}
form,#said,section{{max-width:1460px;margin:1rem auto;padding:0 20px}}
td,th{{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0}}</style>
<form id="key" hidden><label>This service needs a key:
<input id="value" type="password" autocomplete="current-password"></label>
<button>Show</button></form>
<p id="said" role="status"></p>
<noscript><p>The document is <a href="/openapi.json">here</a>.</noscript>
<div id="ui"></div>
<section><h2>Problems</h2>
<p>Errors are <code>application/problem+json</code>; <code>code</code> is stable.
<table>{problems}</table></section>
<script>{script}</script></html>"""


@functools.cache
def docs() -> str:
    """Render the page, which is the same for everyone."""
    problems = "".join(
        f'<tr id="{code}"><th>{known.status}<td><code>{code}</code>'
        f"<td>{html.escape(known.title)}: {html.escape(known.when)}"
        for code, known in codes.PROBLEMS.items()
    )
    return _PAGE.format(problems=problems, script=_SCRIPT)


def page(status: int = 200) -> Response:
    """Answer `GET /docs`, also with status 401, because the page asks for the key."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(docs(), status_code=status, media_type="text/html", headers=headers)


async def file(name: str, scope: Scope) -> Response:
    """Answer `GET /docs/{file}`.

    Raises:
        HTTPException: The page has no such file (404).
    """
    if name not in FILES:
        raise HTTPException(404)
    files = await asyncio.to_thread(_files)  # the first call reads from the disk
    answer = await files.get_response(name, scope)
    if answer.status_code == 200:
        answer.headers["Content-Type"] = f"{FILES[name]}; charset=utf-8"
    answer.headers["Cache-Control"] = "private, max-age=3600"
    return answer


@functools.cache
def _files() -> StaticFiles:
    mimetypes.init()  # for Starlette; `file` overwrites the types that it finds
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{_PACKAGE} is not installed: install the locked requirements")
    return StaticFiles(directory=pathlib.Path(found.submodule_search_locations[0]) / "dist")
