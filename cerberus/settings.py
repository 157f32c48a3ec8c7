"""All settings of a process: read once from its environment."""

import ipaddress
import pathlib
import re
import ssl
import tempfile
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cerberus import environment, errors

MODEL_PATH = pathlib.Path(__file__).parent.parent / "models" / "fraud_model.json"
POLICY_PATH = MODEL_PATH.with_name("policy.json")
AUTO_RATE = 2.0
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_LONGEST_S = 23 * 86_400  # ages in a packed window have 32 bits of ms


@dataclass(frozen=True, slots=True)
class Kafka:
    """How to reach the brokers.

    Attributes:
        bootstrap: "host:port" each.
        prefix: Put before the names of topics and of the group, dot included.
        tls: Whether to speak TLS.
        ca_pem: The CA's certificate; empty trusts the system's.
        client_pem: Certificate and key of the client; empty strings when there are none.
        sasl: Mechanism, user name and password; empty strings when there are none.
    """

    bootstrap: tuple[str, ...]
    prefix: str = ""
    tls: bool = False
    ca_pem: str = ""
    client_pem: tuple[str, str] = ("", "")
    sasl: tuple[str, str, str] = ("", "", "")

    @property
    def on_loopback(self) -> bool:
        """Whether every broker is on this machine."""
        return all(_loopback(address.rpartition(":")[0]) for address in self.bootstrap)

    def topic(self, name: str) -> str:
        """Return the full name of a topic or group."""
        return self.prefix + name

    def client_options(self) -> dict[str, Any]:
        """Return what every Kafka client is built with.

        Raises:
            ConfigError: The certificates cannot be read.
        """
        mechanism, username, password = self.sasl
        options: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap),
            "security_protocol": ("SASL_" if mechanism else "")
            + ("SSL" if self.tls else "PLAINTEXT"),
        }
        if self.tls:
            options["ssl_context"] = self._ssl_context()
        if mechanism:
            options |= {
                "sasl_mechanism": mechanism,
                "sasl_plain_username": username,
                "sasl_plain_password": password,
            }
        return options

    def _ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cadata=self.ca_pem or None)
            # A platform's own CA signs certificates that carry no host name.
            context.check_hostname = not self.ca_pem
            if all(self.client_pem):
                with tempfile.NamedTemporaryFile("w") as file:  # created with mode 0600
                    file.write("\n".join(self.client_pem))
                    file.flush()
                    context.load_cert_chain(file.name)
        except (ssl.SSLError, ValueError) as error:
            raise errors.ConfigError(
                f"KAFKA_TRUSTED_CERT, KAFKA_CLIENT_CERT or KAFKA_CLIENT_CERT_KEY: {error}"
            ) from error
        return context


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a process is told; `environment` gives names, units and defaults."""

    kafka: Kafka
    redis_url: str
    redis_tls_verify: bool
    redis_cluster: bool
    database_url: str
    api_keys: tuple[str, ...]
    tasks: frozenset[str]
    rate: float
    rate_reason: str
    seed: int
    users: int
    first_user_id: int
    currency: str
    partitions: int
    replication: int
    spans: tuple[str, ...]
    replay_span_ms: int
    allowed_lateness_ms: int
    max_future_skew_ms: int
    max_staleness_ms: int
    max_rejected_share: float
    session_timeout_ms: int
    materialize_s: float
    retention_days: int
    resend_s: float
    max_in_flight: int
    read_timeout_ms: int
    claim_ms: int
    decision_flush_ms: int
    decision_buffer: int
    label_maturity_ms: int
    friendly_fraud_is_fraud: bool
    synthetic_label_delay_s: float
    model_path: pathlib.Path
    policy_path: pathlib.Path
    log_level: str

    @property
    def plan_path(self) -> pathlib.Path:
        """Where the feature plan stands: beside the model."""
        return self.model_path.with_name("feature_plan.json")

    def __repr__(self) -> str:
        """Show the settings without secrets."""
        secret = {"kafka", "redis_url", "database_url", "api_keys"}
        shown = (
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in secret
        )
        return f"Settings({', '.join(shown)})"


def load(environ: Mapping[str, str]) -> Settings:
    """Read all settings.

    Raises:
        ConfigError: naming the variable that is missing or wrong.
    """
    read = environment.Reader(environ)
    kafka = _kafka(read)
    rate, rate_reason = _rate(read, kafka)
    return Settings(
        kafka=kafka,
        redis_url=_url(
            read, "REDIS_TLS_URL" if read.text("REDIS_TLS_URL") else "REDIS_URL", "redis", "rediss"
        ),
        redis_tls_verify=read.flag("REDIS_TLS_VERIFY"),
        redis_cluster=read.flag("REDIS_CLUSTER"),
        database_url=_url(read, "DATABASE_URL", "postgres", "postgresql"),
        api_keys=read.words("CERBERUS_API_KEY"),
        tasks=_tasks(read),
        rate=rate,
        rate_reason=rate_reason,
        seed=read.integer("CERBERUS_SEED", 0, 2**31),
        users=read.integer("CERBERUS_USERS", 1, 10_000_000),
        first_user_id=read.integer("CERBERUS_FIRST_USER_ID", 0, 2**53),
        currency=read.matching("CERBERUS_CURRENCY", "[A-Z]{3}", "three capital letters"),
        partitions=read.integer("CERBERUS_PARTITIONS", 1, 1000),
        replication=read.integer("CERBERUS_REPLICATION", -1, 10),
        spans=_spans(read),
        replay_span_ms=read.ms("CERBERUS_REPLAY_SPAN_S", 1, 86_400),
        allowed_lateness_ms=read.ms("CERBERUS_ALLOWED_LATENESS_S", 0, 86_400),
        max_future_skew_ms=read.ms("CERBERUS_MAX_FUTURE_SKEW_S", 0, 3_600),
        max_staleness_ms=read.ms("CERBERUS_MAX_STALENESS_S", 1, 86_400),
        max_rejected_share=read.number("CERBERUS_MAX_REJECTED_SHARE", 0, 1),
        session_timeout_ms=read.ms("CERBERUS_SESSION_TIMEOUT_S", 6, 300),
        materialize_s=read.number("CERBERUS_MATERIALIZE_S", 1, 86_400),
        retention_days=_retention(read),
        resend_s=read.number("CERBERUS_RESEND_S", 1, 86_400),
        max_in_flight=read.integer("CERBERUS_MAX_IN_FLIGHT", 1, 100_000),
        read_timeout_ms=read.integer("CERBERUS_READ_TIMEOUT_MS", 1, 60_000),
        claim_ms=read.ms("CERBERUS_CLAIM_S", 60, 86_400),
        decision_flush_ms=read.integer("CERBERUS_DECISION_FLUSH_MS", 10, 10_000),
        decision_buffer=read.integer("CERBERUS_DECISION_BUFFER", 100, 10_000_000),
        label_maturity_ms=round(read.number("CERBERUS_LABEL_MATURITY_DAYS", 0, 3_650) * 86_400_000),
        friendly_fraud_is_fraud=read.flag("CERBERUS_FRIENDLY_FRAUD_IS_FRAUD"),
        synthetic_label_delay_s=read.number("CERBERUS_SYNTHETIC_LABEL_DELAY_S", 0, 31_536_000),
        model_path=pathlib.Path(environ.get("CERBERUS_MODEL") or MODEL_PATH),
        policy_path=pathlib.Path(environ.get("CERBERUS_POLICY") or POLICY_PATH),
        log_level=read.matching(
            "CERBERUS_LOG_LEVEL", "DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR"
        ),
    )


def _kafka(read: environment.Reader) -> Kafka:
    name = "KAFKA_BROKER" if read.text("KAFKA_BROKER") else "KAFKA_URL"
    addresses = read.words(name)
    if not addresses:
        raise errors.ConfigError("KAFKA_BROKER is not set: give host:port of a Kafka broker")
    bootstrap: list[str] = []
    schemes = set()
    for address in addresses:
        url = urllib.parse.urlsplit(address if "://" in address else f"kafka://{address}")
        try:
            host, port = url.hostname, url.port or 9092
        except ValueError:
            host, port = None, 0
        if not host or url.scheme not in ("kafka", "kafka+ssl") or "@" in url.netloc:
            # Not the address itself: it may hold a password.
            raise errors.ConfigError(
                f"{name}: address {len(bootstrap) + 1} is not host:port or kafka+ssl://host:port; "
                "a user name and a password belong in KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD"
            )
        bootstrap.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        schemes.add(url.scheme)
    if len(schemes) > 1:
        raise errors.ConfigError(f"{name} mixes kafka:// and kafka+ssl://; use one of them")
    return Kafka(
        bootstrap=tuple(bootstrap),
        prefix=read.matching(
            "KAFKA_PREFIX", "[A-Za-z0-9._-]{0,200}", "letters, digits, dots, dashes, underscores"
        ),
        tls=schemes == {"kafka+ssl"},
        ca_pem=read.text("KAFKA_TRUSTED_CERT"),
        client_pem=(read.text("KAFKA_CLIENT_CERT"), read.text("KAFKA_CLIENT_CERT_KEY")),
        sasl=_sasl(read),
    )


def _sasl(read: environment.Reader) -> tuple[str, str, str]:
    mechanism = read.matching(
        "KAFKA_SASL_MECHANISM",
        "|PLAIN|SCRAM-SHA-256|SCRAM-SHA-512",
        "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512",
    )
    names = ("KAFKA_SASL_USERNAME", "KAFKA_SASL_PASSWORD")
    username, password = map(read.text, names)
    for name, value in zip(names, (username, password), strict=True):
        if bool(value) != bool(mechanism):
            raise errors.ConfigError(
                f"{name} and KAFKA_SASL_MECHANISM go together: set both or neither"
            )
    return mechanism, username, password


def _url(read: environment.Reader, name: str, *schemes: str) -> str:
    value = read.text(name)
    wanted = " or ".join(f"{scheme}://" for scheme in schemes)
    if not value:
        raise errors.ConfigError(f"{name} is not set: give a {wanted} address")
    try:
        url = urllib.parse.urlsplit(value)
        _ = url.port  # asking for it judges it
    except ValueError:
        # What is wrong may be a part of the password.
        raise errors.ConfigError(
            f"{name} is no address: percent-encode what is special in its user name and password"
        ) from None
    if url.scheme not in schemes:
        raise errors.ConfigError(f"{name} must begin with {wanted}")
    return value


def _rate(read: environment.Reader, kafka: Kafka) -> tuple[float, str]:
    if read.text("CERBERUS_RATE") != "auto":
        return read.number("CERBERUS_RATE", 0, 100_000), "CERBERUS_RATE sets it"
    if kafka.on_loopback:
        return AUTO_RATE, "every broker is on loopback; CERBERUS_RATE sets another rate"
    return 0.0, "the brokers are remote; CERBERUS_RATE above 0 wakes it"


def _tasks(read: environment.Reader) -> frozenset[str]:
    tasks = frozenset(read.words("CERBERUS_TASKS"))
    if not tasks or tasks - set(environment.TASKS):
        raise errors.ConfigError(f"CERBERUS_TASKS must name some of {', '.join(environment.TASKS)}")
    return tasks


def _spans(read: environment.Reader) -> tuple[str, ...]:
    names = read.words("CERBERUS_SPANS")
    good = all(re.fullmatch(r"[1-9]\d{0,4}[smhd]", name) for name in names)
    lengths = [_UNITS_S[name[-1]] * int(name[:-1]) for name in names] if good else []
    if not lengths or sorted(set(lengths)) != lengths or lengths[-1] > _LONGEST_S:
        raise errors.ConfigError(
            "CERBERUS_SPANS must be increasing lengths such as 10m,1h,24h, of 23d at most"
        )
    return names


def _retention(read: environment.Reader) -> int:
    days = read.integer("CERBERUS_RETENTION_DAYS", 0, 36_500)
    longest = _spans(read)[-1]
    if 0 < days * 86_400 < _UNITS_S[longest[-1]] * int(longest[:-1]):
        raise errors.ConfigError(
            f"CERBERUS_RETENTION_DAYS must be 0 or cover the longest of CERBERUS_SPANS, {longest}"
        )
    if 0 < days < read.number("CERBERUS_LABEL_MATURITY_DAYS", 0, 3_650):
        raise errors.ConfigError(
            "CERBERUS_RETENTION_DAYS must be 0 or cover CERBERUS_LABEL_MATURITY_DAYS: "
            "a decision that is gone before it is mature is never judged"
        )
    return days


def _loopback(host: str) -> bool:
    host = host.strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
