"""The expected values, computed from the records of the log alone.

It shares no code with the service: it parses with `json` and `datetime` and computes with one set
of numpy arrays for each user.
"""

import datetime
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Rules:
    """The window definition, in ms."""

    span_ms: int = 20_000
    lateness_ms: int = 5_000
    skew_ms: int = 5_000

    @property
    def keep_ms(self) -> int:
        """How far behind the frontier an event is still kept."""
        return self.span_ms + self.lateness_ms + self.skew_ms


class Event(NamedTuple):
    """A valid record.

    Attributes:
        lower_ms: Events at or before this were no longer kept when it arrived.
        rank: Its position among the user's events of that millisecond.
    """

    offset: int
    user_id: int
    name: str
    at_ms: int
    cents: int
    lower_ms: int
    rank: int

    @property
    def identity(self) -> tuple[int, str, int]:
        """What makes two records one transaction."""
        return self.user_id, self.name, self.at_ms


class Stats(NamedTuple):
    """Count and cents of a window."""

    count: int  # type: ignore[assignment]  # hides that of a tuple
    cents: int


class User:
    """One user's accepted events in the log's order."""

    def __init__(self, events: list[Event]) -> None:
        self.offsets, self.at_ms, self.cents = (
            np.array(column, dtype=np.int64)
            for column in zip(*((e.offset, e.at_ms, e.cents) for e in events), strict=True)
        )
        self.names = [e.name for e in events]

    def inside(self, after_ms: int, until_ms: int, end: int) -> Any:
        """Mark the events in `(after_ms, until_ms]` of the prefix before offset `end`."""
        return (self.offsets < end) & (self.at_ms > after_ms) & (self.at_ms <= until_ms)


class Partition:
    """The whole log of one partition; it computes values for any prefix.

    Args:
        rules: The window definition.
        records: (offset, timestamp in ms, value) in the log's order.

    Attributes:
        short: The same log without the part that was deleted at its start; None if it is whole.
    """

    def __init__(self, rules: Rules, records: Iterable[tuple[int, int, bytes | None]]) -> None:
        self.rules = rules
        self.short: Partition | None = None
        self.rejected: dict[int, bytes | None] = {}
        self.accepted: list[Event] = []
        self.first: dict[tuple[int, str, int], Event] = {}
        self.end = 0
        frontier_ms = 0
        frontiers: list[tuple[int, int]] = [(-1, 0)]
        events: dict[int, list[Event]] = {}
        seen: set[tuple[int, str, int]] = set()
        ranks: dict[tuple[int, int], int] = {}
        for offset, timestamp_ms, value in records:
            self.end = offset + 1
            read = _read(value, timestamp_ms + rules.skew_ms)
            if read is None:
                self.rejected[offset] = value
                continue
            user_id, name, at_ms, cents = read
            if at_ms > frontier_ms:
                frontier_ms = at_ms
                frontiers.append((offset, frontier_ms))
            lower_ms = frontier_ms - rules.keep_ms
            event = Event(offset, user_id, name, at_ms, cents, lower_ms, 0)
            self.first.setdefault(event.identity, event)
            if at_ms <= lower_ms or event.identity in seen:
                continue
            seen.add(event.identity)
            rank = ranks[user_id, at_ms] = ranks.get((user_id, at_ms), -1) + 1
            self.accepted.append(event._replace(rank=rank))
            events.setdefault(user_id, []).append(event)
        self.users = {user_id: User(of_user) for user_id, of_user in events.items()}
        self._frontiers = np.array(frontiers, dtype=np.int64)

    def frontier_ms(self, end: int) -> int:
        """Return the greatest event time of the prefix before offset `end`."""
        at = int(np.searchsorted(self._frontiers[:, 0], end, side="left"))
        return int(self._frontiers[max(0, at - 1), 1])

    def stats(
        self, user_id: int, after_ms: int, until_ms: int, end: int, without: str | None = None
    ) -> Stats:
        """Sum a user's events in `(after_ms, until_ms]` of the prefix before offset `end`.

        `without` names a transaction of time `until_ms` to leave out.
        """
        if (user := self.users.get(user_id)) is None:
            return Stats(0, 0)
        inside = user.inside(after_ms, until_ms, end)
        if without is not None:
            for i in np.flatnonzero(inside & (user.at_ms == until_ms)):
                inside[i] &= user.names[i] != without
        return Stats(int(inside.sum()), int(user.cents[inside].sum()))

    def decided(self, event: Event) -> Stats:
        """Sum the window that an accepted event was decided on: its own prefix, itself included."""
        after_ms = max(event.at_ms - self.rules.span_ms, event.lower_ms)
        return self.stats(event.user_id, after_ms, event.at_ms, event.offset + 1)

    def decisions(self) -> Iterator[tuple[Event, Stats]]:
        """Yield every accepted event with the window that it was decided on."""
        for event in self.accepted:
            yield event, self.decided(event)


def to_ms(text: str) -> int:
    """Read RFC 3339 as ms since the Unix epoch."""
    moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return round(moment.timestamp() * 1000)


def _read(value: bytes | None, latest_ms: int) -> tuple[int, str, int, int] | None:
    """Return (user id, name, event time, cents), or None when the record must be rejected."""
    try:
        document = json.loads(value or b"")
        user_id, name, amount = (document[k] for k in ("user_id", "transaction_id", "amount"))
        at_ms = to_ms(document["timestamp"])
        cents = round(amount * 100)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    good = (
        isinstance(user_id, int)
        and isinstance(name, str)
        and cents >= 0
        and cents / 100 == amount
        and at_ms <= latest_ms
    )
    return (user_id, name, at_ms, cents) if good else None
