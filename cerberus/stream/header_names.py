"""Read records with a header whose name is not UTF-8.

aiokafka 0.14 raises on such a record at every attempt, so one of them would stop all consumers.
`tolerate` makes it read such a fetch again, in Python, with these names escaped.
"""

import logging
from collections.abc import Sequence
from typing import Any

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, memory_records

log = logging.getLogger(__name__)
_HAVING_HEADERS = 2  # version of batches
_VERSION_AT = 16


def tolerate() -> None:
    """Make all consumers of this process read such records. Idempotent: yes.

    Other records are read as before, at the same cost.
    """
    fetcher.MemoryRecords = _Fetched
    fetcher.PartitionRecords = _Tolerant


class _Fetched:
    """A fetched part of a log, kept so that it can be read twice."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        records = memory_records.MemoryRecords(raw)
        self.has_next = records.has_next
        self.next_batch = records.next_batch
        self.size_in_bytes = records.size_in_bytes


class _Slow(memory_records._MemoryRecordsPy):  # type: ignore[misc]
    """The same part, read in Python."""

    def next_batch(self, *_: Any) -> Any:
        raw = self._next_slice
        if raw is None or raw[_VERSION_AT] < _HAVING_HEADERS:
            return super().next_batch()
        self._cache_next()
        batch = default_records._DefaultRecordBatchPy(raw)
        if not batch.validate_crc():
            raise CorruptRecordException("invalid CRC")
        batch.validate_crc = lambda: True  # the following changes invalidate it
        batch._maybe_uncompress()
        batch._buffer = _Escaping(batch._buffer)
        return batch


class _Escaping(bytearray):
    """Bytes whose slices decode to text, whatever they contain."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Escaping(found) if isinstance(at, slice) else found

    def decode(self, *_: Any) -> str:
        return bytes(self).decode("utf-8", "backslashreplace")


class _Tolerant(fetcher.PartitionRecords):  # type: ignore[misc]
    _records_iterator: Any

    def __init__(
        self, tp: Any, records: _Fetched, aborted: Sequence[Any] | None, *rest: Any
    ) -> None:
        super().__init__(tp, records, aborted, *rest)
        self._fetched, self._aborted = records, aborted

    def __next__(self) -> Any:
        try:
            return next(self._records_iterator)
        except StopIteration:
            self._records_iterator = None
            raise
        except UnicodeDecodeError:
            log.warning("a header's name is not UTF-8", extra={"action": "header_name"})
            super().__init__(
                self._tp,
                _Slow(self._fetched.raw),
                self._aborted,
                self.next_fetch_offset,
                self._key_deserializer,
                self._value_deserializer,
                self._check_crcs,
                self._isolation_level,
            )
            return next(self)
