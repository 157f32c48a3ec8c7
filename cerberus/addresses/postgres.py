"""The address of Postgres: parsed once, and given to each client in its own form."""

import getpass
import os
import pathlib
import ssl
from dataclasses import dataclass, field
from typing import Any

from cerberus import errors
from cerberus.addresses import urls

SYSTEM = "system"
_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_VERIFY = ("verify-ca", "verify-full")
_STRICT = ("require", *_VERIFY)
_NO_BINDING = "asyncpg does not support it; use sslmode=verify-full, which also proves the identity"
_WRITES = "the service writes"
_LOGIN = "put the user name and the password before the host"
_NOT_SET = "remove it"

_KNOWN: dict[str, urls.Option] = {
    "host": str,
    "port": urls.whole(1, 65_535),
    "user": str,
    "password": str,
    "dbname": str,
    "sslmode": urls.one_of(*_MODES),
    "sslrootcert": str,
    "sslcert": str,
    "sslkey": str,
    "connect_timeout": urls.whole(0, 3_600),
    "application_name": str,
    "fallback_application_name": str,
    "options": str,
    "target_session_attrs": urls.one_of("any", "read-write", "primary", reason=_WRITES),
    # Accepted only with the values that hold in any case.
    "channel_binding": urls.one_of("prefer", "disable", reason=_NO_BINDING),
    "client_encoding": urls.one_of("UTF8", "utf8", "UTF-8", "utf-8"),
    "gssencmode": urls.one_of("prefer", "disable", reason="Kerberos is not supported"),
    "keepalives": urls.one_of("1"),
    "load_balance_hosts": urls.one_of("disable"),
    "sslcompression": urls.one_of("0"),
    "sslnegotiation": urls.one_of("postgres"),
    "sslsni": urls.one_of("1"),
}
_REFUSED = {
    "hostaddr": "give the address as the host",
    "passfile": _LOGIN,
    "service": "write the address out",
    "servicefile": "write the address out",
    "sslpassword": "give a key without a password",
    "sslcrl": _NOT_SET,
    "sslcrldir": _NOT_SET,
    "sslcertmode": _NOT_SET,
    "sslkeylogfile": _NOT_SET,
    "ssl_min_protocol_version": _NOT_SET,
    "ssl_max_protocol_version": _NOT_SET,
    "min_protocol_version": _NOT_SET,
    "max_protocol_version": _NOT_SET,
    "require_auth": _NOT_SET,
    "requirepeer": _NOT_SET,
    "requiressl": "write sslmode=require",
    "ssl": "write sslmode=require, or another sslmode",
    "krbsrvname": "Kerberos is not supported",
    "gsslib": "Kerberos is not supported",
    "gssdelegation": "Kerberos is not supported",
    "keepalives_idle": _NOT_SET,
    "keepalives_interval": _NOT_SET,
    "keepalives_count": _NOT_SET,
    "tcp_user_timeout": _NOT_SET,
    "replication": _NOT_SET,
    "scram_client_key": _LOGIN,
    "scram_server_key": _LOGIN,
    "oauth_issuer": _LOGIN,
    "oauth_client_id": _LOGIN,
    "oauth_client_secret": _LOGIN,
    "oauth_scope": _LOGIN,
    "database": "write dbname",
    "schema": "write options=-csearch_path%3DNAME",
    "currentSchema": "write options=-csearch_path%3DNAME",
    "statement_timeout": "write options=-cstatement_timeout%3DMS",
    "pgbouncer": "use a pooler in session mode and remove it",
    "connection_limit": "remove it: a process opens 8 connections at most",
    "pool_timeout": _NOT_SET,
}


@dataclass(frozen=True, slots=True)
class Postgres:
    """How to reach Postgres.

    Attributes:
        host: A name, an IP address, or the directory of a socket.
        connect_timeout_s: None for the client's default.
        sslmode: One of libpq's.
        sslrootcert: A file; `system` for the certificates of the system; empty for none.
        options: Of the session, in libpq's form.
    """

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    sslmode: str = "prefer"
    sslrootcert: str = ""
    sslcert: str = ""
    sslkey: str = ""
    connect_timeout_s: int | None = None
    application_name: str = ""
    options: str = ""
    target_session_attrs: str = "any"

    @property
    def on_socket(self) -> bool:
        """Whether the host is the directory of a socket."""
        return self.host.startswith("/")

    def libpq(self) -> dict[str, str]:
        """Return libpq's parameters that are not empty, the password included."""
        timeout_s = self.connect_timeout_s
        found = {
            "host": self.host,
            "port": str(self.port),
            "user": self.user,
            "password": self.password,
            "dbname": self.database,
            "sslmode": self.sslmode,
            "sslrootcert": self.sslrootcert,
            "sslcert": self.sslcert,
            "sslkey": self.sslkey,
            "connect_timeout": "" if timeout_s is None else str(timeout_s),
            "application_name": self.application_name,
            "options": self.options,
            "target_session_attrs": self.target_session_attrs,
        }
        return {k: v for k, v in found.items() if v and (k, v) != ("target_session_attrs", "any")}

    def url(self) -> str:
        """Return the address as a URL that libpq reads; with the password."""
        options = self.libpq()
        login, database = (urls.encoded(options.pop(name)) for name in ("user", "dbname"))
        if password := options.pop("password", ""):
            login += f":{urls.encoded(password)}"
        host = options["host"] if self.on_socket else options.pop("host")
        place = "" if self.on_socket else f"{urls.shown(host)}:{options.pop('port')}"
        query = "&".join(f"{name}={urls.encoded(value)}" for name, value in options.items())
        return f"postgresql://{login}@{place}/{database}?{query}"

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS context if TLS is required; None otherwise.

        Raises:
            ConfigError: A file cannot be read.
        """
        if self.sslmode not in _STRICT or self.on_socket:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.sslmode == "verify-full"
        if self.sslrootcert == SYSTEM:
            context.load_default_certs()
        elif self.sslrootcert:
            urls.trust(context, "DATABASE_URL: sslrootcert", self.sslrootcert)
        else:
            context.verify_mode = ssl.CERT_NONE
        if self.sslcert:
            said = "DATABASE_URL: sslcert and sslkey"
            urls.certify(context, said, self.sslcert, self.sslkey)
        context.set_alpn_protocols(["postgresql"])
        return context


def read(name: str, told: str) -> Postgres:
    """Read `postgresql://user:password@host:port/database?options`.

    Raises:
        ConfigError: It is missing or wrong; the message shows no part of it.
    """
    url = urls.split(name, told, ("postgres", "postgresql"))
    socket = urls.decoded(name, url.place).startswith("/")
    if not socket and url.place:
        host, port = urls.place(name, url.place, 0)
    else:
        host, port = urls.decoded(name, url.place), 0
    given: dict[str, Any] = urls.read_options(name, url.options, _KNOWN, _REFUSED)
    parts: dict[str, Any] = {
        "host": host,
        "port": port,
        "user": url.user,
        "password": url.password,
        "dbname": url.path,
    }
    for part, value in parts.items():
        if value and part in given:
            raise errors.ConfigError(f"{name} gives {part} twice")
        parts[part] = value or given.get(part) or value
    user = parts["user"] or _caller(name)
    return Postgres(
        host=_host(name, parts["host"]),
        port=parts["port"] or 5432,
        user=user,
        password=parts["password"],
        database=parts["dbname"] or user,
        connect_timeout_s=given.get("connect_timeout"),
        application_name=given.get("application_name", given.get("fallback_application_name", "")),
        options=given.get("options", ""),
        target_session_attrs=given.get("target_session_attrs", "any"),
        **_secured(name, given),
    )


def _host(name: str, told: str) -> str:
    if told.startswith("/") and "," not in told:
        return told
    return urls.place(name, f"[{told}]" if ":" in told else told, 0)[0] if told else "localhost"


def _caller(name: str) -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        raise errors.ConfigError(f"{name} names no user: write one before the host") from None


def _secured(name: str, given: dict[str, Any]) -> dict[str, str]:
    found = {key: given.get(key, "") for key in ("sslrootcert", "sslcert", "sslkey")}
    system = found["sslrootcert"] == SYSTEM
    mode = given.get("sslmode", "verify-full" if system else "prefer")
    if bool(found["sslcert"]) != bool(found["sslkey"]):
        raise errors.ConfigError(f"{name}: sslcert and sslkey go together: give both or neither")
    if system and mode != "verify-full":
        raise errors.ConfigError(f"{name}: sslrootcert=system needs sslmode=verify-full")
    if mode not in _STRICT and any(found.values()):
        raise errors.ConfigError(
            f"{name}: a certificate needs sslmode=require, verify-ca or verify-full"
        )
    if mode in _STRICT and not found["sslrootcert"]:
        # As libpq does.
        usual = pathlib.Path(os.path.expanduser("~/.postgresql/root.crt"))
        found["sslrootcert"] = str(usual) if usual.is_file() else ""
    if mode in _VERIFY and not found["sslrootcert"]:
        raise errors.ConfigError(
            f"{name}: sslmode={mode} needs sslrootcert, the file of the CA's certificate "
            "(or `system`, with verify-full)"
        )
    return found | {"sslmode": mode}
