"""Give asyncpg the whole address of Postgres, so that it reads no other source."""

from typing import Any

from cerberus.addresses import postgres as addresses

CONNECT_S, LONGEST_CONNECT_S = 5, 10


def options(address: addresses.Postgres) -> dict[str, Any]:
    """Return the arguments of `asyncpg.connect` for an address.

    It sets every argument that asyncpg would otherwise read from variables, such as PGPASSWORD.

    Raises:
        ConfigError: A file of certificates cannot be read.
    """
    tls = address.tls()
    mode = "disable" if address.on_socket else address.sslmode
    timeout_s = CONNECT_S if address.connect_timeout_s is None else address.connect_timeout_s
    named = {"application_name": address.application_name, "options": address.options}
    return {
        "host": address.host,
        "port": address.port,
        "user": address.user,
        "password": address.password,
        "database": address.database,
        "ssl": tls if tls is not None else mode,
        "direct_tls": False,
        "target_session_attrs": address.target_session_attrs,
        "gsslib": "gssapi",
        "krbsrvname": "postgres",
        # 0 is libpq's "for ever".
        "timeout": min(timeout_s or LONGEST_CONNECT_S, LONGEST_CONNECT_S),
        "server_settings": {name: value for name, value in named.items() if value},
    }
