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
    Variable("KAFKA_BROKER", "required", "`host:port`, comma separated; or set `KAFKA_URL`"),
    Variable("KAFKA_URL", "", "`kafka://` or `kafka+ssl://` addresses, comma separated"),
    Variable("KAFKA_PREFIX", "", "prefix for the names of the topics and groups"),
    Variable("KAFKA_TRUSTED_CERT", "", "the CA's certificate as PEM text, for `kafka+ssl://`"),
    Variable("KAFKA_CLIENT_CERT", "", "the client's certificate as PEM text"),
    Variable("KAFKA_CLIENT_CERT_KEY", "", "the key of that certificate as PEM text"),
    Variable("KAFKA_SASL_MECHANISM", "", "`PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512` or empty"),
    Variable("KAFKA_SASL_USERNAME", "", "user name at the brokers"),
    Variable("KAFKA_SASL_PASSWORD", "", "password at the brokers"),
    Variable("REDIS_URL", "required", "`redis://` or `rediss://`; `REDIS_TLS_URL` is preferred"),
    Variable("REDIS_TLS_URL", "", "like `REDIS_URL`, for platforms that set both"),
    Variable("REDIS_TLS_VERIFY", "1", "0 accepts a self-signed certificate"),
    Variable("REDIS_CLUSTER", "0", "1 if `REDIS_URL` is one node of a Redis Cluster"),
    Variable("DATABASE_URL", "required", "`postgres://` or `postgresql://`"),
    Variable("CERBERUS_API_KEY", "", "keys, comma separated; empty: only direct loopback callers"),
    Variable("CERBERUS_TASKS", ",".join(TASKS), "the parts that this process runs"),
    Variable(
        "CERBERUS_RATE", "auto", "synthetic transactions/s; auto: 2 on loopback brokers, else 0"
    ),
    Variable("CERBERUS_SEED", "7", "seed of the synthetic population"),
    Variable("CERBERUS_USERS", "1000", "size of the synthetic population"),
    Variable("CERBERUS_FIRST_USER_ID", "1000", "lowest user id of the synthetic population"),
    Variable("CERBERUS_CURRENCY", "USD", "ISO 4217 code, one per deployment"),
    Variable("CERBERUS_PARTITIONS", "6", "partitions of the topics that the service creates"),
    Variable("CERBERUS_REPLICATION", "-1", "replicas of those topics; -1: the broker's default"),
    Variable("CERBERUS_SPANS", "10m", "window lengths, increasing, such as `10m,1h,24h`"),
    Variable("CERBERUS_REPLAY_SPAN_S", "3600", "longer windows are seeded from Postgres, s"),
    Variable("CERBERUS_ALLOWED_LATENESS_S", "60", "how late an event may be for an exact score, s"),
    Variable("CERBERUS_MAX_FUTURE_SKEW_S", "60", "how far ahead an event's timestamp may lie, s"),
    Variable("CERBERUS_MAX_STALENESS_S", "60", "streamed values older than this are null, s"),
    Variable(
        "CERBERUS_MAX_REJECTED_SHARE",
        "0.05",
        "refused share of a minute's records that stops consuming",
    ),
    Variable("CERBERUS_SESSION_TIMEOUT_S", "15", "session timeout of the consumer group, s"),
    Variable("CERBERUS_MATERIALIZE_S", "300", "time between loads of the batch views, s"),
    Variable(
        "CERBERUS_RETENTION_DAYS",
        "0",
        "days to keep transactions, decisions and labels; 0: for ever",
    ),
    Variable("CERBERUS_RESEND_S", "300", "time between full writes of the live rows, s"),
    Variable("CERBERUS_MAX_IN_FLIGHT", "512", "predictions at once; further requests get 503"),
    Variable("CERBERUS_READ_TIMEOUT_MS", "250", "deadline of the feature read, ms"),
    Variable("CERBERUS_CLAIM_S", "900", "how long Redis guarantees one answer per transaction, s"),
    Variable(
        "CERBERUS_DECISION_FLUSH_MS", "200", "decisions on requests are stored this often, ms"
    ),
    Variable(
        "CERBERUS_DECISION_BUFFER", "20000", "decisions on requests that may wait for a store"
    ),
    Variable("CERBERUS_LABEL_MATURITY_DAYS", "30", "days after which no fraud label means genuine"),
    Variable("CERBERUS_FRIENDLY_FRAUD_IS_FRAUD", "0", "1 if `friendly_fraud` counts as fraud"),
    Variable("CERBERUS_SYNTHETIC_LABEL_DELAY_S", "259200", "mean delay of synthetic labels, s"),
    Variable("CERBERUS_MODEL", "models/fraud_model.json", "the model file"),
    Variable("CERBERUS_POLICY", "models/policy.json", "the policy file"),
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
