"""How to reach the servers: the groups of settings that hold their addresses and secrets."""

from dataclasses import dataclass

from cerberus.addresses import kafka as kafka_addresses
from cerberus.addresses import postgres as postgres_addresses
from cerberus.addresses import redis as redis_addresses
from cerberus.environment import (  # the vocabulary of the declarations below
    REQUIRED,
    Variable,
    choice,
    first_of,
    flag,
    matching,
    text,
    variable,
)


@dataclass(frozen=True, slots=True)
class Kafka:
    """How to reach the brokers."""

    addresses: tuple[str, ...] = first_of(
        Variable("KAFKA_BROKER", REQUIRED, "`host:port`, comma separated; or `KAFKA_URL`"),
        Variable("KAFKA_URL", "", "`kafka://` or `kafka+ssl://` addresses, comma separated"),
        read=kafka_addresses.read,
    )
    prefix: str = variable(
        "KAFKA_PREFIX",
        "",
        matching("[A-Za-z0-9._-]{0,200}", "letters, digits, dots, dashes, underscores"),
        "prefix of the names of topics and consumer groups",
    )
    ca_pem: str = variable(
        "KAFKA_TRUSTED_CERT", "", text, "CA's certificate, PEM; empty = the system's", secret=True
    )
    client_pem: str = variable(
        "KAFKA_CLIENT_CERT", "", text, "certificate of the client, PEM", secret=True
    )
    client_key_pem: str = variable(
        "KAFKA_CLIENT_CERT_KEY", "", text, "private key of that certificate, PEM", secret=True
    )
    sasl_mechanism: str = variable(
        "KAFKA_SASL_MECHANISM",
        "",
        choice("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
        "`PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`; empty = no password",
    )
    sasl_username: str = variable(
        "KAFKA_SASL_USERNAME", "", text, "user name of the service at the brokers", secret=True
    )
    sasl_password: str = variable(
        "KAFKA_SASL_PASSWORD", "", text, "password of the service at the brokers", secret=True
    )

    @property
    def bootstrap(self) -> tuple[str, ...]:
        """The brokers, "host:port" each."""
        return tuple(str(kafka_addresses.parsed(address)) for address in self.addresses)

    @property
    def tls(self) -> bool:
        """Whether to speak TLS."""
        return kafka_addresses.parsed(self.addresses[0]).tls

    @property
    def on_loopback(self) -> bool:
        """Whether every broker is on this machine."""
        return all(kafka_addresses.parsed(address).on_loopback for address in self.addresses)

    def topic(self, name: str) -> str:
        """Return the full name of a topic or group."""
        return self.prefix + name


@dataclass(frozen=True, slots=True)
class Redis:
    """How to reach Redis."""

    address: redis_addresses.Redis = first_of(
        Variable("REDIS_TLS_URL", "", "used instead of `REDIS_URL` if a platform sets both"),
        Variable("REDIS_URL", REQUIRED, "`redis://` or `rediss://` address"),
        read=redis_addresses.read,
        secret=True,
    )
    tls_verify: bool = variable(
        "REDIS_TLS_VERIFY", "1", flag, "0 accepts a self-signed certificate"
    )
    cluster: bool = variable(
        "REDIS_CLUSTER", "0", flag, "1 if `REDIS_URL` is a node of a Redis Cluster"
    )

    @property
    def url(self) -> str:
        """The address, with the password."""
        return self.address.url()


@dataclass(frozen=True, slots=True)
class Postgres:
    """How to reach Postgres."""

    address: postgres_addresses.Postgres = variable(
        "DATABASE_URL",
        REQUIRED,
        postgres_addresses.read,
        "`postgres://` or `postgresql://` address",
        secret=True,
    )

    @property
    def url(self) -> str:
        """The address as libpq reads it, with the password."""
        return self.address.url()
