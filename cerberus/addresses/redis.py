"""The address of Redis, parsed once."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cerberus import errors
from cerberus.addresses import urls

_WHO = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
_LOGIN = "write it before the host"


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("true or false")
    return value.lower() in ("true", "1", "yes")


def _requirement(value: str) -> ssl.VerifyMode:
    word = value.lower().removeprefix("cert_")
    if word not in _WHO:
        raise ValueError("none, optional or required")
    return _WHO[word]


_KNOWN: dict[str, urls.Option] = {
    "db": urls.whole(0, 2**31 - 1),
    "ssl_cert_reqs": _requirement,
    "ssl_check_hostname": _switch,
    "ssl_ca_certs": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "socket_timeout": urls.seconds(0.001, 60),
    "socket_connect_timeout": urls.seconds(0.001, 60),
    "socket_keepalive": _switch,
    "health_check_interval": urls.whole(0, 3_600),
    "max_connections": urls.whole(1, 10_000),
    "protocol": urls.one_of("2"),
}
_REFUSED = {
    "username": _LOGIN,
    "password": _LOGIN,
    "ssl": "write rediss://",
    "tls": "write rediss://",
    "ssl_ca_data": "give a file in ssl_ca_certs",
    "ssl_ca_path": "give a file in ssl_ca_certs",
    "ssl_password": "give a key without a password",
    "decode_responses": "remove it",
    "timeout": "write socket_timeout",
}


@dataclass(frozen=True, slots=True)
class Redis:
    """How to reach Redis.

    Attributes:
        database: Its number.
        tls: Whether to speak TLS.
        options: Further arguments for redis-py's clients.
    """

    host: str
    port: int
    username: str
    password: str = field(repr=False)
    database: int
    tls: bool
    options: Mapping[str, Any]

    def url(self) -> str:
        """Return the address without its options, but with the password."""
        login = f":{urls.encoded(self.password)}@" if self.password else ""
        scheme = "rediss" if self.tls else "redis"
        place = f"{urls.shown(self.host)}:{self.port}"
        return f"{scheme}://{urls.encoded(self.username)}{login}{place}/{self.database}"

    def check_files(self) -> None:
        """Read the certificate files that the address names.

        Raises:
            ConfigError: One cannot be read.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if "ssl_ca_certs" in self.options:
            urls.trust(context, "REDIS_URL: ssl_ca_certs", self.options["ssl_ca_certs"])
        if "ssl_certfile" in self.options:
            files = self.options["ssl_certfile"], self.options["ssl_keyfile"]
            urls.certify(context, "REDIS_URL: ssl_certfile and ssl_keyfile", *files)


def read(name: str, told: str) -> Redis:
    """Read `redis://user:password@host:port/number?options`, or `rediss://` for TLS.

    Raises:
        ConfigError: It is missing or wrong; the message shows no part of it.
    """
    url = urls.split(name, told, ("redis", "rediss"))
    host, port = urls.place(name, url.place, 6379) if url.place else ("localhost", 6379)
    if url.user and not url.password:
        raise errors.ConfigError(
            f"{name} has a user name but no password; a password alone is written :PASSWORD@"
        )
    given: dict[str, Any] = urls.read_options(name, url.options, _KNOWN, _REFUSED)
    if url.path:
        if "db" in given:
            raise errors.ConfigError(f"{name} gives the database number twice: remove one")
        try:
            given["db"] = _KNOWN["db"](url.path)
        except ValueError as error:
            raise errors.ConfigError(
                f"{name}: the database, after the host, must be {error}"
            ) from None
    tls = url.scheme == "rediss"
    if not tls and (of_tls := [key for key in given if key.startswith("ssl_")]):
        raise errors.ConfigError(f"{name}: {of_tls[0]} needs a rediss:// address")
    if ("ssl_certfile" in given) != ("ssl_keyfile" in given):
        raise errors.ConfigError(
            f"{name}: ssl_certfile and ssl_keyfile go together: give both or neither"
        )
    if given.get("ssl_cert_reqs") == ssl.CERT_NONE:
        given["ssl_check_hostname"] = False
    given.pop("protocol", None)
    database = given.pop("db", 0)
    return Redis(host, port, url.user, url.password, database, tls, given)
