"""The decision path of requests: one Redis round trip and one model call for all that wait.

A request that finds no round trip under way starts one at once; those that arrive meanwhile share
the next. Nothing is added for a lone request, and load makes batches by itself.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cerberus import errors, features, metrics, online, scoring, settings, transactions, window

log = logging.getLogger(__name__)

MAX_BATCH = 256
_GRACE_S = 1.0
_IN_HAND = ("transaction_id", "amount", "currency", "merchant_id")
_NEEDED = {
    "transaction_id": "must come with an amount: without it nothing tells whether the stream has "
    "counted the transaction already",
    "amount": "must come with a transaction_id: a transaction in hand is scored by its amount",
}


def now_ms() -> int:
    """Return the wall clock, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a user as of a moment, with or without a transaction in hand."""

    user_id: int
    as_of_ms: int
    in_hand: transactions.Transaction | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """A decision, and what the caller is told beside it.

    Attributes:
        decision: The model's, with the feature row it was taken on.
        partition: Whose log the row's fence belongs to; None when the user has no row.
        transaction_id: Of the transaction in hand.
        retrieval_ms: From the request's arrival here to its features, waiting included.
    """

    decision: scoring.Decision
    partition: int | None
    transaction_id: str | None
    retrieval_ms: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    answer: "asyncio.Future[Prediction]"
    since_s: float


class Predictor:
    """Answers requests in batches.

    Args:
        config: Settings: currency, skew, staleness, deadline and bound.
        spans: The window definition.
        model: Decides.
        store: Where features are read.
        meter: Counts what is answered, and how long its stages took.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        config: settings.Settings,
        spans: window.Spans,
        model: scoring.Model,
        store: online.OnlineStore,
        *,
        meter: metrics.Metrics,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._config = config
        self._spans = spans
        self._model = model
        self._store = store
        self._meter = meter
        self._clock = clock
        self._timeout_s = config.read_timeout_ms / 1000
        self._waiting: deque[_Waiting] = deque()
        self._drain: asyncio.Task[None] | None = None
        self.in_flight = 0

    def parse(self, document: Mapping[str, Any]) -> Request:
        """Read a request; null counts as absent, unknown fields are ignored.

        `user_id` alone asks about the present, with `timestamp` about that moment. Any other known
        field makes it a transaction in hand, which needs `transaction_id` and `amount`; its
        `timestamp` is now unless given, and must be the one it carries on the stream, or the two
        are different transactions and both count.

        Raises:
            InvalidTransaction: naming the field.
        """
        known = {name: value for name, value in document.items() if value is not None}
        user_id = transactions.parse_user_id(known)
        now = self._clock()
        as_of_ms = transactions.parse_timestamp(known) if "timestamp" in known else now
        skew_ms = self._config.max_future_skew_ms
        if as_of_ms > now + skew_ms:
            raise errors.InvalidTransaction(
                "timestamp", f"must not lie more than {skew_ms / 1000:g} s ahead of the clock here"
            )
        if not any(name in known for name in _IN_HAND):
            return Request(user_id, as_of_ms)
        for name, reason in _NEEDED.items():
            if name not in known:
                raise errors.InvalidTransaction(name, reason)
        in_hand = transactions.Transaction(
            transaction_id=transactions.parse_text(known, "transaction_id"),
            user_id=user_id,
            amount_minor=transactions.parse_amount(known),
            currency=transactions.parse_currency(known, self._config.currency),
            merchant_id=transactions.parse_text(known, "merchant_id", default=""),
            event_ms=as_of_ms,
        )
        return Request(user_id, as_of_ms, in_hand)

    async def predict(self, request: Request) -> Prediction:
        """Decide one request together with those that wait.

        Deadline: `read_timeout_ms` to wait for a round trip and as much for the round trip.
        Idempotent: yes. The answer does not depend on the others in its batch, to the bit.

        Raises:
            Overloaded: `max_in_flight` requests are being answered, or the wait was too long.
            FeaturesUnavailable: Redis did not answer in time.
        """
        if self.in_flight >= self._config.max_in_flight:
            raise errors.Overloaded
        self.in_flight += 1
        try:
            loop = asyncio.get_running_loop()
            waiting = _Waiting(request, loop.create_future(), time.perf_counter())
            self._waiting.append(waiting)
            # In a task of its own: a client that goes away takes nobody's round trip with it.
            if self._drain is None:
                self._drain = loop.create_task(self._answer_all())
            async with asyncio.timeout(2 * self._timeout_s + _GRACE_S):
                return await waiting.answer
        except TimeoutError as error:
            raise errors.Overloaded from error
        finally:
            self.in_flight -= 1

    async def _answer_all(self) -> None:
        try:
            while self._waiting:
                size = min(len(self._waiting), MAX_BATCH)
                batch = [self._waiting.popleft() for _ in range(size)]
                if batch := self._in_time(batch):
                    await self._answer(batch)
        finally:
            self._drain = None

    def _in_time(self, batch: Sequence[_Waiting]) -> list[_Waiting]:
        now_s = time.perf_counter()
        for waiting in batch:
            late = now_s - waiting.since_s > self._timeout_s
            if late and not waiting.answer.done():
                waiting.answer.set_exception(errors.Overloaded())
        return [waiting for waiting in batch if not waiting.answer.done()]

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        """Answer a batch; whatever goes wrong is the batch's own."""
        try:
            predictions = await self._predict(batch)
        except Exception as error:
            log.warning("%d requests failed: %s", len(batch), error, extra={"action": "no_answer"})
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        for waiting, prediction in zip(batch, predictions, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(prediction)

    async def _predict(self, batch: Sequence[_Waiting]) -> list[Prediction]:
        began_s = time.perf_counter()
        now = self._clock()
        found = await self._store.read([w.request.user_id for w in batch], now, self._timeout_s)
        rows = [
            features.as_of(
                row,
                w.request.as_of_ms,
                w.request.in_hand,
                now_ms=now,
                max_staleness_ms=self._config.max_staleness_ms,
                spans=self._spans,
            )
            for w, row in zip(batch, found, strict=True)
        ]
        read_s = time.perf_counter()
        decisions = self._model.decide(rows)
        decided_s = time.perf_counter()
        self._meter.batch(
            waits_s=[began_s - w.since_s for w in batch],
            features_s=read_s - began_s,
            model_s=decided_s - read_s,
        )
        predictions = []
        for w, row, decision in zip(batch, found, decisions, strict=True):
            self._meter.prediction(decision.prediction, decision.row.degraded)
            predictions.append(
                Prediction(
                    decision=decision,
                    partition=row.recent.partition if row.recent and decision.row.fence else None,
                    transaction_id=w.request.in_hand.transaction_id if w.request.in_hand else None,
                    retrieval_ms=(read_s - w.since_s) * 1000,
                )
            )
        return predictions


def public(prediction: Prediction, model: scoring.Model, total_ms: float) -> dict[str, Any]:
    """Lay a prediction out as `POST /predict` answers it."""
    decision, row = prediction.decision, prediction.decision.row
    fence = row.fence
    shown: dict[str, Any] = {
        "user_id": row.user_id,
        "prediction": decision.prediction,
        "probability": decision.probability,
        "features": features.public(row, model.manifest.spans),
        "latency_stats": {
            "feature_retrieval_ms": round(prediction.retrieval_ms, 3),
            "total_latency_ms": round(total_ms, 3),
        },
        "as_of": transactions.format_ms(row.as_of_ms),
        "degraded": row.degraded,
        "approximate": row.approximate,
        "fence": fence
        and {"epoch": fence.epoch, "offset": fence.offset, "partition": prediction.partition},
        "model": {"sha256": decision.model_sha256, "threshold": model.manifest.threshold},
    }
    if prediction.transaction_id is not None:
        shown["transaction_id"] = prediction.transaction_id
    return shown
