"""Parse the URL of a server strictly, so that no client parses its text differently.

Errors name the faulty part without its value: after a character that is not encoded, the rest of a
password looks like another part of the URL.
"""

import difflib
import ipaddress
import re
import ssl
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cerberus import errors

_ENCODE = (
    "percent-encode special characters in its user name and password "
    "(% is %25, @ is %40, # is %23, / is %2F, ? is %3F)"
)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")

Option = Callable[[str], object]
"""Reads the value of an option; raises ValueError with what it must be."""


@dataclass(frozen=True, slots=True)
class Url:
    """The parts of a URL, decoded; empty where it has none.

    Attributes:
        scheme: In lower case.
        user: Before the host.
        password: Before the host.
        place: `host:port`, still encoded.
        path: After the host, without its first slash.
        options: After the question mark, by name.
    """

    scheme: str
    user: str
    password: str = field(repr=False)
    place: str
    path: str
    options: Mapping[str, str] = field(repr=False)


def split(name: str, told: str, schemes: Sequence[str]) -> Url:
    """Split the URL that a variable holds.

    Raises:
        ConfigError: It is missing or wrong; the message names the variable and shows no value.
    """
    wanted = " or ".join(f"{scheme}://" for scheme in schemes)
    if not told:
        raise errors.ConfigError(f"{name} is not set: give a {wanted} address")
    scheme, found, rest = told.partition("://")
    if not found or scheme.lower() not in schemes:
        raise errors.ConfigError(f"{name} must begin with {wanted}")
    if not rest.isprintable() or " " in rest:
        raise errors.ConfigError(
            f"{name} contains a space or a character that cannot be printed: percent-encode it"
        )
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    after = rest[len(authority) :]
    # An @ after the host belongs to a password with a slash, question mark or number sign.
    if authority.count("@") > 1 or "@" in after or "#" in after or _BAD_PERCENT.search(rest):
        raise errors.ConfigError(f"{name} is not an address: {_ENCODE}")
    login, _, place = authority.rpartition("@")
    user, _, password = login.partition(":")
    path, _, query = after.partition("?")
    return Url(
        scheme.lower(),
        decoded(name, user),
        decoded(name, password),
        place,
        decoded(name, path[1:]),
        _options(name, query),
    )


def decoded(name: str, part: str) -> str:
    """Decode a part of the URL that a variable holds.

    Raises:
        ConfigError: It is not UTF-8, or contains a NUL.
    """
    try:
        text = urllib.parse.unquote(part, errors="strict")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        # From None: the error holds the part.
        raise errors.ConfigError(
            f"{name} is not an address: it contains %00, or bytes that are not UTF-8"
        ) from None
    return text


def encoded(part: str) -> str:
    """Encode a part of a URL, whatever it contains."""
    return urllib.parse.quote(part, safe="")


def _options(name: str, query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, pair in enumerate(query.split("&") if query else (), 1):
        key, _, value = pair.partition("=")
        if not re.fullmatch("[A-Za-z_]+", key) or not value:
            raise errors.ConfigError(f"{name}: option {number} is not NAME=VALUE")
        if key in found:
            raise errors.ConfigError(f"{name}: option {number} repeats an earlier one: remove one")
        found[key] = decoded(name, value)
    return found


def read_options(
    name: str, given: Mapping[str, str], known: Mapping[str, Option], refused: Mapping[str, str]
) -> dict[str, object]:
    """Read the options of a URL.

    Args:
        name: Of the variable.
        given: As `Url.options`.
        known: How each is read.
        refused: Options of other clients that are not supported, with what to do instead.

    Raises:
        ConfigError: One is unknown, refused or has a wrong value.
    """
    read: dict[str, object] = {}
    for number, (key, value) in enumerate(given.items(), 1):
        if key in refused:
            raise errors.ConfigError(f"{name}: {key} is not supported: {refused[key]}")
        if key not in known:
            # Without the name, which may be part of a password.
            like = difflib.get_close_matches(key, known, n=1)
            raise errors.ConfigError(
                f"{name}: option {number} is unknown; "
                + (f"did you mean {like[0]}?" if like else f"known are {', '.join(known)}")
            )
        try:
            read[key] = known[key](value)
        except ValueError as error:
            raise errors.ConfigError(f"{name}: {key} must be {error}") from None
    return read


def one_of(*allowed: str, reason: str = "") -> Option:
    """Make a reader of one of these values."""

    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(" or ".join(allowed) + (f": {reason}" if reason else ""))
        return value

    return read


def whole(low: int, high: int) -> Option:
    """Make a reader of whole numbers."""

    def read(value: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", value) or not low <= int(value) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(value)

    return read


def seconds(low: float, high: float) -> Option:
    """Make a reader of numbers of seconds."""

    def read(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return float(value)

    return read


def place(name: str, told: str, default_port: int) -> tuple[str, int]:
    """Read `host:port`; an IPv6 address is in brackets, which are removed.

    Raises:
        ConfigError: It names several hosts, or one that cannot exist.
    """
    if "," in told:
        raise errors.ConfigError(
            f"{name} names several hosts: give one address that leads to the server that "
            "takes writes"
        )
    host, colon, port = told.rpartition(":") if re.search(r":[^\]]*$", told) else (told, "", "")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host.strip("[]") if bracketed else decoded(name, host)
    if not (_is_ipv6(host) if bracketed else _HOST.fullmatch(host)):
        raise errors.ConfigError(
            f"{name} names no host: write a name of ASCII letters, an IPv4 address, or an "
            "IPv6 address in brackets"
        )
    if not colon:
        return host, default_port
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise errors.ConfigError(f"{name}: the port must be a number from 1 to 65535")
    return host, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def shown(host: str) -> str:
    """Write a host as URLs do: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def trust(context: ssl.SSLContext, said: str, file: str) -> None:
    """Trust the CA certificates in a file.

    Raises:
        ConfigError: It cannot be read; the message begins with `said`.
    """
    try:
        context.load_verify_locations(cafile=file)
    except (OSError, ValueError) as error:
        raise errors.ConfigError(
            f"{said} is not a file of certificates in PEM: {_why(error)}"
        ) from None


def certify(context: ssl.SSLContext, said: str, certificate: str, key: str) -> None:
    """Load the client certificate that servers ask for.

    Raises:
        ConfigError: One of the files cannot be read; the message begins with `said`.
    """
    try:
        # A password, or OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise errors.ConfigError(
            f"{said} are not a certificate and its key in PEM, without a password: {_why(error)}"
        ) from None


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "it contains none").replace("_", " ").lower()
    return getattr(error, "strerror", None) or "its path cannot be used"
