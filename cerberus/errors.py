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
    """What was given breaks the contract; correct the named field and send it again."""

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
    """Whether the transaction was decided before cannot be looked up now; try again."""


class UnknownDecision(CerberusError):
    """No decision has this id; it may not be stored yet, or be older than what is kept."""


class ModelMismatch(CerberusError):
    """The model does not fit this build; `python models/train_model.py` trains one that does."""


class FeaturesUnavailable(CerberusError):
    """The online store did not answer in time; try again when Redis is reachable."""


class StoreUnavailable(CerberusError):
    """A store did not acknowledge a write; it is retried until it does."""


class NeedsOperator(StoreUnavailable):
    """A store answers, but this needs a hand; do what the message says. It is retried meanwhile."""


class Overloaded(CerberusError):
    """More requests are in flight than the bound; retry after the stated time."""


class Unauthorized(CerberusError):
    """Send the key in the X-API-Key header, or call from the same machine when no key is set."""


class ServerUnavailable(CerberusError):
    """A local server cannot be started; install it or set its URL as the message says."""
