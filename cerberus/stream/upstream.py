"""What is wrong with the log's writers: records that are refused, users in several partitions."""

import time
from collections.abc import Iterable

import aiokafka

from cerberus import partition
from cerberus.postgres import lives
from cerberus.stream import dead_letters, rejections, sink

_SPLIT = (
    "records of one user are in several partitions: key every record with user_id as ASCII digits "
    "and the default (murmur2) partitioner; after partitions were added, this passes by itself"
)


class Upstream:
    """Judges the topic's writers by the records that this process reads, except in a replay.

    Args:
        max_rejected_share: As in `rejections.Rejections`.
        longest_ms: The longest window: how long the values of a split user stay in doubt.
    """

    def __init__(self, max_rejected_share: float, longest_ms: int) -> None:
        self._longest_s = longest_ms / 1000
        self._rejections = rejections.Rejections(max_rejected_share)
        self._resumed = 0
        self._excused: dict[int, int] = {}
        self._split_s = 0.0

    def forget(self) -> None:
        """Forget what was refused."""
        self._rejections.clear()

    def excuse(self, parts: Iterable[partition.Partition], resumed: lives.Resumed) -> None:
        """Excuse refused records that were in the log when consuming was last resumed.

        Args:
            parts: Partitions that are about to be read.
            resumed: Where their logs ended then.
        """
        self._resumed = resumed.number
        ends = dict(enumerate(resumed.ends))
        for part in parts:
            # If the topic was created again since, its offsets belong to other records.
            same = resumed.epoch >= part.since_epoch
            self._excused[part.number] = ends.get(part.number, 0) if same else 0

    def goes_on(self, resumed: lives.Resumed) -> bool:
        """Return whether consuming was resumed since `excuse` was last called."""
        return resumed.number != self._resumed

    def _excuses(self, record: aiokafka.ConsumerRecord) -> bool:
        return (
            record.offset < self._excused.get(record.partition, 0)
            or dead_letters.rounds(record.headers) > 0  # an operator sent it again
        )

    def split(self) -> str:
        """Note a record outside its user's partition; return what to say about it."""
        self._split_s = time.monotonic()
        return _SPLIT

    def splits(self) -> bool:
        """Return whether a window may still hold such a record."""
        return time.monotonic() - self._split_s <= self._longest_s

    def breaks_schema(self, batch: sink.Batch) -> str | None:
        """Add a batch; return why so much is refused that the writer, not a record, is at fault."""
        judged, before = self._rejections, 0
        for record, reason, after in batch.rejected:
            judged.accept(after - before)
            before = after
            if self._excuses(record):
                continue
            if judged.refuse():
                return (
                    f"{judged.refused} of the last {judged.judged} records were refused, as in "
                    f"partition {record.partition} at offset {record.offset}: {reason}. Consuming "
                    "has stopped: repair the topic's writer, look at `cerberus dlq list`, then run "
                    "`cerberus resume`, which turns the records refused so far into dead letters"
                )
        judged.accept(len(batch.observed) - before)
        return None
