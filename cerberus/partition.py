"""One partition's life: from records of the log to what must be stored, in the log's order.

Pure: a record's fate depends on the prefix before it and on its own bytes and timestamp.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cerberus import errors, features, transactions, window


class Record(Protocol):
    """What is read of a Kafka record."""

    @property
    def offset(self) -> int:
        """Its place in the log."""

    @property
    def timestamp(self) -> int:
        """Its own time, ms."""

    @property
    def value(self) -> bytes | None:
        """Its bytes."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A valid transaction, and what it was to the windows.

    Attributes:
        transaction: As decoded.
        outcome: What the windows made of it.
        fence: The prefix that ends with it.
        rank: How many kept events the user had in the same millisecond before it.
        row: Features as of its own event time; None unless it was accepted.
    """

    transaction: transactions.Transaction
    outcome: window.Outcome
    fence: features.Fence
    rank: int
    row: features.FeatureRow | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record for the dead-letter topic, and the reason."""

    offset: int
    reason: str


def judge(
    record: Record, currency: str, spans: window.Spans
) -> transactions.Transaction | Rejected:
    """Read a record; what is refused is refused at every replay."""
    try:
        transaction = transactions.decode(record.value, currency)
    except errors.InvalidTransaction as error:
        return Rejected(record.offset, str(error))
    ahead_ms = transaction.event_ms - record.timestamp
    if ahead_ms > spans.max_future_skew_ms:
        return Rejected(record.offset, f"timestamp: lies {ahead_ms} ms ahead of the record's own")
    return transaction


@dataclass(slots=True)
class Trail:
    """What the last write of rows left beside them in the online store.

    A store that was restored to an earlier moment, as after a crash or a failover, has another
    trail than its writer remembers, and has lost rows.

    Attributes:
        left: Acknowledged; empty before the first write.
        tried: Sent last, acknowledged or not.
    """

    left: str = ""
    tried: str = ""


class Partition:
    """The windows of one partition at one prefix, and how far its effects are stored.

    Args:
        number: Of the partition.
        spans: The window definition.
        epoch: Which life of the topic.
        begin: Where reading starts.
        commit: Effects of offsets below it are stored already; replayed in silence.
        count: How many partitions the topic has, which says whose records belong here; 0: all.
        known_from_ms: Events at or before it may be missing, because the log begins later; -1
            until its first record is seen.
        moved: Until when, ms, there were how many partitions fewer or more; users who had another
            partition then may have events in it.
        since_epoch: In which this log was first read; it stays when only the number of partitions
            changes. `epoch` when 0.
        seeded_until_ms: Users may have events up to it, from before `begin`, which the log's
            replay does not reach; 0 when it reaches all.
        imported_until_ms: Users may have events up to it that no log has told of; 0 when there are
            none.
        rebuilding: Whether a new epoch is being read from the log's start.

    Attributes:
        restoring: Whether rows must be sent again, because the online store has lost some.
        unloaded: Whether the online store has lost the credit scores.
        caught_up_ms: Wall clock at which its effects reached the log's end.
        touched: Users whose rows are to be written.
        trail: Of its rows in the online store.
    """

    def __init__(
        self,
        number: int,
        spans: window.Spans,
        epoch: int,
        begin: int,
        commit: int,
        *,
        count: int = 0,
        known_from_ms: int = 0,
        moved: tuple[int, int] = (0, 0),
        since_epoch: int = 0,
        seeded_until_ms: int = 0,
        imported_until_ms: int = 0,
        rebuilding: bool = False,
    ) -> None:
        self.number = number
        self.count = count
        self.epoch = epoch
        self.since_epoch = since_epoch or epoch
        self.begin = begin
        self.offset = begin
        self.commit = commit
        self.known_from_ms = known_from_ms
        self.moved = moved
        self.rebuilding = rebuilding
        self.restoring = self.unloaded = False
        self.caught_up_ms = 0
        self.windows = window.PartitionWindows(spans)
        self.touched: set[int] = set()
        self.trail = Trail()
        self._strangers: set[int] = set()
        self._origin = features.Fence(epoch, begin, seeded_until_ms)
        self._seeded: set[int] = set()
        self.imported_until_ms = imported_until_ms
        self._imported: set[int] = set()

    @property
    def replaying(self) -> bool:
        """Whether the prefix is still shorter than what was stored."""
        return self.offset < self.commit

    @property
    def fence(self) -> features.Fence:
        """Return the fence of the present prefix; an empty one is as of where the log begins."""
        as_of_ms = self.windows.frontier_ms or self.imported_until_ms
        return features.Fence(self.epoch, self.offset, as_of_ms)

    @property
    def origin(self) -> features.Fence:
        """Return the prefix where reading began; events from before it are seeded."""
        return self._origin

    @property
    def seeds_log(self) -> bool:
        """Whether events of the log from before `origin` may still matter."""
        return 0 < self._origin.as_of_ms > self.windows.lower_ms

    @property
    def seeds_imported(self) -> bool:
        """Whether events that were imported may still matter."""
        return 0 < self.imported_until_ms > self.windows.lower_ms

    @property
    def seeds(self) -> bool:
        """Whether events that the log's replay does not reach may still matter."""
        return self.seeds_log or self.seeds_imported

    def seed_after_ms(self, next_ms: int) -> int:
        """Return the time before which no window needs what the replay does not reach.

        Args:
            next_ms: Event time of the next valid record, which is a bound where nothing was read.
        """
        since_ms = self._origin.as_of_ms or (0 if self.windows.frontier_ms else next_ms)
        return max(self.windows.lower_ms, since_ms - self.windows.spans.keep_ms)

    def expect(self, next_ms: int) -> None:
        """Forget who is seeded if the first record, at `next_ms`, is older than was expected.

        Until it came, nothing was fetched that is too old for windows at `imported_until_ms`.
        """
        unread = not (self._origin.as_of_ms or self.windows.frontier_ms)
        if unread and next_ms < self.imported_until_ms:
            self._seeded.clear()
            self.restoring = True

    def at_home(self, user_id: int) -> bool:
        """Whether this is the partition of the user's records."""
        return not self.count or transactions.partition_of(user_id, self.count) == self.number

    def strangers(self, user_ids: Iterable[int]) -> dict[int, int]:
        """Return the newest event, ms, of the users whose home is another partition."""
        found = {i: self.windows.user(i) for i in self._strangers.intersection(user_ids)}
        return {user_id: user.newest_ms for user_id, user in found.items() if user}

    def unseeded(self, user_ids: Iterable[int]) -> set[int]:
        """Return which of the users may have events that only the store can tell of."""
        return set(user_ids) - self._seeded

    def seed(
        self,
        user_ids: Iterable[int],
        past: Iterable[transactions.Transaction] = (),
        imported: Iterable[transactions.Transaction] = (),
    ) -> None:
        """Take in what was done before `origin`, then before any log: all, or a part of it.

        Args:
            user_ids: Of whom nothing is missing after this; until then nobody is shown their rows.
            past: What the log told before `origin`, of whomever.
            imported: What no log has told, of whomever; after all of `past`.
        """
        for transaction in past:
            self.windows.seed(transaction)
        for transaction in imported:
            if (
                self.at_home(transaction.user_id)
                and self.windows.seed(transaction) is window.Outcome.ACCEPTED
            ):
                self._imported.add(transaction.id_hash64)
        for user_id in user_ids:
            self._seeded.add(user_id)
            if self.windows.user(user_id) is not None:
                self._touch(user_id)

    def _meet(self, transaction: transactions.Transaction) -> None:
        """Make room for what the log tells: it stands where the same was imported."""
        if not self._imported:
            return
        if not self.seeds_imported:
            self._imported.clear()
        elif (name := transaction.id_hash64) in self._imported:
            self._imported.discard(name)
            self.windows.withdraw(transaction)

    def _touch(self, user_id: int) -> None:
        if user_id not in self.touched:
            self.touched.add(user_id)
            if not self.at_home(user_id):
                self._strangers.add(user_id)

    def replay(self, offset: int, verdict: transactions.Transaction | Rejected) -> None:
        """Let a record take effect whose effects are stored already."""
        self.offset = offset + 1
        if isinstance(verdict, Rejected):
            return
        self._meet(verdict)
        if self.windows.observe(verdict) is window.Outcome.ACCEPTED:
            self._touch(verdict.user_id)

    def observe(self, record: Record, currency: str) -> Observed | Rejected:
        """Let the next record of the log take effect."""
        verdict = judge(record, currency, self.windows.spans)
        if isinstance(verdict, Rejected):
            self.offset = record.offset + 1
            return verdict
        return self.accept(verdict, record.offset)

    def accept(self, transaction: transactions.Transaction, offset: int) -> Observed:
        """Let the valid transaction at `offset` take effect."""
        self.offset = offset + 1
        self._meet(transaction)
        rank = self.windows.rank(transaction.user_id, transaction.event_ms)
        outcome = self.windows.observe(transaction)
        row = None
        if outcome is window.Outcome.ACCEPTED:
            self._touch(transaction.user_id)
            row = self._row(transaction)
        return Observed(transaction, outcome, self.fence, rank, row)

    def _row(self, transaction: transactions.Transaction) -> features.FeatureRow:
        as_of_ms, user_id = transaction.event_ms, transaction.user_id
        after_ms = as_of_ms - self.windows.spans.longest_ms
        degraded: tuple[str, ...] = ()
        known_from_ms = self.known_from_ms
        if self.moved[0]:
            known_from_ms = self.state().known_from(user_id, self.number)
        if after_ms < known_from_ms:
            degraded = ("warming",)
        elif after_ms < self.windows.lower_ms:
            degraded = ("as_of_too_old",)
        return features.FeatureRow(
            user_id=user_id,
            as_of_ms=as_of_ms,
            stats=self.windows.stats(user_id, as_of_ms),
            credit_score=None,
            amount_minor=transaction.amount_minor,
            fence=self.fence,
            degraded=degraded,
        )

    def rows(
        self, user_ids: Iterable[int]
    ) -> Iterator[tuple[int, bytes, tuple[window.WindowStats, ...]]]:
        """Yield (user id, packed window, aggregates) as of the fence.

        Only of those with any event, and whose home this is: another partition's row would stand
        in the way of the home's.
        """
        windows, fence = self.windows, self.fence
        lower_ms = max(fence.as_of_ms - windows.spans.keep_ms, self.known_from_ms)
        for user_id in user_ids:
            if user_id in self._strangers:
                continue
            if (user := windows.user(user_id)) is not None:
                packed = features.pack(user, fence, self.number, lower_ms, windows.spans)
                yield user_id, packed, windows.stats(user_id, fence.as_of_ms)

    def state(self) -> features.PartitionState:
        """Say how the partition is, for those who read its rows.

        While it replays, the offset is the commit: the rows of that prefix are stored.
        """
        done = self.offset - self.begin
        state = "live"
        if self.replaying:
            state = "replaying"
        elif self.rebuilding:
            state = "rebuilding"
        elif self.restoring or self.unloaded:
            state = "restoring"
        return features.PartitionState(
            epoch=self.epoch,
            offset=max(self.offset, self.commit),
            state=state,
            caught_up_ms=self.caught_up_ms,
            known_from_ms=self.known_from_ms,
            progress=done / (self.commit - self.begin) if self.replaying else 1.0,
            moved_ms=self.moved[0],
            former=self.moved[1],
            count=self.count,
            version=features.SPOKEN,
        )
