"""A batch in pieces is the batch; no codec makes it larger than its headers say."""

import asyncio
import random
import struct

import cramjam
import pytest
from aiokafka import codec as codecs
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from cerberus import batches

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
SNAPPY_RAW = "snappy without blocks"
records = st.lists(
    st.tuples(
        st.integers(0, 2**40),
        st.none() | st.binary(max_size=40),
        st.none() | st.binary(max_size=40) | st.binary(max_size=9).map(lambda b: b * 900),
        st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=9)), max_size=2),
    ),
    min_size=1,
    max_size=30,
)


def built(codec, some, base=0):
    """Return the bytes of a batch that aiokafka builds."""
    builder = DefaultRecordBatchBuilder(2, CODECS[codec], 0, -1, -1, -1, 1 << 30)
    for at, (stamp, key, value, headers) in enumerate(some):
        assert builder.append(at, stamp, key, value, headers)
    raw = bytearray(builder.build())
    struct.pack_into(">q", raw, 0, base)
    return bytes(raw)


def read(raw):
    """Return what aiokafka finds in batches."""
    memory, found = MemoryRecords(bytes(raw)), []
    while memory.has_next():
        batch = memory.next_batch()
        assert batch.validate_crc()
        found += [(r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in batch]
    return found


def in_pieces(raw, offset=0, budget_bytes=1_000):
    """Return the pieces of a batch."""
    [batch] = batches.split(raw)
    pieces, found = batches.Pieces(batch, offset), []

    async def all_of_it():
        while not pieces.done:
            assert pieces.continues(batch, pieces.offset)
            found.append(await pieces.next(budget_bytes))

    asyncio.run(all_of_it())
    assert pieces.offset == batch.end
    return found


@pytest.mark.parametrize("codec", CODECS)
@given(some=records, base=st.integers(0, 2**40), budget_bytes=st.integers(1, 20_000))
def test_the_pieces_of_a_batch_hold_its_records(codec, some, base, budget_bytes):
    raw = built(codec, some, base)
    pieces = in_pieces(raw, base, budget_bytes)
    assert [r for piece in pieces for r in read(piece.raw)] == read(raw)
    assert not any(piece.described for piece in pieces)


@pytest.mark.parametrize("codec", CODECS)
@given(some=records)
def test_no_batch_is_larger_than_its_headers_say(codec, some):
    [batch] = batches.split(built(codec, some))
    [plain] = batches.split(built("none", some))
    assert batches.plain_bytes(batch) >= len(plain.raw) - 61


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("level", ["fast", "high"])
def test_what_swells_is_known_before_it_is_decompressed(codec, level):
    value = b"x" * 890_000
    raw = built(codec, [(0, b"1", value, [])] * 30)
    if codec == "zstd" and level == "high":
        plain = bytes(next(batches.split(built("none", [(0, b"1", value, [])] * 30))).raw[61:])
        raw = rebuilt(raw, bytes(cramjam.zstd.compress(plain, level=22)))
    [batch] = batches.split(raw)
    assert 30 * 890_000 <= batches.plain_bytes(batch) < 40 * 890_000 or codec == "gzip"
    pieces = in_pieces(raw, budget_bytes=1_000_000)
    assert max(len(piece.raw) for piece in pieces) < 3_000_000
    assert [r for piece in pieces for r in read(piece.raw)] == read(raw)


def rebuilt(raw, data):
    """Return a batch with other compressed bytes."""
    [batch] = batches.split(raw)
    whole = bytearray(bytes(batch.raw[:61]) + data)
    last = batch.end - batch.base - 1
    return batches._finish(whole, last, batch.count, batch.attributes)


def test_snappy_comes_with_blocks_and_without():
    some = [(0, b"1", b"x" * 9_000, [])] * 30
    raw = built("snappy", some)
    plain = codecs.snappy_decode(raw[61:])
    other = rebuilt(raw, bytes(cramjam.snappy.compress_raw(plain)))
    [batch] = batches.split(other)
    assert batches.plain_bytes(batch) == len(plain)
    assert [r for piece in in_pieces(other) for r in read(piece.raw)] == read(raw)


@pytest.mark.parametrize("codec", CODECS)
def test_a_record_that_is_too_long_is_told_apart(codec):
    long = b"x" * (batches.RECORD_BYTES + 1)
    some = [
        (5, b"1", b"a", []),
        (6, b"2", long, [("h", b"v")]),
        (7, b"3", long[1:], []),
        (8, long, b"d", [("h", long)]),
        (9, b"5", b"e", []),
    ]
    pieces = in_pieces(built(codec, some, 100))
    found = [r[:4] for piece in pieces for r in read(piece.raw)]
    assert found == [
        (100, 5, b"1", b"a"),
        (101, 6, b"2", None),
        (102, 7, b"3", long[1:]),
        (103, 8, None, b"d"),
        (104, 9, b"5", b"e"),
    ]
    described = {at: why for piece in pieces for at, why in piece.described.items()}
    assert described.keys() == {101}
    assert "1,048,577 bytes" in described[101]


@pytest.mark.parametrize("codec", sorted(CODECS.keys() - {"none"}))
def test_what_cannot_be_read_is_described_under_its_last_offset(codec):
    rng = random.Random(2)
    some = [(0, b"1", rng.randbytes(5_000), []) for _ in range(50)]
    raw = built(codec, some, 7)
    pieces = in_pieces(rebuilt(raw, raw[61 : 61 + 100_000]), 7)
    found = [r for piece in pieces for r in read(piece.raw)]
    described = {at: why for piece in pieces for at, why in piece.described.items()}
    assert described.keys() == {56}
    assert found[:-1] == read(raw)[: len(found) - 1]
    assert found[-1][0] == 56
    assert f"offsets {7 + len(found) - 1} to 56" in described[56]


def test_the_rest_of_a_batch_beyond_every_bound_is_described(monkeypatch):
    monkeypatch.setattr(batches, "_BATCH_BYTES", 100_000)
    raw = built("zstd", [(0, b"1", b"x" * 9_000, [])] * 50, 7)
    pieces = in_pieces(raw, 7)
    described = {at: why for piece in pieces for at, why in piece.described.items()}
    assert described.keys() == {56}
    found = [r for piece in pieces for r in read(piece.raw)]
    assert 10 < len(found) < 30
    # The same wherever reading began.
    later = in_pieces(raw, 12)
    assert later[-1].described == described


@pytest.mark.parametrize("offset", [0, 3, 29])
def test_a_batch_is_read_from_inside(offset):
    raw = built("lz4", [(i, b"k", b"v" * i, []) for i in range(30)])
    found = [r for piece in in_pieces(raw, offset, 50) for r in read(piece.raw)]
    assert found == read(raw)[offset:]
