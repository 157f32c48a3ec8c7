"""Who may call: the one check that every route but `/health/live` passes.

If keys are set, every caller must send one, callers on the same machine included. If none is set,
only a *direct local* caller is served. A loopback address alone does not prove that: a reverse
proxy on this machine has one too, and so has a local browser that runs a page from elsewhere. So a
caller without a key must also show no trace of a proxy (forwarding headers, or HTTP/1.0, which
nginx speaks by default), must ask for a loopback name (a rebound DNS name is not one), and must not
come from another origin. A proxy that leaves no trace cannot be detected: set a key wherever a
proxy stands in front.
"""

import functools
import hashlib
import hmac
import ipaddress
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cerberus import errors

_PROXIED = frozenset(
    (b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"cf-connecting-ip", b"true-client-ip")
)


class Forbidden(errors.CerberusError):
    """No key is set, so only direct callers on this machine are served; set CERBERUS_API_KEY."""


class Guard:
    """Lets a caller pass or refuses it.

    Args:
        keys: A caller must send one of them; without any, only direct local callers are served.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def check(self, scope: Mapping[str, Any]) -> None:
        """Let a caller pass, or raise. Cost: a few µs, the same for any wrong key.

        Args:
            scope: The request's ASGI scope.

        Raises:
            Unauthorized: Keys are set, and none of them was sent.
            Forbidden: No keys are set, and the caller is not a direct local one.
        """
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if self._digests:
            self._check_key(headers)
        else:
            _check_local(scope, headers)

    def _check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        known = False
        for sent in map(_digest, _sent_keys(headers)):
            for digest in self._digests:
                known |= hmac.compare_digest(sent, digest)
        if not known:
            raise errors.Unauthorized(
                "Send the key in the X-API-Key header, or as Authorization: Bearer <key>."
            )


def _digest(key: bytes) -> bytes:
    # Equal lengths, so that the comparison does not reveal the key's.
    return hashlib.sha256(key).digest()


def _sent_keys(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"x-api-key":
            yield value
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip()


def _check_local(scope: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]]) -> None:
    client = scope.get("client")
    if not client or not _loopback(client[0]):
        raise Forbidden
    if scope.get("http_version") == "1.0":
        raise Forbidden(_because("it speaks HTTP/1.0, as reverse proxies do"))
    hosts = 0
    for name, value in headers:
        if name in _PROXIED or name.startswith(b"x-forwarded-"):
            raise Forbidden(_because(f"a proxy sends the header {name.decode('latin-1')}"))
        if name == b"host":
            hosts += 1
            if not _loopback_url(b"//" + value):
                raise Forbidden(_because("the Host header is not a loopback name"))
        elif name == b"origin" and not _loopback_url(value):
            raise Forbidden(_because("the request comes from a page of another origin"))
    if hosts != 1:
        raise Forbidden(_because("there must be one Host header"))


def _because(reason: str) -> str:
    return f"{Forbidden()} This caller is not one: {reason}."


@functools.lru_cache(maxsize=256)
def _loopback_url(value: bytes) -> bool:
    try:
        host = urllib.parse.urlsplit(value.decode("ascii")).hostname
    except ValueError:
        return False
    return host is not None and _loopback(host)


@functools.lru_cache(maxsize=256)
def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
