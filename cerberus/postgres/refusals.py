"""Turn an answer of Postgres about a wrong setting or a missing permission into one sentence."""

import contextlib
import re
import ssl
from collections.abc import Iterator

import asyncpg

from cerberus import errors

REFUSED = (
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ClientConfigurationError,
    ssl.SSLCertVerificationError,
)
_OPTIONS = (
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.InvalidParameterValueError,
    asyncpg.PostgresSyntaxError,
    asyncpg.UndefinedObjectError,
)
_USER = "TO the user of DATABASE_URL"
_CURES = (
    (r'permission denied for database "?(.+?)"?$', rf"GRANT CONNECT ON DATABASE \1 {_USER}"),
    (r"permission denied for schema (.+)", rf"GRANT USAGE, CREATE ON SCHEMA \1 {_USER}"),
    (r"no schema has been selected", f"GRANT USAGE, CREATE ON SCHEMA public {_USER}"),
    (r"permission denied for (?:table|view|relation) (.+)", rf"GRANT ALL ON \1 {_USER}"),
    (r"permission denied for sequence (.+)", rf"GRANT ALL ON SEQUENCE \1 {_USER}"),
    (r"must be owner of (?:table|relation) (.+)", rf"ALTER TABLE \1 OWNER {_USER}"),
    (r"must be owner of view (.+)", rf"ALTER VIEW \1 OWNER {_USER}"),
)


def denied(said: str) -> errors.ConfigError:
    """Say what is denied, and which statement grants it."""
    for pattern, cure in _CURES:
        if found := re.match(pattern, said):
            return errors.ConfigError(
                f"DATABASE_URL: Postgres refuses it: {said}; as the owner, run: "
                f"{found.expand(cure)}"
            )
    return errors.ConfigError(f"DATABASE_URL: Postgres refuses it: {said}")


def sentence(error: BaseException) -> errors.ConfigError:
    """Say what Postgres refuses, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return errors.ConfigError(
            f"DATABASE_URL: the certificate of Postgres is refused: {error.verify_message}; "
            "sslrootcert must hold its CA"
        )
    return denied(lines[0] if (lines := str(error).splitlines()) else type(error).__name__)


@contextlib.contextmanager
def connecting() -> Iterator[None]:
    """Translate errors that the address's options cause while a connection is opened.

    Raises:
        ConfigError: Postgres refuses an option, or does not support TLS.
    """
    try:
        yield
    except _OPTIONS as error:
        raise errors.ConfigError(f"DATABASE_URL: options: {str(error).splitlines()[0]}") from error
    except ConnectionError as error:
        if "rejected SSL upgrade" not in str(error):
            raise
        raise errors.ConfigError(
            "DATABASE_URL: Postgres does not support TLS, which sslmode requires: turn TLS on there"
        ) from error


async def check_rights(connection: asyncpg.Connection) -> None:
    """Check that tables can be created.

    Raises:
        ConfigError: They cannot; the message has the statement that changes it.
    """
    schema, allowed = await connection.fetchrow(
        "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE')"
    )
    if schema is None:
        raise denied("no schema has been selected to create in")
    if not allowed:
        raise denied(f"permission denied for schema {schema}")
