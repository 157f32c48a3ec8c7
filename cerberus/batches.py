"""Record batches of a Kafka log as bytes: what their headers say, and one batch in pieces.

aiokafka shows records, not batches, and decompresses a batch as a whole. The offsets of a log have
no gaps, and a header keeps its batch's range and count even after compaction, so headers show
exactly what was removed. They also limit what a batch takes in memory: 13 kB of zstd may unpack to
270 MB. The format is version 2 (Kafka 0.11 or later); older batches are passed unchecked.
"""

import asyncio
import contextlib
import dataclasses
import struct
import zlib
from collections.abc import Iterator

import cramjam
from aiokafka import codec as codecs
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

RECORD_BYTES = 1 << 20
"""A record with a longer value, key or headers is described instead of held in memory."""
_BATCH_BYTES = 1 << 30
_HEADER = struct.Struct(">qiibIhiqqqhii")
_LOG_OVERHEAD, _CRC_AT, _ATTRIBUTES_AT = 12, 17, 21
_GZIP, _SNAPPY, _LZ4, _ZSTD = range(1, 5)
_CODEC, _APPEND_TIME, _CONTROL, _DELETE_HORIZON = 7, 8, 32, 64
_GZIP_RATIO, _LZ4_RATIO = 1_032, 255
_ZSTD_BLOCK = 1 << 17
_XERIAL = b"\x82SNAPPY\0"
_CHUNK, _TURN_BYTES = 1 << 16, 1 << 20
_ARROW = {_LZ4: "lz4", _ZSTD: "zstd"}
_LOOSE, _SMALL_BYTES = 16, 1 << 20
_DECODE = {_GZIP: codecs.gzip_decode, _LZ4: codecs.lz4_decode, _ZSTD: codecs.zstd_decode}


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One batch of a fetched log.

    Attributes:
        at: Where its bytes begin in what was fetched.
        raw: Its bytes.
        base: Its first offset when it was written.
        end: The offset after its last one when it was written.
        attributes: Codec, kind of timestamp, control.
        first_ms: Timestamp of its first record.
        max_ms: The greatest timestamp of its records.
        count: How many records it holds now.
    """

    at: int
    raw: memoryview
    base: int
    end: int
    attributes: int
    first_ms: int
    max_ms: int
    count: int

    def whole(self, begin: int) -> bool:
        """Return whether its first record is still there and not before an offset."""
        return self.base >= begin and not self.lacks and not self.attributes & _DELETE_HORIZON

    @property
    def first(self) -> tuple[int, int]:
        """Offset and timestamp of its first record, if none was removed."""
        return self.base, self.max_ms if self.attributes & _APPEND_TIME else self.first_ms

    @property
    def compressed(self) -> bool:
        """Whether its records are compressed."""
        return bool(self.attributes & _CODEC)

    @property
    def lacks(self) -> bool:
        """Whether records were removed from it."""
        return self.count < self.end - self.base and not self.attributes & _CONTROL


def split(fetched: bytes) -> Iterator[Batch]:
    """Yield the complete batches; end at one of an older format. Cost: 2 µs each."""
    at, view = 0, memoryview(fetched)
    while at + _HEADER.size <= len(view):
        (base, length, _, magic, _, attributes, last, first_ms, max_ms, _, _, _, count) = (
            _HEADER.unpack_from(view, at)
        )
        end = at + _LOG_OVERHEAD + length
        if magic < 2 or end > len(view):
            return
        yield Batch(at, view[at:end], base, base + last + 1, attributes, first_ms, max_ms, count)
        at = end


def plain_bytes(batch: Batch) -> int:
    """Return at most how many bytes a batch has once it is decompressed.

    The block sizes give it, and decoders do not exceed them. Where that is far above the compressed
    size but below 1 MiB, the batch is decompressed instead. Cost: 2 µs, or that of 1 MiB.
    """
    codec, data = batch.attributes & _CODEC, batch.raw[_HEADER.size :]
    try:
        greatest = _greatest(codec, data)
    except (IndexError, struct.error, cramjam.DecompressionError):
        return _BATCH_BYTES  # the bytes are not what the header says
    if _LOOSE * len(data) < greatest <= _SMALL_BYTES and codec in _DECODE:
        with contextlib.suppress(OSError, EOFError, zlib.error, cramjam.DecompressionError):
            return len(_DECODE[codec](bytes(data)))
    return greatest


def _greatest(codec: int, data: memoryview) -> int:
    if codec == _ZSTD:
        return _zstd_bytes(data)
    if codec == _LZ4:
        return _lz4_bytes(data)
    if codec == _SNAPPY:
        return sum(cramjam.snappy.decompress_raw_len(block) for block in _snappy(data))
    return len(data) * (_GZIP_RATIO if codec == _GZIP else 1)


def _zstd_bytes(data: memoryview) -> int:
    at = total = 0
    while at < len(data):
        magic, size = struct.unpack_from("<II", data, at)
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame that is skipped
            at += 8 + size
            continue
        flags = data[at + 4]
        single = flags >> 5 & 1
        content = (single, 2, 4, 8)[flags >> 6]
        at += 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + content
        last = 0
        while not last:
            head = data[at] | data[at + 1] << 8 | data[at + 2] << 16
            last, kind, size = head & 1, head >> 1 & 3, head >> 3
            total += _ZSTD_BLOCK if kind == 2 else size
            at += 3 + (1 if kind == 1 else size)
        at += 4 * (flags >> 2 & 1)
    return total


def _lz4_bytes(data: memoryview) -> int:
    flags, greatest = data[4], 1 << 8 + 2 * (data[5] >> 4 & 7)
    at, total = 7 + 8 * (flags >> 3 & 1) + 4 * (flags & 1), 0
    while at < len(data):
        [size] = struct.unpack_from("<I", data, at)
        if not size:
            break
        stored, size = size >> 31, size & 0x7FFFFFFF
        total += size if stored else min(greatest, size * _LZ4_RATIO)
        at += 4 + size + 4 * (flags >> 4 & 1)
    return total


def _snappy(data: memoryview) -> Iterator[memoryview]:
    if bytes(data[: len(_XERIAL)]) != _XERIAL:
        yield data
        return
    at = 16
    while at < len(data):
        [size] = struct.unpack_from(">i", data, at)
        yield data[at + 4 : at + 4 + size]
        at += 4 + max(0, size)


def _plain(batch: Batch) -> Iterator[bytes]:
    """Decompress a batch in chunks. zstd also needs its window, at most 128 MiB."""
    codec, data = batch.attributes & _CODEC, batch.raw[_HEADER.size :]
    if codec == _SNAPPY:
        for block in _snappy(data):
            yield bytes(cramjam.snappy.decompress_raw(block))
    elif codec == _GZIP:
        rest = bytes(data)
        while rest:
            decoder = zlib.decompressobj(31)
            while not decoder.eof:
                if not (chunk := decoder.decompress(rest, _CHUNK)) and not decoder.eof:
                    raise ValueError("ends too early")
                yield chunk
                rest = decoder.unconsumed_tail
            rest = decoder.unused_data
    elif codec in _ARROW:
        import pyarrow as arrow  # imports 40 MB that only such a batch needs

        with arrow.CompressedInputStream(arrow.BufferReader(data), _ARROW[codec]) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    else:
        yield bytes(data)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Some records of a batch, as an uncompressed batch.

    Attributes:
        raw: The batch.
        described: Why the value of a record was left out, by offset.
    """

    raw: bytes
    described: dict[int, str]


class Pieces:
    """Reads a batch in pieces; holds the compressed batch, a decoder and one record.

    Args:
        batch: The batch.
        offset: Its records below it are not wanted.

    Attributes:
        offset: Where the next piece begins.
        done: Whether there is no other piece.
    """

    def __init__(self, batch: Batch, offset: int) -> None:
        self.offset = max(offset, batch.base)
        self.done = False
        # A view would keep everything that was fetched with it.
        self._batch = dataclasses.replace(batch, raw=memoryview(bytes(batch.raw)))
        self._chunks = _plain(self._batch)
        self._held, self._at = bytearray(), 0
        self._read, self._left = 0, batch.count
        self._turn = _TURN_BYTES

    def continues(self, batch: Batch, offset: int) -> bool:
        """Return whether `next` continues this batch at this offset."""
        return offset == self.offset and self._batch.raw == batch.raw

    @property
    def _place(self) -> int:
        return self._read - len(self._held) + self._at

    async def next(self, budget_bytes: int) -> Piece:
        """Return the next records, about `budget_bytes` of them, at least one.

        The event loop gets a turn after each MiB. If a batch exceeds 1 GiB or cannot be read, one
        description under its last offset stands for the rest.
        """
        body = bytearray(self._batch.raw[: _HEADER.size])
        described, count, last = dict[int, str](), 0, 0
        try:
            while self._left and (not count or len(body) < budget_bytes):
                if self._place > _BATCH_BYTES:
                    raise ValueError(f"its batch has more than {_BATCH_BYTES:,} bytes")
                delta, record, reason = await self._record()
                self._left -= 1
                if self._batch.base + delta < self.offset:
                    continue
                body += record
                count, last = count + 1, delta
                if reason:
                    described[self._batch.base + delta] = reason
            self.done = not self._left
        except (ValueError, OSError, zlib.error, cramjam.DecompressionError) as error:
            end = self._batch.end - 1
            first = self._batch.base + last + 1 if count else self.offset
            described[end] = (
                f"value: records at offsets {first} to {end} were not read, because {error}"
            )
            body += _stub(0, end - self._batch.base, None)
            count, self.done = count + 1, True
        if self.done:
            last = self._batch.end - 1 - self._batch.base
        self.offset = self._batch.base + last + 1
        plain = self._batch.attributes & ~_CODEC
        return Piece(_finish(body, last, count, plain), described)

    async def _record(self) -> tuple[int, bytes, str | None]:
        """Return the next record's offset delta, its bytes, and why its value is missing."""
        length = await self._varint()
        if length <= RECORD_BYTES:
            await self._fill(length)
            begin, end = self._at, self._at + length
            self._at += 1
            await self._varint()
            delta = await self._varint()
            record = _varint(length) + bytes(self._held[begin:end])
            self._at = end
            return delta, record, None
        return await self._long_record(length)

    async def _long_record(self, length: int) -> tuple[int, bytes, str | None]:
        end = self._place + length
        await self._fill(1)
        self._at += 1
        stamp, delta = await self._varint(), await self._varint()
        key = await self._field()
        value = await self._field()
        await self._skip(end - self._place)
        reason = None
        if isinstance(value, int):
            reason = too_long(value)
        kept = None if isinstance(value, int) else value
        return delta, _stub(stamp, delta, None if isinstance(key, int) else key, kept), reason

    async def _field(self) -> bytes | int | None:
        """Return a key or a value; of one that is too long, the number of its bytes."""
        size = await self._varint()
        if size < 0:
            return None
        if size > RECORD_BYTES:
            await self._skip(size)
            return size
        await self._fill(size)
        self._at += size
        return bytes(self._held[self._at - size : self._at])

    async def _varint(self) -> int:
        value = shift = 0
        while True:
            if self._at == len(self._held):
                await self._fill(1)
            byte = self._held[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value >> 1 ^ -(value & 1)
            shift += 7
            if shift > 63:
                raise ValueError("a number in it has no end")

    async def _fill(self, size: int) -> None:
        """Hold at least the next `size` bytes."""
        while len(self._held) - self._at < size:
            del self._held[: self._at]
            self._at = 0
            self._held += await self._chunk()

    async def _skip(self, size: int) -> None:
        while size > (held := len(self._held) - self._at):
            size -= held
            self._held, self._at = bytearray(await self._chunk()), 0
        self._at += size

    async def _chunk(self) -> bytes:
        if (chunk := next(self._chunks, None)) is None:
            raise ValueError("it ends too early")
        self._read += len(chunk)
        if self._read > self._turn:
            self._turn = self._read + _TURN_BYTES
            await asyncio.sleep(0)
        return chunk


async def first_from(batch: Batch, begin: int) -> tuple[int, int] | None:
    """Return offset and timestamp of a batch's first record at or after an offset."""
    memory = MemoryRecords((await Pieces(batch, begin).next(1)).raw)
    for record in memory.next_batch():
        return record.offset, record.timestamp
    return None


def too_long(size: int) -> str:
    """Say that a record's value has too many bytes."""
    return f"value: has {size:,} bytes, more than {RECORD_BYTES:,}; read it where the headers say"


def _varint(value: int) -> bytes:
    value, out = value << 1 ^ value >> 63, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _stub(stamp: int, delta: int, key: bytes | None, value: bytes | None = None) -> bytes:
    fields = (_varint(-1) if each is None else _varint(len(each)) + each for each in (key, value))
    body = b"\0" + _varint(stamp) + _varint(delta) + b"".join(fields) + _varint(0)
    return _varint(len(body)) + body


def _finish(raw: bytearray, last: int, count: int, attributes: int) -> bytes:
    """Return a complete batch with a corrected header."""
    struct.pack_into(">i", raw, 8, len(raw) - _LOG_OVERHEAD)
    struct.pack_into(">hi", raw, _ATTRIBUTES_AT, attributes, last)
    struct.pack_into(">i", raw, _HEADER.size - 4, count)
    with memoryview(raw) as view:
        struct.pack_into(">I", raw, _CRC_AT, calc_crc32c(view[_ATTRIBUTES_AT:]))
    return bytes(raw)
