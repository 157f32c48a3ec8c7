"""What to do about a score: approve, review or decline, by thresholds that people set."""

import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cerberus import documents, errors, transactions

APPROVE, REVIEW, DECLINE = "approve", "review", "decline"
_FIELDS = ("review_at", "decline_at", "approve_degraded_up_to")


@dataclass(frozen=True, slots=True)
class Policy:
    """Thresholds on the calibrated probability, and what a doubtful answer may approve.

    Attributes:
        review_at: At or above this probability a person looks at it, 0..1.
        decline_at: At or above this one it is declined; not below `review_at`.
        approve_degraded_minor: The most that is approved while an answer is degraded, cents.
        sha256: Its version: the SHA-256 of the file, hexadecimal.
        content: The file.
    """

    review_at: float
    decline_at: float
    approve_degraded_minor: int
    sha256: str
    content: bytes

    @classmethod
    def load(cls, path: pathlib.Path) -> "Policy":
        """Read a policy file.

        Raises:
            ConfigError: The message names the field that is wrong.
        """
        try:
            return cls.parse(path.read_bytes())
        except OSError as error:
            raise errors.ConfigError(f"CERBERUS_POLICY: cannot read {path}: {error}") from error
        except ValueError as error:
            raise errors.ConfigError(f"CERBERUS_POLICY: {path}: {error}") from error

    @classmethod
    def parse(cls, content: bytes) -> "Policy":
        """Read the content of a policy file.

        Raises:
            ValueError: The message names the field that is wrong.
        """
        told = documents.read(content)
        if not isinstance(told, dict):
            raise ValueError(f"must be a JSON object with {', '.join(_FIELDS)}")
        for name in told.keys() ^ set(_FIELDS):
            raise ValueError(f"{name}: {'is unknown' if name in told else 'is missing'}")
        review_at = _number(told, "review_at", 0, 1)
        decline_at = _number(told, "decline_at", review_at, 1)
        most = _number(told, "approve_degraded_up_to", 0, transactions.MAX_AMOUNT_MINOR // 100)
        if (minor := round(most * 100)) / 100 != most:
            raise ValueError("approve_degraded_up_to: must have at most two decimal places")
        return cls(review_at, decline_at, minor, hashlib.sha256(content).hexdigest(), content)

    def decide(self, probability: float, amount_minor: int | None, degraded: Sequence[str]) -> str:
        """Return approve, review or decline.

        A degraded answer approves up to the cap only; an unknown amount counts as above it.
        """
        if probability >= self.decline_at:
            return DECLINE
        unsure = bool(degraded) and (
            amount_minor is None or amount_minor > self.approve_degraded_minor
        )
        return REVIEW if unsure or probability >= self.review_at else APPROVE


def _number(told: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = told[name]
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}: must be a number from {low:g} to {high:g}")
    return float(value)
