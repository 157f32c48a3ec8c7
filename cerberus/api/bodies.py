"""Read the body of a request, within bounds of size and time."""

import asyncio
from typing import Any

import orjson
from starlette.requests import Request

from cerberus import documents
from cerberus.api import problems

MAX_BYTES, MAX_LABELS_BYTES = 64 * 1024, 1024 * 1024
_MAX_VALUES = 2**16  # of a large body: a megabyte of brackets would hold the loop for 50 ms


async def document(request: Request, example: str, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object, whatever the content type says.

    Args:
        request: Its body is read.
        example: A valid body, which the refusal of a wrong one shows.
        most_bytes: Refuses a longer body as soon as that many bytes have arrived.

    Raises:
        Refusal: The body is too large, is not a JSON object, or takes too long to arrive.
        InvalidInput: An object in it gives a name more than once; it names the field.

    Deadline: `CERBERUS_BODY_TIMEOUT_S`. Cost: a large body holds the loop for 5 ms, one at a time.
    """
    body = await _read(request, most_bytes)
    try:
        if len(body) > MAX_BYTES:
            async with request.app.state.parts.parsing:
                await asyncio.sleep(0)  # let other tasks run first
                _check_values(body)
                asked = documents.read(body)
        else:
            asked = documents.read(body)
    except orjson.JSONDecodeError as error:
        raise problems.Refusal("not_json", f"The body is not JSON: {error}.") from error
    if not isinstance(asked, dict):
        raise problems.Refusal("not_json", f"The body must be a JSON object such as {example}.")
    return asked


def _check_values(body: bytes) -> None:
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise problems.Refusal("too_large", f"The body has more than {_MAX_VALUES} values.")


async def _read(request: Request, most_bytes: int) -> bytes:
    # Known before a byte is read; the parser lets only digits pass.
    if int(request.headers.get("content-length", 0)) > most_bytes:
        raise _too_large(most_bytes)
    body = bytearray()
    deadline_s = request.app.state.parts.service.config.connections.body_s
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise _too_large(most_bytes)
    except TimeoutError as error:
        raise problems.Refusal(
            "body_timeout", f"The body did not arrive within {deadline_s:g} s."
        ) from error
    return bytes(body)


def _too_large(most_bytes: int) -> problems.Refusal:
    return problems.Refusal("too_large", f"The body has more than {most_bytes} bytes.")
