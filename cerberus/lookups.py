"""Looking up: what was decided, on which values, and how a user stands now."""

import functools
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cerberus import (
    decisions,
    errors,
    features,
    ledger,
    online,
    pools,
    settings,
    transactions,
    window,
)

MAX_LIMIT, DEFAULT_LIMIT = 200, 50
AT_ONCE, DEADLINE_S = 2, 2.0
"""How many look-ups have a connection to Postgres, and how long each may wait for one and for
its answer: the writes of the stream and of labels share the pool."""
_LAST, _SHOWN_EVENTS = 10, 50
_KEYS = ("transaction_id", "user_id")


class Lookups:
    """Answers questions about decisions and users.

    Two at a time ask Postgres, and each is answered or refused within 2 s.

    Args:
        config: Settings.
        spans: The window definition.
        store: Where users' rows are read.
        kept: Where decisions are looked up.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        config: settings.Settings,
        spans: window.Spans,
        store: online.OnlineStore,
        kept: ledger.Ledger,
        clock: Callable[[], int],
    ) -> None:
        self._config = config
        self._spans = spans
        self._rules = features.Rules(spans, config.max_staleness_ms)
        self._store = store
        self._ledger = kept
        self._clock = clock
        self._turns = pools.Turns(AT_ONCE)

    async def decision(self, decision_id: str) -> dict[str, Any]:
        """Return one decision by its id.

        Raises:
            InvalidTransaction: It is no id.
            UnknownDecision: None has it.
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 wait already.
        """
        try:
            name = uuid.UUID(decision_id)
        except ValueError as error:
            raise errors.InvalidTransaction("decision_id", "must be a UUID") from error
        if (record := await self._asked(self._ledger.get, name)) is None:
            raise errors.UnknownDecision
        return record.public()

    async def decisions(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Return decisions, newest first, of the `transaction_id` or `user_id` that is asked for.

        They come in pages of `limit`; `next` goes into `before`, which may also be a time.

        Raises:
            InvalidTransaction: naming the parameter.
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 wait already.
        """
        for name in query.keys() - {*_KEYS, "before", "limit"}:
            raise errors.InvalidTransaction(name, "is no parameter of this look-up")
        asked = [name for name in _KEYS if name in query]
        if len(asked) != 1:
            raise errors.InvalidTransaction(
                "user_id" if asked else "transaction_id", "ask for transaction_id or for user_id"
            )
        if asked == ["user_id"]:
            user_id = _integer(query, "user_id", 0, transactions.MAX_USER_ID)
            page = functools.partial(self._ledger.of_user, user_id)
        else:
            transaction_id = transactions.parse_text(query, "transaction_id")
            page = functools.partial(self._ledger.of_transaction, transaction_id)
        limit = _integer(query, "limit", 1, MAX_LIMIT) if "limit" in query else DEFAULT_LIMIT
        before = _position(query["before"]) if "before" in query else ledger.LAST
        found = await self._asked(page, limit, before)
        more = _cursor(found[-1]) if len(found) == limit else None
        return {"decisions": [record.public() for record in found], "next": more}

    async def user(self, user_id: str) -> dict[str, Any]:
        """Return a user's window now, where it comes from, and the last decisions.

        Raises:
            InvalidTransaction: It is no user id.
            FeaturesUnavailable: Redis did not answer.
            StoreUnavailable, DecisionsUnavailable: Postgres did not answer.
            Overloaded: 200 wait already.
        """
        number = _integer({"user_id": user_id}, "user_id", 0, transactions.MAX_USER_ID)
        now_ms = self._clock()
        [found] = await self._store.read([number], now_ms, self._config.read_timeout_ms / 1000)
        row = features.as_of(found, now_ms, None, now_ms=now_ms, rules=self._rules)
        last = await self._asked(self._ledger.of_user, number, _LAST)
        return {
            "user_id": number,
            "as_of": transactions.format_ms(now_ms),
            "features": decisions.show_features(row, self._spans.names),
            "degraded": row.degraded,
            "approximate": row.approximate,
            "partition": found.partition,
            "fence": decisions.fence(row.fence, found.recent.partition if found.recent else None),
            "events": _events(found.recent, now_ms - self._spans.longest_ms, now_ms),
            "decisions": [record.public() for record in last],
        }

    async def _asked(self, find: Callable[..., Awaitable[pools.T]], *arguments: Any) -> pools.T:
        try:
            return await self._turns.call(DEADLINE_S, find, *arguments)
        except TimeoutError as error:
            raise errors.DecisionsUnavailable(
                f"Postgres has not answered within {DEADLINE_S:g} s; ask again in a second."
            ) from error


def _integer(query: Mapping[str, str], name: str, low: int, high: int) -> int:
    text = query[name]
    if not re.fullmatch(r"[0-9]{1,19}", text) or not low <= int(text) <= high:
        raise errors.InvalidTransaction(name, f"must be a whole number from {low} to {high}")
    return int(text)


def _cursor(record: decisions.Record) -> str:
    return f"{transactions.format_ms(record.decision.row.as_of_ms)}_{record.decision_id}"


def _position(cursor: str) -> ledger.Position:
    time, _, name = cursor.partition("_")
    try:
        return transactions.parse_timestamp({"timestamp": time}), uuid.UUID(name or "0" * 32)
    except (errors.InvalidTransaction, ValueError) as error:
        raise errors.InvalidTransaction(
            "before", "must be the `next` of a page before, or an RFC 3339 time"
        ) from error


def _events(recent: features.Recent | None, after_ms: int, until_ms: int) -> list[dict[str, Any]]:
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


def describe(told: Mapping[str, Any]) -> str:
    """Lay out what `Lookups.user` returns for a person to read."""
    fence, doubts = told["fence"], ", ".join(told["degraded"])
    prefix = f"epoch {fence['epoch']}, offset {fence['offset']}" if fence else "no row"
    lines = [
        f"user {told['user_id']} as of {told['as_of']}",
        f"partition {told['partition']}, {prefix}",
        "values    " + (f"in doubt: {doubts}" if doubts else "exact"),
    ]
    lines += [f"  {name:<24}{value}" for name, value in told["features"].items()]
    lines.append(f"events in the window, newest first ({len(told['events'])} shown)")
    lines += [f"  {event['at']}{event['amount']:>14,.2f}" for event in told["events"]]
    lines.append(f"last decisions ({len(told['decisions'])} shown)")
    lines += [
        f"  {each['as_of']}  {each['decision']:<8}{each['probability']:>8.4f}  "
        f"{each['door']:<7}{each['decision_id']}  {each['transaction_id'] or ''}"
        for each in told["decisions"]
    ]
    return "\n".join(lines)
