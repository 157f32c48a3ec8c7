"""What is wrong with the log's writers: records that are refused, users in several partitions."""

import collections
import time

from cerberus.stream import sink

_BREAK_RECORDS, _BREAK_S = 200, 60.0
_SPLIT = (
    "records of one user are in several partitions: key every record with user_id as ASCII digits "
    "and the default (murmur2) partitioner; after partitions were added, this passes by itself"
)


class Upstream:
    """Judges the topic's writers by their records.

    Args:
        max_rejected_share: The most of a minute's records that may be refused, if they are 200
            or more.
        longest_ms: The longest window: how long the values of a split user stay in doubt.
    """

    def __init__(self, max_rejected_share: float, longest_ms: int) -> None:
        self._max_rejected_share = max_rejected_share
        self._longest_s = longest_ms / 1000
        self._judged: collections.deque[tuple[float, int, int]] = collections.deque()
        self._split_s = 0.0

    def forget(self) -> None:
        """Forget what was refused."""
        self._judged.clear()

    def split(self) -> str:
        """Note a record outside its user's partition; return what to say about it."""
        self._split_s = time.monotonic()
        return _SPLIT

    def splits(self) -> bool:
        """Return whether a window may still hold such a record."""
        return time.monotonic() - self._split_s <= self._longest_s

    def breaks_schema(self, batch: sink.Batch) -> str | None:
        """Add a batch; return why so much is refused that the writer, not a record, is at fault."""
        now_s, rejected = time.monotonic(), len(batch.rejected)
        if rejected or batch.observed:
            self._judged.append((now_s, rejected + len(batch.observed), rejected))
        while self._judged and self._judged[0][0] < now_s - _BREAK_S:
            self._judged.popleft()
        seen = sum(entry[1] for entry in self._judged)
        refused = sum(entry[2] for entry in self._judged)
        if seen < _BREAK_RECORDS or refused <= seen * self._max_rejected_share:
            return None
        return (
            f"{refused} of {seen} records in a minute were refused, the last because "
            f"{batch.rejected[-1][1] if rejected else 'of its form'}: consuming has stopped; fix "
            "the topic's writer, then restart with CERBERUS_MAX_REJECTED_SHARE=1 to set them aside"
        )
