"""Dead letters: refused records, unchanged, with added headers that say where and why."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiokafka

from cerberus import errors, kafka, publishing, settings
from cerberus.stream import header_names

Headers = Sequence[tuple[str, bytes | None]]
_TOPIC, _PARTITION, _OFFSET = "cerberus-topic", "cerberus-partition", "cerberus-offset"
_TIMESTAMP, _REASON = "cerberus-timestamp", "cerberus-reason"
_ROUND, _OMITTED = "cerberus-round", "cerberus-omitted"
_OURS = {_TOPIC, _PARTITION, _OFFSET, _TIMESTAMP, _REASON, _ROUND, _OMITTED}
_UNPREFIXED = {f"cerberus-{n}": n for n in ("topic", "partition", "offset", "reason", "omitted")}
"""Their names in earlier releases, which kept no header of the record."""
_MOST_BYTES = 900_000
_PARTS = ("headers", "value", "key")
_LEFT_OUT = [some for count in range(4) for some in itertools.combinations(_PARTS, count)]
"""What to leave out of a record that is too large, in this order: the first that suffices."""
_REASON_CHARACTERS = 1_000
_POLL_MS, _POLL_RECORDS, _SILENT_S = 500, 50, 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter in its topic.

    Attributes:
        partition: Its partition in the dead-letter topic.
        offset: Its offset there.
        set_aside_ms: When it was published there, ms since the Unix epoch.
        source: Topic, partition, offset and timestamp in ms of the record, as texts; empty where
            they are unknown.
        reason: Why the record was refused; it begins with the field and a colon.
        round: How many times the record was refused, from 1.
        omitted: Which of key, value and headers were too large to keep, as a text.
        key: The record's key.
        value: The record's value.
        headers: The record's headers.
    """

    partition: int
    offset: int
    set_aside_ms: int
    source: tuple[str, str, str, str]
    reason: str
    round: int
    omitted: str
    key: bytes | None
    value: bytes | None
    headers: Headers

    @property
    def whole(self) -> bool:
        """Whether key and value are complete."""
        return self.omitted in ("", "headers")

    def again(self, topic: str) -> publishing.Message:
        """Return the record for its topic, unchanged except for its round."""
        mark = (_ROUND, b"%d" % self.round)
        return publishing.Message(topic, self.key, self.value, [*self.headers, mark])


def rounds(headers: Headers) -> int:
    """Return how many times a record was a dead letter before it was sent again."""
    told = dict(headers).get(_ROUND) or b""
    return int(told) if told.isdigit() and len(told) < 6 else 0


def pack(topic: str, record: aiokafka.ConsumerRecord, reason: str) -> publishing.Message:
    """Return a refused record as a dead letter; of one above 900 kB only what fits."""
    own = [header for header in record.headers if header[0] not in _OURS]
    sizes = {
        "headers": sum(len(name) * 3 + len(value or b"") + 8 for name, value in own),
        "value": len(record.value or b""),
        "key": len(record.key or b""),
    }
    surplus = sum(sizes.values()) - _MOST_BYTES
    omitted = next(some for some in _LEFT_OUT if sum(sizes[part] for part in some) >= surplus)
    ours: list[tuple[str, bytes | None]] = [
        (_TOPIC, record.topic.encode()),
        (_PARTITION, b"%d" % record.partition),
        (_OFFSET, b"%d" % record.offset),
        (_TIMESTAMP, b"%d" % record.timestamp),
        (_REASON, reason[:_REASON_CHARACTERS].encode("utf-8", "backslashreplace")),
        (_ROUND, b"%d" % (rounds(record.headers) + 1)),
    ]
    # What any topic accepts; a compacted one needs a key.
    place = f"{record.topic}-{record.partition}-{record.offset}".encode()
    instead = publishing.Message(topic, place, b"", [*ours, (_OMITTED, ",".join(_PARTS).encode())])
    if omitted:
        ours.append((_OMITTED, ",".join(omitted).encode()))
    key = None if "key" in omitted else record.key
    value = None if "value" in omitted else record.value
    if key is None and value is None:
        value = b""  # aiokafka refuses a record with neither
    headers = ours if "headers" in omitted else ours + own
    return publishing.Message(topic, key, value, headers, instead)


def unpack(record: aiokafka.ConsumerRecord) -> Letter:
    """Read a dead letter, of this release or an earlier one."""
    told: dict[str, bytes | None] = dict(record.headers)
    own = [header for header in record.headers if header[0] not in _OURS]
    if _TOPIC not in told and _UNPREFIXED[_TOPIC] in told:
        told = {ours: told.get(former) for ours, former in _UNPREFIXED.items()}
        own = []
    source = (_text(told, _TOPIC), _text(told, _PARTITION), _text(told, _OFFSET))
    return Letter(
        partition=record.partition,
        offset=record.offset,
        set_aside_ms=record.timestamp,
        source=(*source, _text(told, _TIMESTAMP)),
        reason=_text(told, _REASON),
        round=max(1, rounds(list(told.items()))),
        omitted=_text(told, _OMITTED),
        key=record.key,
        value=record.value,
        headers=own,
    )


def _text(told: Mapping[str, bytes | None], name: str) -> str:
    return (told.get(name) or b"").decode("utf-8", "backslashreplace")


async def read(
    config: settings.Settings, name: str, since_ms: int = 0, place: tuple[int, int] | None = None
) -> AsyncGenerator[Letter, None]:
    """Yield what a dead-letter topic holds now, each partition in order. Close it after use.

    Letters that arrive meanwhile are left out, so a record that is sent and refused again does not
    come back. At most 50 letters are in memory, and what the client fetches ahead.

    Args:
        config: Settings.
        name: Of the topic, without the prefix.
        since_ms: Only letters from this time on.
        place: Only the letter in this partition at this offset.

    Raises:
        InvalidInput: There is no letter at that place.
        StoreUnavailable: The brokers did not answer, or sent nothing for 15 s.
    """
    header_names.tolerate()
    topic = config.kafka.topic(name)
    async with kafka.reader(config, topic) as (client, tps):
        async with asyncio.timeout(kafka.CALL_S):
            ends = await _seek(client, tps, since_ms, place)
        heard_s = time.monotonic()
        while left := [tp for tp, end in ends.items() if await client.position(tp) < end]:
            polled = await client.getmany(*left, timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            if polled:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > _SILENT_S:
                raise errors.StoreUnavailable(f"Kafka sent nothing of {topic} for {_SILENT_S:g} s")
            for tp, records in polled.items():
                for record in records:
                    if record.offset < ends[tp] and record.timestamp >= since_ms:
                        yield unpack(record)


async def _seek(
    client: Any,
    tps: Sequence[aiokafka.TopicPartition],
    since_ms: int,
    place: tuple[int, int] | None,
) -> dict[aiokafka.TopicPartition, int]:
    """Go to where reading begins; return where it ends in each partition."""
    ends: dict[aiokafka.TopicPartition, int] = await client.end_offsets(tps)
    begins: dict[aiokafka.TopicPartition, int] = await client.beginning_offsets(tps)
    if place is not None:
        number, offset = place
        tps = [tp for tp in tps if tp.partition == number and begins[tp] <= offset < ends[tp]]
        if not tps:
            held = ", ".join(
                f"partition {tp.partition} holds {begins[tp]} to {ends[tp] - 1}"
                for tp in sorted(begins)
                if begins[tp] < ends[tp]
            )
            raise errors.InvalidInput(
                "offset", f"there is no such letter; {held or 'the topic holds none'}"
            )
        begins, ends = dict.fromkeys(tps, offset), dict.fromkeys(tps, offset + 1)
    found = await client.offsets_for_times(dict.fromkeys(tps, since_ms))
    for tp in tps:
        # There is nothing from that time on: start at the end.
        first = found[tp].offset if found[tp] else ends[tp]
        client.seek(tp, begins[tp] if place else max(begins[tp], first))
    return ends
