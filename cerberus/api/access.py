"""Who may call: the one check that every route but `/health/live` passes.

If keys are set, every caller must send one, callers on the same machine included. A key in the URL
does not count, because URLs are kept in histories and logs.

With `CERBERUS_OPEN=loopback` and no key, a *direct local* caller is served. A loopback address
alone does not prove that: a reverse proxy on this machine has one too, and so has a local browser
that runs a page from elsewhere. So such a caller must also show no trace of a proxy (forwarding
headers, or HTTP/1.0), must ask for a loopback name (a rebound DNS name is not one), and must not be
a page of another origin, other ports of this machine included. A proxy that leaves no trace cannot
be detected, so callers without a key are served only if an operator has chosen it.
"""

import functools
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cerberus import errors, settings

_PROXIED = frozenset(
    (b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"cf-connecting-ip", b"true-client-ip")
)
_OURS = (b"same-origin", b"none")
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Headers of every answer: no page of another origin may read it, in old browsers too."""
# `urlsplit` would drop tabs and line ends, and accept text before an @ or after a ?.
_HOST = re.compile(rb"(localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)


class Forbidden(errors.CerberusError):
    """Without a key, only direct callers on this machine are served; set CERBERUS_API_KEY."""


class Guard:
    """Lets a caller pass or refuses it.

    Args:
        serving: If it has keys, a caller must send one of them. Otherwise direct local callers are
            served if it is open to them, and nobody else.
    """

    def __init__(self, serving: settings.Serving) -> None:
        self._digests = tuple(_digest(key.encode()) for key in serving.api_keys)
        self._open = serving.open_to == "loopback"

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
        elif self._open:
            _check_local(scope, headers)
        else:
            raise Forbidden

    def _check_key(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        known = False
        for sent in map(_digest, _sent_keys(headers)):
            for digest in self._digests:
                known |= hmac.compare_digest(sent, digest)
        if not known:
            raise errors.Unauthorized(
                "Send the key in the X-API-Key header, or as Authorization: Bearer <key>; "
                "a key in the URL is ignored."
            )


def _digest(key: bytes) -> bytes:
    # Equal lengths, so that the comparison does not reveal the key's.
    return hashlib.sha256(key).digest()


def _sent_keys(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        # Spaces and tabs around a value do not belong to it, and not every parser removes them.
        if name == b"x-api-key":
            yield value.strip(b" \t")
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield value[7:].strip(b" \t")


def _check_local(scope: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]]) -> None:
    client = scope.get("client")
    if not client or not _loopback(client[0]):
        raise Forbidden
    if scope.get("http_version") == "1.0":
        raise Forbidden(_because("it speaks HTTP/1.0, as reverse proxies do"))
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1:
        raise Forbidden(_because("there must be one Host header"))
    if not _loopback_host(hosts[0]):
        raise Forbidden(_because("the Host header is not a loopback name"))
    for name, value in headers:
        if name in _PROXIED or name.startswith(b"x-forwarded-"):
            raise Forbidden(_because(f"a proxy sends the header {name.decode('latin-1')}"))
        if (name == b"sec-fetch-site" and value not in _OURS) or (
            name == b"origin" and value.lower() != _origin(scope, hosts[0])
        ):
            raise Forbidden(_because("the request comes from a page of another origin"))


def _because(reason: str) -> str:
    return f"{Forbidden()} This caller is not one: {reason}."


def _origin(scope: Mapping[str, Any], host: bytes) -> bytes:
    return f"{scope.get('scheme', 'http')}://".encode() + host.lower()


@functools.lru_cache(maxsize=256)
def _loopback_host(value: bytes) -> bool:
    found = _HOST.fullmatch(value)
    return found is not None and _loopback(found[1].decode().strip("[]").lower())


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
