"""A seeded population and its traffic: for demonstrations, never for claims about detection.

Amounts are 5 to 150 for genuine transactions and 5,000 to 10,000 for the 5 % that are fraud, so
a rule on the amount alone finds nearly all: what a model scores on this traffic measures the
generator. A transaction never carries its label: frauds are reported later, the others never.
"""

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from cerberus import labels, transactions

FRAUD_SHARE, CHARGEBACK_SHARE = 0.05, 0.2
SOURCE = "synthetic"
MERCHANTS = 200


@dataclass(frozen=True, slots=True)
class Labelled:
    """A transaction and the truth about it, which reaches the service separately and later."""

    transaction: transactions.Transaction
    fraud: bool


def credit_score(user_id: int, seed: int) -> int:
    """Return a user's score, 300 to 850, drawn independently of what the user does."""
    draw = random.Random(f"credit {seed} {user_id}")
    return round(draw.triangular(300, 850, 700))


def found_out(fraud: transactions.Transaction, seed: int, mean_s: float) -> labels.Label:
    """Draw when a fraud is found out, exponentially late, and its label; a seed repeats both."""
    draw = random.Random(f"label {seed} {fraud.transaction_id}")
    late_ms = round(draw.expovariate(1.0) * mean_s * 1000)
    label = labels.CHARGEBACK if draw.random() < CHARGEBACK_SHARE else labels.FRAUD
    return labels.Label(
        fraud.transaction_id, label, SOURCE, fraud.event_ms + late_ms, fraud.user_id
    )


def transaction_id(event_ms: int, rng: random.Random) -> str:
    """Make a UUIDv7 from the event time and the generator, so a seed repeats it."""
    value = (event_ms & (1 << 48) - 1) << 80 | rng.getrandbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


class Population:
    """Users who pay independently of each other at random moments.

    Args:
        users: How many, with consecutive ids from `first_user_id`.
        first_user_id: The lowest id.
        currency: ISO 4217.
        seed: The same seed gives the same transactions for the same times.
    """

    def __init__(self, users: int, first_user_id: int, currency: str, seed: int) -> None:
        self.user_ids = range(first_user_id, first_user_id + users)
        self._currency = currency
        self._rng = random.Random(seed)

    def pay(self, event_ms: int) -> Labelled:
        """Let one random user pay at `event_ms`."""
        rng = self._rng
        fraud = rng.random() < FRAUD_SHARE
        low, high = (500_000, 1_000_000) if fraud else (500, 15_000)
        transaction = transactions.Transaction(
            transaction_id=transaction_id(event_ms, rng),
            user_id=rng.choice(self.user_ids),
            amount_minor=rng.randint(low, high),
            currency=self._currency,
            merchant_id=f"merchant-{rng.randrange(MERCHANTS):03d}",
            event_ms=event_ms,
        )
        return Labelled(transaction, fraud)

    def traffic(self, start_ms: int, per_s: float) -> Iterator[Labelled]:
        """Yield transactions from `start_ms` on, a Poisson process of `per_s` events a second."""
        at_ms = float(start_ms)
        while True:
            at_ms += self._rng.expovariate(per_s) * 1000
            yield self.pay(int(at_ms))
