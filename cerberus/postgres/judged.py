"""Accuracy in production: decisions compared with labels, once labels have had time to arrive.

Only mature decisions are judged. Earlier, a missing label means nothing, and recall would be too
high, because it would leave out the frauds that nobody has found yet.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from cerberus import errors, transactions
from cerberus.postgres import pool as postgres_pool

REPORT_S = 30.0
"""How long Postgres may take for a report while a client waits."""
_DAY_MS = 86_400_000
# OFFSET 0 makes Postgres judge each row once, not once for every figure.
_COUNT = f"""
SELECT model_sha256, day,
    count(truth) FILTER (WHERE matured) AS matured,
    count(*) FILTER (WHERE matured AND truth) AS positives,
    count(truth) FILTER (WHERE matured AND flagged) AS flagged,
    count(*) FILTER (WHERE matured AND truth AND flagged) AS found,
    coalesce(sum(amount_minor) FILTER (WHERE matured AND truth AND decision = 'decline'), 0)
        AS caught_minor,
    coalesce(sum(amount_minor) FILTER (WHERE matured AND truth AND decision = 'review'), 0)
        AS reviewed_minor,
    coalesce(sum(amount_minor) FILTER (WHERE matured AND truth AND NOT flagged), 0)
        AS missed_minor,
    coalesce(sum(amount_minor) FILTER (WHERE matured AND NOT truth AND decision = 'decline'), 0)
        AS wrongly_declined_minor,
    count(*) FILTER (WHERE matured AND truth IS NULL) AS excluded,
    count(*) FILTER (WHERE NOT matured) AS immature
FROM (
    SELECT model_sha256, as_of_ms / {_DAY_MS} AS day, decision, decision <> 'approve' AS flagged,
        amount_minor, matured, truth
    FROM training_rows_as_of($1) WHERE as_of_ms >= $2 AND starts_with(model_sha256, $3) OFFSET 0
) AS judged
GROUP BY model_sha256, day ORDER BY day DESC, model_sha256
"""
_RULES = "SELECT maturity_ms, friendly_fraud_positive FROM label_rules"


@dataclass(frozen=True, slots=True)
class Question:
    """Which decisions a report is about.

    Attributes:
        since_ms: Decisions as of this moment or later, ms since the Unix epoch; None for all.
        model: Prefix of the model's version, a sha256 in hex; "" for all models.
    """

    since_ms: int | None = None
    model: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts and sums over a set of decisions on transactions; flagged is review or decline.

    Attributes:
        matured: Decisions that are old enough and have a known truth; all figures but the last
            two count only these.
        positives: Frauds among them.
        flagged: Reviewed or declined.
        found: Frauds that were reviewed or declined.
        caught_minor: Fraud that was declined, cents.
        reviewed_minor: Fraud that was reviewed, cents.
        missed_minor: Fraud that was approved, cents.
        wrongly_declined_minor: Genuine amounts that were declined, cents.
        excluded: Old enough, but declined and never labelled, so the truth is unknown.
        immature: Not old enough.
    """

    matured: int = 0
    positives: int = 0
    flagged: int = 0
    found: int = 0
    caught_minor: int = 0
    reviewed_minor: int = 0
    missed_minor: int = 0
    wrongly_declined_minor: int = 0
    excluded: int = 0
    immature: int = 0

    def __add__(self, other: "Figures") -> "Figures":
        """Return the figures of both sets together."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Figures(*(mine + theirs for mine, theirs in pairs))

    @property
    def precision(self) -> float | None:
        """Share of fraud among flagged decisions; None when nothing was flagged."""
        return _share(self.found, self.flagged)

    @property
    def recall(self) -> float | None:
        """Share of frauds that were flagged; None when there were none."""
        return _share(self.found, self.positives)

    @property
    def false_positive_rate(self) -> float | None:
        """Share of genuine transactions that were flagged; None when there were none."""
        return _share(self.flagged - self.found, self.matured - self.positives)

    def public(self) -> dict[str, Any]:
        """Return the figures as a JSON object; money in major units."""
        return {
            "matured": self.matured,
            "positives": self.positives,
            "flagged": self.flagged,
            "found": self.found,
            "precision": self.precision,
            "recall": self.recall,
            "false_positive_rate": self.false_positive_rate,
            "money": {
                "caught": self.caught_minor / 100,
                "reviewed": self.reviewed_minor / 100,
                "missed": self.missed_minor / 100,
                "wrongly_declined": self.wrongly_declined_minor / 100,
            },
            "excluded": self.excluded,
            "immature": self.immature,
        }


_NAMES = [field.name for field in dataclasses.fields(Figures)]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class Judged:
    """Compares decisions with labels, for one caller at a time.

    Args:
        pool: The shared pool.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._turns = postgres_pool.Turns(1, 1)

    async def report(
        self, now_ms: int, asked: Question, timeout_s: float = REPORT_S
    ) -> dict[str, Any]:
        """Judge each model's decisions by day, newest first. Cost: about 2 µs a decision.

        Args:
            now_ms: The moment whose knowledge counts, ms since the Unix epoch.
            asked: Which decisions.
            timeout_s: How long Postgres may take.

        Raises:
            Overloaded: Another report is being made.
            DecisionsUnavailable: The report took longer than `timeout_s`.
            StoreUnavailable: Postgres did not answer.
        """
        place = (now_ms, asked.since_ms or 0, asked.model)
        try:
            rules, rows = await self._turns.call(timeout_s, self._count, timeout_s, *place)
        except errors.Overloaded as error:
            raise errors.Overloaded(
                "Another report is being made; try again in a second."
            ) from error
        except TimeoutError as error:
            raise errors.DecisionsUnavailable(
                f"The report was not made within {timeout_s:g} s; set `since` to "
                "report on less, or run `cerberus accuracy`, which waits longer."
            ) from error
        since_ms = asked.since_ms
        return {
            "as_of": transactions.format_ms(now_ms),
            "since": None if since_ms is None else transactions.format_ms(since_ms),
            "label_maturity_days": rules["maturity_ms"] / _DAY_MS,
            "friendly_fraud_is_fraud": rules["friendly_fraud_positive"],
            "models": list(_by_model(rows)),
        }

    async def _count(
        self, timeout_s: float, *arguments: Any
    ) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
        async with postgres_pool.connection(self._pool) as connection:
            rules = await connection.fetchrow(_RULES)
            async with connection.transaction(readonly=True):
                await connection.execute("SET LOCAL jit = off")  # it takes longer than it saves
                # The caller gives up first.
                return rules, await connection.fetch(_COUNT, *arguments, timeout=2 * timeout_s)


def _by_model(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for model in dict.fromkeys(row["model_sha256"] for row in rows):
        days = [
            (row["day"], Figures(*(int(row[name]) for name in _NAMES)))
            for row in rows
            if row["model_sha256"] == model
        ]
        yield {
            "model_version": model,
            "total": sum((figures for _, figures in days), Figures()).public(),
            "days": [
                {"day": transactions.format_ms(day * _DAY_MS)[:10], **figures.public()}
                for day, figures in days
            ],
        }
