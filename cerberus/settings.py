"""All settings of a process, each declared once in its group."""

import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cerberus import endpoints, environment, errors
from cerberus.environment import (  # the vocabulary of the declarations below
    choice,
    file,
    flag,
    integer,
    matching,
    ms,
    number,
    some_of,
    variable,
    words,
)

FEATURE_REPO = environment.shipped("feature_repo")
MODEL_PATH = environment.shipped("models") / "fraud_model.json"
POLICY_PATH = MODEL_PATH.with_name("policy.json")
TASKS = ("api", "consumer", "producer", "materializer", "labels", "retention")
AUTO_RATE = 2.0
_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DAY_S = 86_400
_LONGEST_S = 23 * _DAY_S  # ages in a packed window have 32 bits of ms


def _spans(name: str, told: str) -> tuple[str, ...]:
    names = words(name, told)
    good = all(re.fullmatch("[1-9][0-9]{0,4}[smhd]", each) for each in names)
    lengths = [_seconds(each) for each in names] if good else []
    if not lengths or sorted(set(lengths)) != lengths or lengths[-1] > _LONGEST_S:
        raise errors.ConfigError(
            f"{name} must be increasing lengths such as 10m,1h,24h, of 23d at most"
        )
    return names


def _seconds(span: str) -> int:
    return _UNITS_S[span[-1]] * int(span[:-1])


def _rate(name: str, told: str) -> float | None:
    return None if told == "auto" else number(0, 100_000)(name, told)


@dataclass(frozen=True, slots=True)
class Serving:
    """Requests."""

    api_keys: tuple[str, ...] = variable(
        "CERBERUS_API_KEY",
        "",
        words,
        "keys of callers, comma separated; required to serve, unless `CERBERUS_OPEN` is set",
        secret=True,
    )
    open_to: str = variable(
        "CERBERUS_OPEN",
        "",
        matching("(loopback)?", "loopback, or not set"),
        "`loopback`: direct callers on the same machine need no key; ignored if keys are set",
    )
    max_in_flight: int = variable(
        "CERBERUS_MAX_IN_FLIGHT", "512", integer(1, 100_000), "predictions at once; more get 503"
    )
    read_timeout_ms: int = variable(
        "CERBERUS_READ_TIMEOUT_MS", "250", integer(1, 60_000), "deadline of the feature read, ms"
    )


@dataclass(frozen=True, slots=True)
class Connections:
    """Connections of clients."""

    most: int = variable(
        "CERBERUS_MAX_CONNECTIONS",
        "4096",
        integer(1, 1_000_000),
        "connections at once; fewer if the process may not open enough files",
    )
    head_bytes: int = variable(
        "CERBERUS_MAX_HEAD_BYTES", "32768", integer(1_024, 2**20), "largest request head, bytes"
    )
    target_bytes: int = variable(
        "CERBERUS_MAX_TARGET_BYTES", "8192", integer(256, 2**20), "longest path and query, bytes"
    )
    head_s: float = variable(
        "CERBERUS_HEAD_TIMEOUT_S", "10", number(0.1, 3_600), "time for a head to arrive, s"
    )
    body_s: float = variable(
        "CERBERUS_BODY_TIMEOUT_S", "10", number(0.1, 3_600), "time for a body to arrive, s"
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """Sliding windows."""

    spans: tuple[str, ...] = variable(
        "CERBERUS_SPANS", "10m", _spans, "increasing lengths of the windows: `10m,1h,24h`"
    )
    replay_span_ms: int = variable(
        "CERBERUS_REPLAY_SPAN_S",
        "3600",
        ms(1, 86_400),
        "longest window that is replayed from the log, s; longer ones are seeded from Postgres",
    )
    allowed_lateness_ms: int = variable(
        "CERBERUS_ALLOWED_LATENESS_S",
        "60",
        ms(0, 86_400),
        "how late a transaction may arrive and still be scored exactly, s",
    )
    max_future_skew_ms: int = variable(
        "CERBERUS_MAX_FUTURE_SKEW_S", "60", ms(0, 3_600), "how far ahead a timestamp may be, s"
    )
    max_staleness_ms: int = variable(
        "CERBERUS_MAX_STALENESS_S", "60", ms(1, 86_400), "older streamed values are null, s"
    )


@dataclass(frozen=True, slots=True)
class Stream:
    """Topics and the consumer group."""

    partitions: int = variable(
        "CERBERUS_PARTITIONS", "6", integer(1, 1000), "partitions of a new topic"
    )
    replication: int = variable(
        "CERBERUS_REPLICATION", "-1", integer(-1, 10), "replicas of a new topic; -1 = the broker's"
    )
    session_timeout_ms: int = variable(
        "CERBERUS_SESSION_TIMEOUT_S", "15", ms(6, 300), "session timeout of the consumer group, s"
    )
    max_rejected_share: float = variable(
        "CERBERUS_MAX_REJECTED_SHARE",
        "0.05",
        number(0, 1),
        "share of records that may be refused, 0 to 1; consuming stops soon at twice this share",
    )
    resend_s: float = variable(
        "CERBERUS_RESEND_S", "300", number(1, 86_400), "time between full writes of live rows, s"
    )


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decisions."""

    claim_ms: int = variable(
        "CERBERUS_CLAIM_S",
        "900",
        ms(60, 86_400),
        "how long Redis keeps the one decision on a transaction, s",
    )
    flush_ms: int = variable(
        "CERBERUS_DECISION_FLUSH_MS",
        "200",
        integer(10, 10_000),
        "longest time until a decision on a request is stored, ms",
    )
    buffer: int = variable(
        "CERBERUS_DECISION_BUFFER",
        "20000",
        integer(100, 10_000_000),
        "decisions on requests that may wait to be stored",
    )


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels."""

    maturity_ms: int = variable(
        "CERBERUS_LABEL_MATURITY_DAYS",
        "30",
        ms(0, 3_650, unit_s=_DAY_S),
        "days without a fraud label after which a transaction counts as genuine",
    )
    friendly_fraud_is_fraud: bool = variable(
        "CERBERUS_FRIENDLY_FRAUD_IS_FRAUD", "0", flag, "1 counts `friendly_fraud` as fraud"
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Model and policy."""

    path: pathlib.Path = variable("CERBERUS_MODEL", str(MODEL_PATH), file, "the model file")
    policy_path: pathlib.Path = variable(
        "CERBERUS_POLICY",
        str(POLICY_PATH),
        file,
        "the policy file: what is approved, reviewed and declined",
    )

    @property
    def plan_path(self) -> pathlib.Path:
        """Where the feature plan is: beside the model."""
        return self.path.with_name("feature_plan.json")


@dataclass(frozen=True, slots=True)
class Jobs:
    """Scheduled jobs."""

    materialize_s: float = variable(
        "CERBERUS_MATERIALIZE_S", "300", number(1, 86_400), "time between loads of batch views, s"
    )
    retention_days: int = variable(
        "CERBERUS_RETENTION_DAYS",
        "0",
        integer(0, 36_500),
        "days to keep transactions and decisions; 0 = for ever",
    )


@dataclass(frozen=True, slots=True)
class Synthetic:
    """The synthetic producer."""

    rate: float | None = variable(
        "CERBERUS_RATE",
        "auto",
        _rate,
        f"transactions a second; `auto` = {AUTO_RATE:g} if every broker is on loopback, else 0",
    )
    seed: int = variable("CERBERUS_SEED", "7", integer(0, 2**31), "seed of the population")
    users: int = variable("CERBERUS_USERS", "1000", integer(1, 10_000_000), "number of users")
    first_user_id: int = variable(
        "CERBERUS_FIRST_USER_ID", "1000", integer(0, 2**53), "lowest user id"
    )
    label_delay_s: float = variable(
        "CERBERUS_SYNTHETIC_LABEL_DELAY_S",
        "259200",
        number(0, 31_536_000),
        "mean time until a fraud is found out, s",
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """The process."""

    kafka: endpoints.Kafka
    redis: endpoints.Redis
    postgres: endpoints.Postgres
    tasks: frozenset[str] = variable(
        "CERBERUS_TASKS", ",".join(TASKS), some_of(*TASKS), "parts that this process runs"
    )
    currency: str = variable(
        "CERBERUS_CURRENCY",
        "USD",
        matching("[A-Z]{3}", "three capital letters"),
        "currency of every amount, ISO 4217",
    )
    log_level: str = variable(
        "CERBERUS_LOG_LEVEL",
        "INFO",
        choice("DEBUG", "INFO", "WARNING", "ERROR"),
        "DEBUG, INFO, WARNING or ERROR",
    )
    stack: str = variable(
        "CERBERUS_STACK",
        "",
        choice("", "wheel", "system"),
        "servers that `make run` starts: `wheel` from packages, `system` installed; empty = any",
    )
    serving: Serving = field(default_factory=Serving)
    connections: Connections = field(default_factory=Connections)
    windows: Windows = field(default_factory=Windows)
    stream: Stream = field(default_factory=Stream)
    decisions: Decisions = field(default_factory=Decisions)
    labels: Labels = field(default_factory=Labels)
    model: Model = field(default_factory=Model)
    jobs: Jobs = field(default_factory=Jobs)
    synthetic: Synthetic = field(default_factory=Synthetic)

    @property
    def rate(self) -> float:
        """Synthetic transactions a second."""
        if self.synthetic.rate is not None:
            return self.synthetic.rate
        return AUTO_RATE if self.kafka.on_loopback else 0.0

    @property
    def rate_reason(self) -> str:
        """Why `rate` is what it is, and what changes it."""
        if self.synthetic.rate is not None:
            return "CERBERUS_RATE sets it"
        if self.kafka.on_loopback:
            return "every broker is on loopback; CERBERUS_RATE sets another rate"
        return "the brokers are remote; CERBERUS_RATE above 0 starts it"


def names() -> list[str]:
    """Return the names of all variables."""
    return [each.name for each in environment.declared(Settings)]


def load(environ: Mapping[str, str]) -> Settings:
    """Read all settings.

    Raises:
        ConfigError: A variable is missing, wrong or unknown; the message names it.
    """
    environment.check_names(environ, names())
    config = environment.read(Settings, environ)
    _check_sasl(config.kafka)
    _check_certificates(config.kafka)
    if config.redis.cluster and config.redis.address.database:
        raise errors.ConfigError(
            "REDIS_URL: a Redis Cluster has only database 0; remove the number"
        )
    _check_retention(config)
    return config


def check_serving(config: Settings) -> None:
    """Check that somebody has chosen who may call; a process that serves HTTP needs that.

    Raises:
        ConfigError: Neither a key nor `CERBERUS_OPEN` is set.
    """
    if not config.serving.api_keys and not config.serving.open_to:
        raise errors.ConfigError(
            "CERBERUS_API_KEY is not set: set it to the key that callers must send, or set "
            "CERBERUS_OPEN=loopback to serve callers on this machine without a key"
        )


def _check_sasl(kafka: endpoints.Kafka) -> None:
    named = {
        "KAFKA_SASL_USERNAME": kafka.sasl_username,
        "KAFKA_SASL_PASSWORD": kafka.sasl_password,
    }
    for name, value in named.items():
        if bool(value) != bool(kafka.sasl_mechanism):
            raise errors.ConfigError(
                f"{name} and KAFKA_SASL_MECHANISM go together: set both or neither"
            )


def _check_certificates(kafka: endpoints.Kafka) -> None:
    given = {
        "KAFKA_TRUSTED_CERT": kafka.ca_pem,
        "KAFKA_CLIENT_CERT": kafka.client_pem,
        "KAFKA_CLIENT_CERT_KEY": kafka.client_key_pem,
    }
    for name, value in given.items():
        if value and not kafka.tls:
            raise errors.ConfigError(f"{name} is set: give the brokers kafka+ssl:// addresses")
    if bool(kafka.client_pem) != bool(kafka.client_key_pem):
        raise errors.ConfigError(
            "KAFKA_CLIENT_CERT and KAFKA_CLIENT_CERT_KEY go together: set both or neither"
        )


def _check_retention(config: Settings) -> None:
    kept_ms, longest = config.jobs.retention_days * _DAY_S * 1000, config.windows.spans[-1]
    if 0 < kept_ms < _seconds(longest) * 1000:
        raise errors.ConfigError(
            f"CERBERUS_RETENTION_DAYS must be 0 or cover the longest of CERBERUS_SPANS, {longest}"
        )
    if 0 < kept_ms < config.labels.maturity_ms:
        raise errors.ConfigError(
            "CERBERUS_RETENTION_DAYS must be 0 or cover CERBERUS_LABEL_MATURITY_DAYS: "
            "a decision that is deleted before it is mature is never judged"
        )
