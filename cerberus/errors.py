"""What can go wrong, named by who must act.

The docstring of each class is its default message: one sentence that says what to do next.
"""


class CerberusError(Exception):
    """Something went wrong; the log line before this one says what."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigError(CerberusError):
    """A setting is missing or wrong; set the variable that the message names. Exit status 78."""


class InvalidInput(CerberusError):
    """The input breaks the contract; correct the named field and send it again."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Conflict(CerberusError):
    """The same transaction was decided with other content; send what was sent first."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field}: differs from the transaction that was decided under this id")
        self.field = field


class DecisionsUnavailable(CerberusError):
    """Earlier decisions on the transaction cannot be looked up now; try again."""


class UnknownDecision(CerberusError):
    """No stored decision has this id; it may not be stored yet, or its retention time is over."""


class ModelMismatch(CerberusError):
    """The model does not fit this build; `python -m cerberus train` trains one that does."""


class FeaturesUnavailable(CerberusError):
    """The online store did not answer in time; try again when Redis is reachable."""


class FeaturesRefused(ConfigError):
    """The online store refuses this process; try again when its REDIS_URL has been corrected."""


class StoreUnavailable(CerberusError):
    """A store did not acknowledge a write; it is retried until it does."""


class NeedsOperator(StoreUnavailable):
    """A store answers, but an operator must act as the message says; the service retries."""


class DataRefused(CerberusError):
    """A store refuses the data of a row; it will refuse the same row again."""


class Overloaded(CerberusError):
    """Too many requests are in flight; retry after the stated time."""


class Unauthorized(CerberusError):
    """Send the key in the X-API-Key header, or as Authorization: Bearer."""


class ServerUnavailable(CerberusError):
    """A local server cannot be started; install it or set its URL as the message says."""
