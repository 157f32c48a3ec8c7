"""An application that echoes its request, for tests of the HTTP protocol alone.

With `ECHO_PROTOCOL=ours` uvicorn uses the service's protocol, otherwise its own.
"""

import asyncio
import contextlib
import os

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cerberus import environment, settings
from cerberus.api import connections, protocol


@contextlib.asynccontextmanager
async def _lifespan(running):
    limits = environment.read(settings.Connections, os.environ)
    known = connections.Connections(limits)
    yield {"connections": known}
    known.close()


async def echo(scope, receive, send):
    request = Request(scope, receive)
    try:
        body = await request.body() if scope["path"] != "/unread" else b""
    except ClientDisconnect:
        return
    await asyncio.sleep({"/slow": 0.3, "/slower": 2}.get(scope["path"], 0))
    told = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "body": body.decode("latin-1"),
        "key": request.headers.get("x-api-key"),
    }
    await Response(orjson.dumps(told), media_type="application/json")(scope, receive, send)


if os.environ.get("ECHO_PROTOCOL") == "ours":
    protocol.install()
app = Starlette(lifespan=_lifespan)
app.mount("/", echo)
