"""Read the body of a request, within bounds of size and time."""

import asyncio
from typing import Any

import orjson
from starlette.requests import Request

from cerberus import documents
from cerberus.api import problems

MAX_BYTES, MAX_LABELS_BYTES = 64 * 1024, 1024 * 1024
_DEADLINE_S = 10.0


async def document(request: Request, example: str, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object, whatever the content type says.

    Args:
        request: Its body is read.
        example: A right body, for the refusal of a wrong one.
        most_bytes: Refuses a longer body as soon as that many bytes have arrived.

    Raises:
        Refusal: The body is too large, no JSON object, or takes more than 10 s.
        InvalidInput: An object in it gives a name more than once; it names the field.

    Deadline: 10 s.
    """
    try:
        asked = documents.read(await _read(request, most_bytes))
    except orjson.JSONDecodeError as error:
        raise problems.Refusal("not_json", f"The body is not JSON: {error}.") from error
    if not isinstance(asked, dict):
        raise problems.Refusal("not_json", f"The body must be a JSON object such as {example}.")
    return asked


async def _read(request: Request, most_bytes: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_DEADLINE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise problems.Refusal(
                        "too_large", f"The body has more than {most_bytes} bytes."
                    )
    except TimeoutError as error:
        raise problems.Refusal(
            "body_timeout", f"The body did not arrive within {_DEADLINE_S:g} s."
        ) from error
    return bytes(body)
