"""Look-ups: past decisions with their values, and the window of a user now."""

import functools
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from cerberus import errors, settings, transactions, window
from cerberus.decisions import records
from cerberus.features import evaluation, packed
from cerberus.online import user_rows
from cerberus.postgres import ledger
from cerberus.postgres import pool as postgres_pool

MAX_LIMIT, DEFAULT_LIMIT = 200, 50
AT_ONCE, DEADLINE_S = 2, 2.0
"""How many look-ups use Postgres at once, and how long each may take, its wait included. The writes
of the stream and of labels share the pool."""
_LAST, _SHOWN_EVENTS = 10, 50
_READS = 4  # from Redis at once: each has a connection


@dataclass(frozen=True, slots=True)
class Question:
    """Which decisions to return.

    Attributes:
        of: A transaction's id (str), or a user's (int).
        limit: How many at most.
        before: Only those older than this (as_of_ms, decision_id).
    """

    of: str | int
    limit: int = DEFAULT_LIMIT
    before: ledger.Position = ledger.LAST


class Lookups:
    """Answers questions about decisions and users.

    Two at a time use Postgres, and each is answered or refused within 2 s.

    Args:
        config: Settings.
        spans: The window definition.
        store: Holds users' rows.
        kept: Holds stored decisions.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        config: settings.Settings,
        spans: window.Spans,
        store: user_rows.OnlineStore,
        kept: ledger.Ledger,
        clock: Callable[[], int],
    ) -> None:
        self._config = config
        self._spans = spans
        self._rules = evaluation.Rules(spans, config.windows.max_staleness_ms)
        self._store = store
        self._ledger = kept
        self._clock = clock
        self._turns = postgres_pool.Turns(AT_ONCE)
        self._reads = postgres_pool.Turns(_READS)

    async def decision(self, decision_id: uuid.UUID) -> dict[str, Any]:
        """Return one decision by its id.

        Raises:
            UnknownDecision: No stored decision has this id.
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 look-ups wait already.
        """
        if (record := await self._asked(self._ledger.get, decision_id)) is None:
            raise errors.UnknownDecision
        return record.public()

    async def decisions(self, question: Question) -> dict[str, Any]:
        """Return decisions, newest first, in pages; `next` is None on the last one.

        Raises:
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 look-ups wait already.
        """
        of, limit = question.of, question.limit
        if isinstance(of, int):
            page = functools.partial(self._ledger.of_user, of)
        else:
            page = functools.partial(self._ledger.of_transaction, of)
        found = await self._asked(page, limit, question.before)
        more = _cursor(found[-1]) if len(found) == limit else None
        return {"decisions": [record.public() for record in found], "next": more}

    async def user(self, user_id: int) -> dict[str, Any]:
        """Return a user's window now, its fence, and the last decisions.

        Raises:
            FeaturesUnavailable: Redis did not answer.
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 look-ups wait already.
        """
        self._turns.check()
        now_ms = self._clock()
        read_s = self._config.serving.read_timeout_ms / 1000
        try:
            reading = self._reads.call(DEADLINE_S, self._store.read, [user_id], now_ms, read_s)
            [found] = await reading
        except TimeoutError as error:
            raise errors.FeaturesUnavailable from error
        row = evaluation.as_of(found, now_ms, None, now_ms=now_ms, rules=self._rules)
        last = await self._asked(self._ledger.of_user, user_id, _LAST)
        return {
            "user_id": user_id,
            "as_of": transactions.format_ms(now_ms),
            "features": records.show_features(row, self._spans.names),
            "degraded": row.degraded,
            "approximate": row.approximate,
            "partition": found.partition,
            "fence": records.fence(row.fence, found.recent.partition if found.recent else None),
            "events": _events(found.recent, now_ms - self._spans.longest_ms, now_ms),
            "decisions": [record.public() for record in last],
        }

    async def _asked(
        self, find: Callable[..., Awaitable[postgres_pool.T]], *arguments: Any
    ) -> postgres_pool.T:
        try:
            return await self._turns.call(DEADLINE_S, find, *arguments)
        except TimeoutError as error:
            raise errors.DecisionsUnavailable(
                f"Postgres did not answer within {DEADLINE_S:g} s; try again in a second."
            ) from error


def _cursor(record: records.Record) -> str:
    return f"{transactions.format_ms(record.decision.row.as_of_ms)}_{record.decision_id}"


def _events(recent: packed.Recent | None, after_ms: int, until_ms: int) -> list[dict[str, Any]]:
    """Show the newest events of a window, newest first."""
    if recent is None:
        return []
    times = recent.events["age_ms"].astype("int64") + recent.lower_ms
    inside = recent.events[(times > after_ms) & (times <= until_ms)][::-1][:_SHOWN_EVENTS]
    return [
        {
            "at": transactions.format_ms(int(age_ms) + recent.lower_ms),
            "amount": int(amount_minor) / 100,
        }
        for age_ms, amount_minor in zip(inside["age_ms"], inside["amount_minor"], strict=True)
    ]
