"""The environment of a process: which variables it has, and how each is read, mistakes named."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from cerberus import errors

TASKS = ("api", "consumer", "producer", "materializer", "labels", "retention")


class Variable(NamedTuple):
    """One line of the configuration table: name, default as text, meaning with its unit."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("KAFKA_BROKER", "required", "`host:port`, comma separated; or `KAFKA_URL`"),
    Variable("KAFKA_URL", "", "`kafka://` or `kafka+ssl://` addresses, comma separated"),
    Variable("KAFKA_PREFIX", "", "put before the names of topics and of the group"),
    Variable("KAFKA_TRUSTED_CERT", "", "PEM text of the CA, for `kafka+ssl://`"),
    Variable("KAFKA_CLIENT_CERT", "", "PEM text of the client's certificate"),
    Variable("KAFKA_CLIENT_CERT_KEY", "", "PEM text of its key"),
    Variable("KAFKA_SASL_MECHANISM", "", "`PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512` or none"),
    Variable("KAFKA_SASL_USERNAME", "", "of the service at the brokers"),
    Variable("KAFKA_SASL_PASSWORD", "", "of the service at the brokers"),
    Variable("REDIS_URL", "required", "`redis://` or `rediss://`; `REDIS_TLS_URL` is preferred"),
    Variable("REDIS_TLS_URL", "", "as `REDIS_URL`, where a platform sets both"),
    Variable("REDIS_TLS_VERIFY", "1", "0 accepts a self-signed certificate"),
    Variable("REDIS_CLUSTER", "0", "1 where `REDIS_URL` is one node of a Redis Cluster"),
    Variable("DATABASE_URL", "required", "`postgres://` or `postgresql://`"),
    Variable("CERBERUS_API_KEY", "", "comma separated; empty: only direct loopback callers"),
    Variable("CERBERUS_TASKS", ",".join(TASKS), "which parts this process runs"),
    Variable(
        "CERBERUS_RATE", "auto", "synthetic transactions/s; auto: 2 on loopback brokers, else 0"
    ),
    Variable("CERBERUS_SEED", "7", "of the synthetic population"),
    Variable("CERBERUS_USERS", "1000", "size of the synthetic population"),
    Variable("CERBERUS_FIRST_USER_ID", "1000", "its lowest user id"),
    Variable("CERBERUS_CURRENCY", "USD", "ISO 4217; one a deployment"),
    Variable("CERBERUS_PARTITIONS", "6", "of the topics that are created"),
    Variable("CERBERUS_REPLICATION", "-1", "of the topics that are created; -1: the broker's"),
    Variable("CERBERUS_SPANS", "10m", "window lengths, increasing: `10m,1h,24h`"),
    Variable("CERBERUS_REPLAY_SPAN_S", "3600", "longer windows are seeded from Postgres, s"),
    Variable("CERBERUS_ALLOWED_LATENESS_S", "60", "how late an event is still scored exactly, s"),
    Variable("CERBERUS_MAX_FUTURE_SKEW_S", "60", "how far ahead an event may be stamped, s"),
    Variable("CERBERUS_MAX_STALENESS_S", "60", "older streamed values are null, s"),
    Variable(
        "CERBERUS_MAX_REJECTED_SHARE", "0.05", "of a minute's records; above it consuming stops"
    ),
    Variable("CERBERUS_SESSION_TIMEOUT_S", "15", "of the consumer group, s"),
    Variable("CERBERUS_MATERIALIZE_S", "300", "between loads of the batch views, s"),
    Variable("CERBERUS_RETENTION_DAYS", "0", "what happened is kept so long, 0: for ever, days"),
    Variable("CERBERUS_RESEND_S", "300", "between full writes of the live rows, s"),
    Variable("CERBERUS_MAX_IN_FLIGHT", "512", "requests above it get 503"),
    Variable("CERBERUS_READ_TIMEOUT_MS", "250", "deadline of the feature read, ms"),
    Variable("CERBERUS_CLAIM_S", "900", "how long Redis vouches for one answer a transaction, s"),
    Variable(
        "CERBERUS_DECISION_FLUSH_MS", "200", "HTTP decisions are stored at least so often, ms"
    ),
    Variable("CERBERUS_DECISION_BUFFER", "20000", "HTTP decisions that wait to be stored, at most"),
    Variable(
        "CERBERUS_LABEL_MATURITY_DAYS", "30", "without a fraud label this long: genuine, days"
    ),
    Variable("CERBERUS_FRIENDLY_FRAUD_IS_FRAUD", "0", "1 where `friendly_fraud` counts as fraud"),
    Variable("CERBERUS_SYNTHETIC_LABEL_DELAY_S", "259200", "mean, until a fraud is found out, s"),
    Variable("CERBERUS_MODEL", "models/fraud_model.json", "the model file"),
    Variable("CERBERUS_POLICY", "models/policy.json", "what is approved, reviewed, declined"),
    Variable("CERBERUS_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR"),
)
_DEFAULTS = {v.name: v.default for v in VARIABLES}


class Reader:
    """Reads one variable after another; text is stripped, and empty is the default.

    Args:
        environ: Of the process.

    Raises:
        ConfigError: In all but `text` and `words`: the value is not what is asked for.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str) -> str:
        """Return the text of a variable."""
        default = _DEFAULTS[name]
        value = self._environ.get(name, "").strip()
        return value or ("" if default == "required" else default)

    def number(self, name: str, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise errors.ConfigError(
                f"{name} must be a number from {low:g} to {high:g}, not {text!r}"
            )
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        value = self.number(name, low, high)
        if value != int(value):
            raise errors.ConfigError(f"{name} must be a whole number, not {self.text(name)!r}")
        return int(value)

    def ms(self, name: str, low_s: float, high_s: float) -> int:
        """Return in ms what is told in seconds."""
        return round(self.number(name, low_s, high_s) * 1000)

    def words(self, name: str) -> tuple[str, ...]:
        """Return what stands between commas."""
        return tuple(word for part in self.text(name).split(",") if (word := part.strip()))

    def matching(self, name: str, pattern: str, meaning: str) -> str:
        """Return the text that a pattern matches; `meaning` says which."""
        value = self.text(name)
        if not re.fullmatch(pattern, value):
            raise errors.ConfigError(f"{name} must be {meaning}, not {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """Return whether it is 1, not 0."""
        return self.matching(name, "[01]", "0 or 1") == "1"
