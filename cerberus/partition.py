"""One partition's life: from records of the log to what must be stored, in the log's order.

Pure: a record's fate depends on the prefix before it and on its own bytes and timestamp.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cerberus import judging, transactions, window
from cerberus.features import evaluation, fences
from cerberus.features import packed as packed_windows

_WITNESSES = 3


@dataclass(frozen=True, slots=True)
class Observed:
    """A valid transaction and what the windows made of it.

    Attributes:
        transaction: As decoded.
        outcome: What the windows made of it.
        fence: The prefix that ends with it.
        rank: How many kept events the user had in the same millisecond before it.
        row: Features as of its own event time; None unless it was accepted.
    """

    transaction: transactions.Transaction
    outcome: window.Outcome
    fence: fences.Fence
    rank: int
    row: evaluation.FeatureRow | None


@dataclass(frozen=True, slots=True)
class Moved:
    """A change of the number of partitions, after which users may have events in another one.

    Attributes:
        until_ms: Events at or before it may be in the user's former partition.
        former: How many partitions there were; None when two changes came within a window, so that
            nothing says who stayed.
    """

    until_ms: int
    former: int | None


@dataclass(frozen=True, slots=True)
class Start:
    """Where a partition starts to be read, and what lies before it.

    Attributes:
        epoch: Which life of the topic.
        begin: The first offset to read.
        commit: Effects of offsets below it are stored already; they are replayed without effects.
        count: How many partitions the topic has, which says whose records belong here; None: all
            do.
        known_from_ms: Events at or before it may be missing.
        moved: The last change of the number of partitions; None when it is unknown to windows.
        since_epoch: In which this log was first read; it stays when only the number of partitions
            changes. None: `epoch`.
        seeded_until_ms: Users may have events up to it, from before `begin`, which the replay does
            not reach; None when it reaches all.
        imported_until_ms: Users may have events up to it that no log holds; None when there are
            none.
        committed_ms: The greatest event time below `commit`; None when it is not known.
        floor_ms: The lowest value that `known_from_ms` may fall to once records show how late the
            lost ones before them may have been; None if records are not used for that.
    """

    epoch: int
    begin: int
    commit: int
    count: int | None = None
    known_from_ms: int = 0
    moved: Moved | None = None
    since_epoch: int | None = None
    seeded_until_ms: int | None = None
    imported_until_ms: int | None = None
    committed_ms: int | None = None
    floor_ms: int | None = None


class Partition:
    """The windows of one partition at one prefix of its log.

    Args:
        number: Of the partition.
        spans: The window definition.
        start: Where it is read from.

    Attributes:
        offset: Where the prefix ends, exclusive.
        commit: Effects of offsets below it are stored.
        known_from_ms: As in `Start`.
        split_ms: The newest event of a user whose home is another partition; 0 when there is none.
            A replay passes over those that the last change of the number of partitions explains.
        touched: Users whose rows differ from those that were written last; the writer clears it.
    """

    def __init__(self, number: int, spans: window.Spans, start: Start) -> None:
        self.number = number
        self.count = start.count
        self.epoch = start.epoch
        self.since_epoch = start.since_epoch or start.epoch
        self.begin = start.begin
        self.offset = start.begin
        self.commit = start.commit
        self.known_from_ms = start.known_from_ms
        self.moved = start.moved
        self.imported_until_ms = start.imported_until_ms
        self.windows = window.PartitionWindows(spans)
        self.split_ms = 0
        self.touched: set[int] = set()
        self._committed_ms = start.committed_ms
        self._floor_ms = start.floor_ms
        self._witnesses = 0 if start.floor_ms is None else _WITNESSES
        self._gap_end = 0
        self._origin = fences.Fence(start.epoch, start.begin, start.seeded_until_ms or 0)
        self._strangers: set[int] = set()
        self._seeded: set[int] = set()
        self._imported: set[int] = set()

    @property
    def replaying(self) -> bool:
        """Whether the prefix is still shorter than what was stored."""
        return self.offset < self.commit

    @property
    def fence(self) -> fences.Fence:
        """Return the fence of the present prefix; an empty one is as of where the log begins."""
        as_of_ms = self.windows.frontier_ms or self.imported_until_ms or 0
        return fences.Fence(self.epoch, self.offset, as_of_ms)

    @property
    def origin(self) -> fences.Fence:
        """Return the prefix where reading began; events from before it are seeded."""
        return self._origin

    @property
    def seeds_log(self) -> bool:
        """Whether events of the log from before `origin` may still matter."""
        return 0 < self._origin.as_of_ms > self.windows.lower_ms

    @property
    def seeds_imported(self) -> bool:
        """Whether events that were imported may still matter."""
        until_ms = self.imported_until_ms
        return until_ms is not None and until_ms > self.windows.lower_ms

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

    def expect(self, next_ms: int) -> bool:
        """Return whether the first record, at `next_ms`, is older than was expected.

        Until it came, nothing was fetched that is too old for windows at `imported_until_ms`; so
        nobody counts as seeded any more.
        """
        unread = not (self._origin.as_of_ms or self.windows.frontier_ms)
        earlier = unread and next_ms < (self.imported_until_ms or 0)
        if earlier:
            self._seeded.clear()
        return earlier

    def at_home(self, user_id: int) -> bool:
        """Whether this is the partition of the user's records."""
        return self.count is None or transactions.partition_of(user_id, self.count) == self.number

    def strangers(self, user_ids: Iterable[int]) -> dict[int, int]:
        """Return the newest event, ms, of the users whose home is another partition."""
        found = {i: self.windows.user(i) for i in self._strangers.intersection(user_ids)}
        return {user_id: user.newest_ms for user_id, user in found.items() if user}

    def unseeded(self, user_ids: Iterable[int]) -> set[int]:
        """Return which of the users may have events that only the store has."""
        return set(user_ids) - self._seeded

    def seed(
        self,
        user_ids: Iterable[int],
        past: Iterable[transactions.Transaction] = (),
        imported: Iterable[transactions.Transaction] = (),
    ) -> None:
        """Add events from before `origin`, then from before any log: all, or a part of them.

        Args:
            user_ids: Users who miss nothing after this; until then their rows are not written.
            past: The log's events before `origin`, of any users.
            imported: Events that no log has, of any users; after all of `past`.
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
            if (user := self.windows.user(user_id)) is not None:
                self._touch(user_id)
                self._note_split(user_id, user.newest_ms, silent=True)

    def _meet(self, transaction: transactions.Transaction) -> None:
        """Make room for what the log tells: it replaces the same event where that was imported."""
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

    def _note_split(self, user_id: int, event_ms: int, *, silent: bool) -> None:
        if user_id in self._strangers:
            explained_ms = self.moved.until_ms if silent and self.moved else 0
            if event_ms > explained_ms:
                self.split_ms = max(self.split_ms, event_ms)

    def take(
        self, record: judging.Record, verdict: transactions.Transaction | judging.Rejected
    ) -> Observed | judging.Rejected | None:
        """Apply the next record of the log, in the same way at every door and every replay.

        Args:
            record: The next one of the log.
            verdict: What `judge` returned for it.

        Returns:
            What must be stored; None below the commit, where that is stored already.
        """
        if self._witnesses:
            self._witness(record)
        silent = self.replaying
        self.offset = record.offset + 1
        if isinstance(verdict, judging.Rejected):
            return None if silent else verdict
        self._meet(verdict)
        rank = 0 if silent else self.windows.rank(verdict.user_id, verdict.event_ms)
        outcome = self.windows.observe(verdict)
        accepted = outcome is window.Outcome.ACCEPTED
        if accepted:
            self._touch(verdict.user_id)
            self._note_split(verdict.user_id, verdict.event_ms, silent=silent)
        if silent:
            return None
        row = self._row(verdict) if accepted else None
        return Observed(verdict, outcome, self.fence, rank, row)

    def skip_to(self, position: int) -> None:
        """Pass what is not a record, such as the marker of a writer's transaction."""
        self.offset = max(self.offset, position)

    def miss(self, end: int, now_ms: int) -> None:
        """Doubt the windows that need what was removed from inside the log.

        Args:
            end: The offset after what was removed.
            now_ms: Wall clock; no removed record is later than that by more than the skew.
        """
        if end <= self.offset:
            return
        if end <= self.commit and self._committed_ms is not None:
            self.known_from_ms = max(self.known_from_ms, self._committed_ms)
            return
        if self._floor_ms is None:
            self._floor_ms = self.known_from_ms
        # A gap is known as soon as it is fetched, before the records that lie before it are read.
        self._witnesses, self._gap_end = _WITNESSES, max(self._gap_end, end)
        gone_ms = now_ms + self.windows.spans.max_future_skew_ms
        self.known_from_ms = max(self.known_from_ms, gone_ms)

    def _witness(self, record: judging.Record) -> None:
        """Use the next record as a bound on how late the lost events before it may be.

        They may be later than it by the slack, unless it was itself too late: so several are used.
        """
        if record.offset < self._gap_end:
            return
        spans = self.windows.spans
        gone_ms = record.timestamp + spans.slack_ms
        self._witnesses -= 1
        if self._floor_ms is not None:
            self.known_from_ms = max(self._floor_ms, self.windows.frontier_ms, gone_ms)
            self._floor_ms = None
        elif gone_ms > self.known_from_ms + spans.allowed_lateness_ms:
            self.known_from_ms = gone_ms

    def resume(self, commit: int, committed_ms: int | None = None) -> None:
        """Read on from the present prefix, all effects of which are stored, up to the commit."""
        self.begin, self.commit, self._committed_ms = self.offset, commit, committed_ms

    def _row(self, transaction: transactions.Transaction) -> evaluation.FeatureRow:
        as_of_ms, user_id = transaction.event_ms, transaction.user_id
        after_ms = as_of_ms - self.windows.spans.longest_ms
        degraded: tuple[evaluation.Doubt, ...] = ()
        known_from_ms = self.known_from_ms
        if self.moved is not None:
            known_from_ms = self.state().known_from(user_id, self.number)
        if after_ms < known_from_ms:
            degraded = (evaluation.Doubt.WARMING,)
        elif after_ms < self.windows.lower_ms:
            degraded = (evaluation.Doubt.AS_OF_TOO_OLD,)
        return evaluation.FeatureRow(
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

        Only for users with events whose home this is: a row from another partition would stand in
        the way of the home's.
        """
        windows, fence = self.windows, self.fence
        lower_ms = max(fence.as_of_ms - windows.spans.keep_ms, self.known_from_ms or -1)
        for user_id in user_ids:
            if user_id in self._strangers:
                continue
            if (user := windows.user(user_id)) is not None:
                packed = packed_windows.pack(user, fence, self.number, lower_ms, windows.spans)
                yield user_id, packed, windows.stats(user_id, fence.as_of_ms)

    def state(self) -> fences.PartitionState:
        """Return what readers of its rows need to know about the prefix.

        While it replays, the offset is the commit: the rows of that prefix are stored.
        """
        done = self.offset - self.begin
        state = fences.LIVE
        if self.replaying:
            state = evaluation.Doubt.REPLAYING
        return fences.PartitionState(
            epoch=self.epoch,
            offset=max(self.offset, self.commit),
            state=state,
            caught_up_ms=0,
            known_from_ms=self.known_from_ms,
            progress=done / (self.commit - self.begin) if self.replaying else 1.0,
            moved_ms=self.moved.until_ms if self.moved else 0,
            former=(self.moved.former or 0) if self.moved else 0,
            count=self.count or 0,
            version=fences.SPOKEN,
            split_ms=self.split_ms,
        )
