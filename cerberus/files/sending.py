"""Publishing the transactions of a file to the log, at once, at a rate or at recorded speed.

The file is read twice, so an invalid row is reported before any row is sent. Record
timestamps are the time of sending: brokers delete records by them, and with event times they would
delete old transactions unread.
"""

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence

import tqdm

from cerberus import clock, errors, kafka, publishing, settings, transactions
from cerberus.files import capacity, datafiles, layouts

_ROWS, _BATCH = 5_000, 1_000
_SLOWEST = 0.001
_LONGEST_WAIT_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """When each transaction of a file is due; all at once when neither rate nor speed is given.

    Attributes:
        rate: Transactions a second.
        speed: How many times faster than the file's timestamps the transactions are sent.
        now: Whether each transaction is stamped with the moment when it is due.
    """

    rate: float | None = None
    speed: float | None = None
    now: bool = False

    def due_ms(self, number: int, event_ms: int, first_ms: int) -> int:
        """Return when a transaction is due, in ms after the beginning.

        Args:
            number: How many transactions come before it.
            event_ms: Its time in the file, ms since the Unix epoch.
            first_ms: The time of the file's first transaction.
        """
        if self.rate is not None:
            return int(number / self.rate * 1000)
        return int((event_ms - first_ms) / self.speed) if self.speed is not None else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What a file holds.

    Attributes:
        count: How many transactions.
        first_ms: The time of the first.
        latest_ms: The latest time.
        bytes_by_partition: Their size in the log, before compression.
    """

    count: int
    first_ms: int
    latest_ms: int
    bytes_by_partition: Sequence[int] = ()


class Sender:
    """Reads a file and publishes it.

    Args:
        config: The settings.
        path: The file, or a folder or glob of its parts.
        layout: How the file is read.
        pace: When each transaction is due.

    Raises:
        InvalidInput: The file lacks a column of a transaction.
    """

    def __init__(
        self, config: settings.Settings, path: pathlib.Path, layout: layouts.Layout, pace: Pace
    ) -> None:
        self._config = config
        self._root = datafiles.root_of(path)
        self._parts = datafiles.parts(path)
        self._layout = layout
        self._open(self._parts[0])
        self._pace = pace
        self._topic = config.kafka.topic(kafka.TRANSACTIONS)

    def check(self, partitions: int = 1) -> Found:
        """Read the whole file.

        Args:
            partitions: How many the topic has.

        Raises:
            InvalidInput: naming the line and the field.
        """
        latest_allowed_ms = clock.now_ms() + self._config.windows.max_future_skew_ms
        count = first_ms = latest_ms = 0
        sizes = [0] * partitions
        for place, paid in self._transactions():
            if paid.event_ms > latest_allowed_ms and not self._pace.now:
                raise errors.InvalidInput(f"{place}: timestamp", "lies in the future")
            first_ms = first_ms if count else paid.event_ms
            latest_ms = max(latest_ms, paid.event_ms)
            count += 1
            size = len(transactions.encode(paid)) + len(transactions.key(paid.user_id))
            number = transactions.partition_of(paid.user_id, partitions)
            sizes[number] += size + capacity.RECORD_BYTES
        return Found(count, first_ms, latest_ms, sizes)

    def load(self, found: Found) -> capacity.Load:
        """Return the load that the file puts on the topic at this pace."""
        duration_ms = self._pace.due_ms(found.count, found.latest_ms, found.first_ms)
        return capacity.Load(found.count, found.bytes_by_partition, duration_ms)

    async def send(self, found: Found) -> int:
        """Publish the file in order, each transaction when it is due; return how many.

        Raises:
            InvalidInput: The topic refuses a transaction.
            StoreUnavailable: The brokers did not acknowledge all transactions.
        """
        publisher = publishing.Publisher(self._config)
        begin_ms, begin_s, sent = clock.now_ms(), time.monotonic(), 0
        batch: list[publishing.Message] = []
        try:
            with tqdm.tqdm(total=found.count, unit=" transactions", disable=None) as bar:

                async def flush() -> None:
                    await publisher.publish_all(batch)
                    bar.update(len(batch))
                    batch.clear()

                for _, paid in self._transactions():
                    due_ms = self._pace.due_ms(sent, paid.event_ms, found.first_ms)
                    while (wait_s := begin_s + due_ms / 1000 - time.monotonic()) > 0:
                        await flush()
                        await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S))
                    batch.append(self._message(paid, begin_ms + due_ms))
                    sent += 1
                    if len(batch) == _BATCH:
                        await flush()
                await flush()
        finally:
            await publisher.close()
        return sent

    def _open(self, path: pathlib.Path) -> datafiles.File:
        return self._layout.open(path, layouts.REQUIRED, layouts.OPTIONAL, self._root)

    def _transactions(self) -> Iterator[tuple[str, transactions.Transaction]]:
        for file in map(self._open, self._parts):
            within = f"{file.name}, " if self._root else ""
            for rows, _ in file.pieces(_ROWS):
                for row in rows:
                    place = f"{within}line {row.line}"
                    try:
                        yield place, layouts.transaction(row, self._config.currency)
                    except errors.InvalidInput as error:
                        raise errors.InvalidInput(
                            f"{place}: {error.field}", error.reason
                        ) from error

    def _message(self, paid: transactions.Transaction, due_ms: int) -> publishing.Message:
        if self._pace.now:
            paid = dataclasses.replace(paid, event_ms=due_ms)
        return publishing.Message(
            self._topic, transactions.key(paid.user_id), transactions.encode(paid)
        )
