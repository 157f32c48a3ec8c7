"""Which heads of requests are refused before a route sees them: what can be read in two ways."""

from collections.abc import Iterable
from typing import Any

from cerberus import settings


class Refused(Exception):
    """A request is refused, and its connection ends.

    Attributes:
        code: Of the problem.
        detail: For people; empty if the client is not told.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


def check(
    parser: Any,
    target: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    limits: settings.Connections,
) -> int:
    """Return the length of the body that a head declares; 0 if it declares none.

    Args:
        parser: httptools' parser of it.
        target: As the request line has it.
        headers: Their names are in lower case.
        limits: Of its size.

    Raises:
        Refused: It is too large, no HTTP/1.1, or can be read in two ways.
    """
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise Refused("bad_request", f"HTTP/{version} is not supported; use HTTP/1.1.")
    if parser.get_method() == b"CONNECT":
        raise Refused("bad_request", "CONNECT is for proxies, and this server is none.")
    if len(target) > limits.target_bytes:
        detail = f"The request target has more than {limits.target_bytes} bytes."
        raise Refused("target_too_long", detail)
    size, length, hosts = len(target), 0, []
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts.append(value)
        elif name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding" and (value.lower(), version) != (b"chunked", "1.1"):
            detail = "Transfer-Encoding can only be chunked, in HTTP/1.1."
            raise Refused("bad_request", detail)
    if size > limits.head_bytes:
        raise too_large(limits)
    if len(hosts) != 1 and (hosts or version == "1.1"):
        raise Refused("bad_request", "A request must have one Host header.")
    if target[:1] not in (b"/", b"*") and [_authority(target)] != [h.lower() for h in hosts]:
        raise Refused("bad_request", "The request target and the Host header name two servers.")
    return length


def too_large(limits: settings.Connections) -> Refused:
    """Return the refusal of a head with too many bytes."""
    return Refused("head_too_large", f"The head has more than {limits.head_bytes} bytes.")


def _authority(target: bytes) -> bytes:
    return target.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0].lower()
