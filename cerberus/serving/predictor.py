"""The decision path of requests: one read, one model call and one claim for all that wait.

A request that finds no round trip under way starts one at once; those that arrive meanwhile share
the next. A lone request waits for nothing, and load forms batches by itself. A transaction in hand
is claimed before it is answered, so that it gets one decision, over HTTP and on the stream.
"""

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cerberus import claims, clock, errors, settings, transactions, window
from cerberus.decisions import models
from cerberus.decisions import records as decision_records
from cerberus.features import evaluation
from cerberus.online import user_rows
from cerberus.postgres import pool as postgres_pool
from cerberus.telemetry import logs, metrics

log = logging.getLogger(__name__)

MAX_BATCH = 256
_GRACE_S = 1.0
_LOOK_UP_S, _LOOKING_UP, _LOOK_UPS = 2.0, 2, 128
# W3C Trace Context: neither version ff nor an id of zeros; only later versions than 00 have more.
_TRACE = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_IN_HAND = ("transaction_id", "amount", "currency", "merchant_id")
_NEEDED = {
    "transaction_id": "must come with an amount: it says whether the stream has counted the "
    "transaction already",
    "amount": "must come with a transaction_id: a transaction in hand is scored by its amount",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a user as of a moment, with or without a transaction in hand."""

    user_id: int
    as_of_ms: int
    in_hand: transactions.Transaction | None = None
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decision that stands, and what the answer adds to it.

    Attributes:
        record: The decision with its inputs.
        replayed: Whether it was made before, for another request or by the stream.
        retrieval_ms: From the request's arrival to its features, including the wait.
    """

    record: decision_records.Record
    replayed: bool
    retrieval_ms: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    looked_up: bool
    answer: "asyncio.Future[Prediction | None]"
    since_s: float


@dataclass(frozen=True, slots=True)
class Sources:
    """What predictions are made from.

    Attributes:
        config: Settings: currency, skew, staleness, deadline and bound.
        spans: The window definition.
        model: Decides.
        store: Where features are read.
        claimed: Says which decision on a transaction was the first.
    """

    config: settings.Settings
    spans: window.Spans
    model: models.Model
    store: user_rows.OnlineStore
    claimed: claims.Claims


class Predictor:
    """Answers requests in batches.

    Args:
        sources: What predictions are made from.
        keep: Takes each decision that is answered, and never waits.
        meter: Counts what is answered, and how long its stages took.
        clock: The wall clock in ms since the Unix epoch.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        keep: Callable[[decision_records.Record], None],
        meter: metrics.Metrics,
        clock: clock.Clock = clock.now_ms,
    ) -> None:
        self._config = config = sources.config
        self._spans = sources.spans
        self._rules = evaluation.Rules(sources.spans, config.windows.max_staleness_ms)
        self._model = sources.model
        self._store = sources.store
        self._claims = sources.claimed
        self._keep = keep
        self._meter = meter
        self._clock = clock
        self._timeout_s = config.serving.read_timeout_ms / 1000
        self._waiting: deque[_Waiting] = deque()
        self._drain: asyncio.Task[None] | None = None
        # A separate limit: while Postgres is down these wait, and the others must not.
        self._turns = postgres_pool.Turns(_LOOKING_UP, _LOOK_UPS)
        self._said = logs.Repeated(log)
        self.in_flight = 0

    def parse(self, document: Mapping[str, Any], traceparent: str = "") -> Request:
        """Read a request; null counts as absent, unknown fields are ignored.

        `user_id` alone asks about now, or about `timestamp`. Any other known field makes it a
        transaction in hand, which needs `transaction_id` and `amount`. Its `timestamp` is now
        unless given, and must be that of the stream record: with a different one, both count as
        transactions. The trace is that of `traceparent` (W3C Trace Context), or a new one.

        Raises:
            InvalidInput: naming the field.
        """
        known = {name: value for name, value in document.items() if value is not None}
        user_id = transactions.parse_user_id(known)
        now = self._clock()
        as_of_ms = transactions.parse_timestamp(known) if "timestamp" in known else now
        skew_ms = self._config.windows.max_future_skew_ms
        if as_of_ms > now + skew_ms:
            raise errors.InvalidInput(
                "timestamp",
                f"must not be more than {skew_ms / 1000:g} s ahead of the clock of the service",
            )
        traced = _TRACE.fullmatch(traceparent)
        trace_id = traced[1] if traced else secrets.token_hex(16)
        if not any(name in known for name in _IN_HAND):
            return Request(user_id, as_of_ms, trace_id=trace_id)
        for name, reason in _NEEDED.items():
            if name not in known:
                raise errors.InvalidInput(name, reason)
        in_hand = transactions.Transaction(
            transaction_id=transactions.parse_text(known, "transaction_id"),
            user_id=user_id,
            amount_minor=transactions.parse_amount(known),
            currency=transactions.parse_currency(known, self._config.currency),
            merchant_id=transactions.parse_text(known, "merchant_id", default=""),
            event_ms=as_of_ms,
        )
        return Request(user_id, as_of_ms, in_hand, trace_id)

    def check(self) -> None:
        """Refuse a request that would not be answered, before its body is read.

        Raises:
            Overloaded: `max_in_flight` requests are being answered.
        """
        if self.in_flight >= self._config.serving.max_in_flight:
            raise errors.Overloaded

    async def predict(self, request: Request) -> Prediction:
        """Decide one request together with those that wait.

        Deadline: `read_timeout_ms` for the wait, and for each of two round trips; 2 s more if an
        old transaction is looked up. Idempotent: yes; a repeated transaction gets its first
        decision. The answer does not depend on the others in its batch, to the bit.

        Raises:
            Overloaded: `max_in_flight` requests are being answered, 128 old transactions are being
                looked up, or the wait was too long.
            FeaturesUnavailable: Redis did not answer in time.
            DecisionsUnavailable: The transaction may have been decided before, and Postgres does
                not answer.
            Conflict: It was decided with other content; names the field.
        """
        prediction = await self._settle(request)
        record = prediction.record
        if request.in_hand is not None and (field := record.differing(request.in_hand)):
            raise errors.Conflict(field)
        self._keep(record)
        self._meter.prediction(record.decision.prediction, record.decision.row.degraded)
        return prediction

    async def _settle(self, request: Request) -> Prediction:
        in_hand = request.in_hand
        if in_hand is None or not self._claims.old(in_hand, self._clock()):
            prediction = await self._decide(request, looked_up=False)
            if prediction is not None:
                return prediction
        began_s = time.perf_counter()
        if in_hand is not None and (known := await self._look_up(in_hand)) is not None:
            return Prediction(known, True, (time.perf_counter() - began_s) * 1000)
        if (prediction := await self._decide(request, looked_up=True)) is None:
            raise errors.DecisionsUnavailable
        return prediction

    async def _look_up(self, in_hand: transactions.Transaction) -> decision_records.Record | None:
        try:
            found = await self._turns.call(_LOOK_UP_S, self._claims.look_up, [in_hand])
        except (TimeoutError, errors.StoreUnavailable, errors.ConfigError) as error:
            raise errors.DecisionsUnavailable from error
        return next(iter(found.values()), None)

    async def _decide(self, request: Request, *, looked_up: bool) -> Prediction | None:
        """Wait for a batch; None if the transaction must be looked up first."""
        self.check()
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, looked_up, loop.create_future(), time.perf_counter())
        self._waiting.append(waiting)
        # In a task of its own: a client that disconnects must not cancel the others' round trip.
        if self._drain is None:
            self._drain = loop.create_task(self._answer_all())
        self.in_flight += 1
        try:
            async with asyncio.timeout(3 * self._timeout_s + _GRACE_S):
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
        """Answer a batch; an error fails this batch alone."""
        try:
            predictions = await self._predict(batch)
        except Exception as error:
            self._said.warn(f"requests fail: {error}", "no_answer")
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        for waiting, prediction in zip(batch, predictions, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(prediction)

    async def _predict(self, batch: Sequence[_Waiting]) -> list[Prediction | None]:
        began_s, now = time.perf_counter(), self._clock()
        found = await self._store.read([w.request.user_id for w in batch], now, self._timeout_s)
        rows = [
            evaluation.as_of(
                row, w.request.as_of_ms, w.request.in_hand, now_ms=now, rules=self._rules
            )
            for w, row in zip(batch, found, strict=True)
        ]
        read_s = time.perf_counter()
        decided = self._model.decide(rows)
        decided_s = time.perf_counter()
        stages_ms = {"features": (read_s - began_s) * 1000, "model": (decided_s - read_s) * 1000}
        records = [
            self._record(
                w.request, row, decision, now, {"wait": (began_s - w.since_s) * 1000, **stages_ms}
            )
            for w, row, decision in zip(batch, found, decided, strict=True)
        ]
        standing = await self._claim(batch, records, now)
        self._meter.batch(
            waits_s=[began_s - w.since_s for w in batch],
            features_s=read_s - began_s,
            model_s=decided_s - read_s,
            claim_s=time.perf_counter() - decided_s,
        )
        return [
            None
            if stands is None
            else Prediction(stands, stands is not record, (read_s - w.since_s) * 1000)
            for w, record, stands in zip(batch, records, standing, strict=True)
        ]

    def _record(
        self,
        request: Request,
        found: evaluation.OnlineRow,
        decision: models.Decision,
        now_ms: int,
        stages_ms: Mapping[str, float],
    ) -> decision_records.Record:
        in_hand = request.in_hand
        return decision_records.Record(
            decision_id=decision_records.of_transaction(in_hand) if in_hand else uuid.uuid4(),
            decision=decision,
            transaction=in_hand,
            door=decision_records.HTTP,
            partition=found.recent.partition if found.recent and decision.row.fence else None,
            decided_ms=now_ms,
            spans=self._spans.names,
            latency_ms={name: round(ms, 3) for name, ms in stages_ms.items()},
            trace_id=request.trace_id,
        )

    async def _claim(
        self, batch: Sequence[_Waiting], records: Sequence[decision_records.Record], now_ms: int
    ) -> list[decision_records.Record | None]:
        """Return the decisions that stand; a decision without a transaction always stands."""
        claiming = [(at, r) for at, r in enumerate(records) if r.transaction is not None]
        standing: list[decision_records.Record | None] = list(records)
        if claiming:
            looked_up = {r.decision_id for w, r in zip(batch, records, strict=True) if w.looked_up}
            claimed = await self._claims.claim(
                [record for _, record in claiming], now_ms, looked_up, self._timeout_s
            )
            for (at, _), stands in zip(claiming, claimed, strict=True):
                standing[at] = stands
        return standing


def public(prediction: Prediction, total_ms: float) -> dict[str, Any]:
    """Lay a prediction out as `POST /predict` answers it."""
    record = prediction.record
    decision, row, paid = record.decision, record.decision.row, record.transaction
    shown: dict[str, Any] = {
        "user_id": row.user_id,
        "prediction": decision.prediction,
        "probability": decision.probability,
        "decision": decision.action,
        "decision_id": str(record.decision_id),
        "replayed": prediction.replayed,
        "features": decision_records.show_features(row, record.spans),
        "latency_stats": {
            "feature_retrieval_ms": round(prediction.retrieval_ms, 3),
            "total_latency_ms": round(total_ms, 3),
        },
        "as_of": transactions.format_ms(row.as_of_ms),
        "degraded": row.degraded,
        "approximate": row.approximate,
        "fence": decision_records.fence(row.fence, record.partition),
        "model_version": decision.model_sha256,
        "policy_version": decision.policy_sha256,
    }
    if paid is not None:
        shown["transaction_id"] = paid.transaction_id
    return shown
