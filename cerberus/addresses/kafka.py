"""The addresses of Kafka's brokers."""

import ipaddress
from dataclasses import dataclass

from cerberus import errors
from cerberus.addresses import urls


@dataclass(frozen=True, slots=True)
class Broker:
    """One broker."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        return f"{urls.shown(self.host)}:{self.port}"

    @property
    def on_loopback(self) -> bool:
        """Whether it is on this machine, by its address alone."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read(name: str, told: str) -> tuple[str, ...]:
    """Read addresses of brokers that have the same scheme; they are returned as written.

    Raises:
        ConfigError: One is missing or wrong; the message shows no part of it.
    """
    addresses = tuple(word for part in told.split(",") if (word := part.strip()))
    if not addresses:
        raise errors.ConfigError("KAFKA_BROKER is not set: give host:port of a Kafka broker")
    found = [_broker(f"{name}: address {n}", each) for n, each in enumerate(addresses, 1)]
    if len({each.tls for each in found}) > 1:
        raise errors.ConfigError(f"{name} mixes kafka:// and kafka+ssl://; use one of them")
    return addresses


def parsed(address: str) -> Broker:
    """Parse one of the addresses that `read` returned."""
    return _broker("KAFKA_BROKER", address)


def _broker(said: str, address: str) -> Broker:
    url_text = address if "://" in address else f"kafka://{address}"
    try:
        url = urls.split(said, url_text, ("kafka", "kafka+ssl"))
        host, port = urls.place(said, url.place, 9092)
    except errors.ConfigError:
        url = None
    if url is None or url.user or url.password or url.path or url.options:
        # Not the address itself: it may hold a password.
        raise errors.ConfigError(
            f"{said} is not host:port or kafka+ssl://host:port; "
            "a user name and a password belong in KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
        )
    return Broker(host, port, url.scheme == "kafka+ssl")
