"""Exact sliding windows per user: pure state, no I/O, time only from the log.

A window is half-open, `(as_of − span, as_of]`. The state of one partition is a function of the
prefix of its log: the *frontier* is the greatest event time in that prefix, kept is
`(frontier − longest span − slack, frontier]`. *Late* is behind the frontier but inside what is
kept; *expired* is outside. Nothing here reads a clock.
"""

import enum
import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cerberus import settings, transactions

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_SWEEP_MS = 1_000
_COMPACT_AT = 64
_FOR_EVER = 2**63 - 1


@dataclass(frozen=True, slots=True)
class WindowStats:
    """What a window holds: `count` transactions of `total_minor` cents, both exact integers."""

    count: int
    total_minor: int


EMPTY = WindowStats(0, 0)


class Event(NamedTuple):
    """One kept transaction: ms, cents, identity (unsigned 64 bits), merchant (unsigned 32)."""

    event_ms: int
    amount_minor: int
    id_hash64: int
    merchant_hash32: int


@dataclass(frozen=True, slots=True)
class Spans:
    """The window definition of a deployment.

    Attributes:
        names: Increasing lengths such as ("10m", "1h"); features are named after them.
        allowed_lateness_ms: How far an event may lie behind the frontier and still be answered for.
        max_future_skew_ms: How far an event may lie ahead of the record's own timestamp.
    """

    names: tuple[str, ...] = ("10m",)
    allowed_lateness_ms: int = 60_000
    max_future_skew_ms: int = 60_000

    @classmethod
    def of(cls, told: settings.Windows) -> "Spans":
        """Return the window definition that the settings give."""
        return cls(told.spans, told.allowed_lateness_ms, told.max_future_skew_ms)

    @property
    def spans_ms(self) -> tuple[int, ...]:
        """Lengths in ms, in the order of `names`."""
        return tuple(int(name[:-1]) * _UNITS_MS[name[-1]] for name in self.names)

    @property
    def longest_ms(self) -> int:
        """The longest span in ms."""
        return self.spans_ms[-1]

    @property
    def slack_ms(self) -> int:
        """What is kept beyond the longest span, so that a slightly older `as_of` has an answer."""
        return self.allowed_lateness_ms + self.max_future_skew_ms

    @property
    def keep_ms(self) -> int:
        """How far behind the frontier an event is still kept."""
        return self.longest_ms + self.slack_ms


class Outcome(enum.Enum):
    """What `observe` made of a transaction."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    """Seen before, same amount: changes nothing."""
    CONFLICT = "conflict"
    """Seen before with another amount: the lower offset stands."""
    EXPIRED = "expired"
    """Older than what is kept: changes no window."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Events in order, each field of shape (n,); `totals` continues from the cents `before`."""

    times: npt.NDArray[np.int64]
    totals: npt.NDArray[np.int64]
    before: int
    ids: npt.NDArray[np.uint64]
    merchants: npt.NDArray[np.uint32]

    def total(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the running total before each index, 0 to n."""
        return np.where(index > 0, self.totals[index - 1], self.before)


class UserWindow:
    """One user's kept events in order of (event time, identity), with running totals.

    28 bytes an event in four arrays; a running total instead of the amount answers any window in
    O(log n). Because the identity holds the event time, a duplicate sits at its own place in the
    order and needs no set of identities.
    """

    __slots__ = ("_head", "ids", "merchants", "times", "totals")

    def __init__(self) -> None:
        self.times = array("q")
        self.totals = array("q")
        self.ids = array("Q")
        self.merchants = array("I")
        self._head = 0

    def __len__(self) -> int:
        return len(self.times) - self._head

    @property
    def newest_ms(self) -> int:
        """Event time of the newest event; 0 when there is none."""
        return self.times[-1] if self.times else 0

    def _total_before(self, index: int) -> int:
        return self.totals[index - 1] if index else 0

    def insert(self, event: Event) -> Outcome:
        """Add one event unless its identity is here. Cost: O(1) in order, else O(log n + late)."""
        event_ms, amount_minor, id_hash, merchant = event
        times, totals, ids = self.times, self.totals, self.ids
        size = len(times)
        if size == self._head or event_ms > times[-1]:
            totals.append((totals[-1] if size else 0) + amount_minor)
            times.append(event_ms)
            ids.append(id_hash)
            self.merchants.append(merchant)
            return Outcome.ACCEPTED
        start = bisect_left(times, event_ms, self._head)
        stop = bisect_right(times, event_ms, start)
        at = bisect_left(ids, id_hash, start, stop)
        if at < stop and ids[at] == id_hash:
            same = totals[at] - self._total_before(at) == amount_minor
            return Outcome.DUPLICATE if same else Outcome.CONFLICT
        totals.insert(at, self._total_before(at))
        np.frombuffer(totals, dtype=np.int64)[at:] += amount_minor
        times.insert(at, event_ms)
        ids.insert(at, id_hash)
        self.merchants.insert(at, merchant)
        return Outcome.ACCEPTED

    def rank(self, event_ms: int) -> int:
        """Return how many events of exactly this ms are kept."""
        start = bisect_left(self.times, event_ms, self._head)
        return bisect_right(self.times, event_ms, start) - start

    def stats(self, after_ms: int, until_ms: int) -> WindowStats:
        """Summarise the events in `(after_ms, until_ms]`. Cost: O(log n)."""
        start = bisect_right(self.times, after_ms, self._head)
        stop = bisect_right(self.times, until_ms, start)
        return WindowStats(stop - start, self._total_before(stop) - self._total_before(start))

    def remove(self, event_ms: int, id_hash: int) -> None:
        """Remove an event, if it is here. Cost: O(n)."""
        ids, totals = self.ids, self.totals
        start = bisect_left(self.times, event_ms, self._head)
        stop = bisect_right(self.times, event_ms, start)
        at = bisect_left(ids, id_hash, start, stop)
        if at == stop or ids[at] != id_hash:
            return
        np.frombuffer(totals, dtype=np.int64)[at:] -= totals[at] - self._total_before(at)
        for column in (self.times, totals, ids, self.merchants):
            del column[at]

    def evict(self, until_ms: int) -> None:
        """Forget events at or before `until_ms`. Cost: amortised O(1) an event."""
        if self._head < len(self.times) and self.times[self._head] > until_ms:
            return
        head = self._head = bisect_right(self.times, until_ms, self._head)
        if head >= _COMPACT_AT and head * 2 >= len(self.times):
            # Totals restart at zero, or a busy user's would overflow 64 bits one day.
            np.frombuffer(self.totals, np.int64)[:] -= self.totals[head - 1]
            for column in (self.times, self.totals, self.ids, self.merchants):
                del column[:head]
            self._head = 0

    def columns(self, after_ms: int, until_ms: int = _FOR_EVER) -> "Columns":
        """Return the events of `(after_ms, until_ms]`, in order, without copying them.

        The columns are views of the state: release them before the next insert.
        """
        first = bisect_right(self.times, after_ms, self._head)
        end = bisect_right(self.times, until_ms, first)
        return Columns(
            times=np.frombuffer(self.times, np.int64)[first:end],
            totals=np.frombuffer(self.totals, np.int64)[first:end],
            before=self._total_before(first),
            ids=np.frombuffer(self.ids, np.uint64)[first:end],
            merchants=np.frombuffer(self.merchants, np.uint32)[first:end],
        )


class PartitionWindows:
    """All users' windows of one partition: a function of the log's prefix.

    Not thread-safe: one loop owns it.

    Attributes:
        spans: The window definition.
        frontier_ms: The greatest event time of the prefix.
        lower_ms: Events at or before this time are no longer kept.
    """

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.frontier_ms = 0
        self.lower_ms = -spans.keep_ms
        self._keep_ms = spans.keep_ms
        self._spans_ms = spans.spans_ms
        self._users: dict[int, UserWindow] = {}
        # Each user is in one bucket: that of its newest event when it was put there.
        self._buckets: dict[int, list[int]] = {}
        self._due: list[int] = []

    def __len__(self) -> int:
        return len(self._users)

    @property
    def users(self) -> Iterator[int]:
        """The users with kept events."""
        return iter(self._users)

    def observe(self, transaction: transactions.Transaction) -> Outcome:
        """Apply the next transaction of the log. Cost: amortised O(log n)."""
        event_ms = transaction.event_ms
        if event_ms > self.frontier_ms:
            self.frontier_ms = event_ms
            self.lower_ms = event_ms - self._keep_ms
            if self._due and self._due[0] < self.lower_ms // _SWEEP_MS:
                self._sweep()
        elif event_ms <= self.lower_ms:
            return Outcome.EXPIRED
        return self._insert(transaction)

    def _insert(self, transaction: transactions.Transaction) -> Outcome:
        event_ms = transaction.event_ms
        user_id = transaction.user_id
        user = self._users.get(user_id)
        if user is None:
            user = self._users[user_id] = UserWindow()
            self._enter_bucket(user_id, event_ms)
        else:
            user.evict(self.lower_ms)
        return user.insert(
            Event(
                event_ms,
                transaction.amount_minor,
                transactions.id_hash64(user_id, transaction.transaction_id, event_ms),
                transactions.merchant_hash32(transaction.merchant_id),
            )
        )

    def seed(self, transaction: transactions.Transaction) -> Outcome:
        """Add a transaction from before reading began, without moving the frontier."""
        if transaction.event_ms <= self.lower_ms:
            return Outcome.EXPIRED
        return self._insert(transaction)

    def withdraw(self, transaction: transactions.Transaction) -> None:
        """Remove a transaction as if it had never come, without moving the frontier."""
        if (user := self._users.get(transaction.user_id)) is not None:
            user.remove(transaction.event_ms, transaction.id_hash64)

    def stats(self, user_id: int, as_of_ms: int) -> tuple[WindowStats, ...]:
        """Summarise one user's transactions in `(as_of − span, as_of]`, one entry per span.

        Exact when `as_of − span ≥ lower_ms`. Equals a recomputation over the log's prefix, in any
        arrival order inside the slack.
        """
        user = self._users.get(user_id)
        if user is None:
            return (EMPTY,) * len(self._spans_ms)
        return tuple([user.stats(as_of_ms - span, as_of_ms) for span in self._spans_ms])

    def rank(self, user_id: int, event_ms: int) -> int:
        """Return how many of the user's events of exactly this ms are kept."""
        user = self._users.get(user_id)
        return user.rank(event_ms) if user else 0

    def user(self, user_id: int) -> UserWindow | None:
        """Return one user's window, trimmed to what is kept; None when nothing is left."""
        user = self._users.get(user_id)
        if user is not None:
            user.evict(self.lower_ms)
        return user if user else None

    def _enter_bucket(self, user_id: int, event_ms: int) -> None:
        bucket = event_ms // _SWEEP_MS
        if (members := self._buckets.get(bucket)) is None:
            members = self._buckets[bucket] = []
            heapq.heappush(self._due, bucket)
        members.append(user_id)

    def _sweep(self) -> None:
        """Drop users with nothing left; each user is checked once per kept length."""
        gone = self.lower_ms // _SWEEP_MS
        while self._due and self._due[0] < gone:
            for user_id in self._buckets.pop(heapq.heappop(self._due)):
                newest_ms = self._users[user_id].newest_ms
                if newest_ms <= self.lower_ms:
                    del self._users[user_id]
                else:
                    self._enter_bucket(user_id, newest_ms)
