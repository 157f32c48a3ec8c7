"""Limit what a consumer fetches, before aiokafka unpacks it, and note gaps in the log.

aiokafka has a hook for neither, so its client's `send` is wrapped: fetch requests and responses are
Kafka's protocol, which changes less than aiokafka's internals. `tests/test_fetching.py` fails if
they change.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import READ_COMMITTED
from aiokafka.errors import NoError, for_code
from aiokafka.protocol.fetch import FetchRequest

from cerberus import batches

FETCH_BYTES = 64 << 20
"""How much decompressed data a client may hold; with more than 64 partitions, 1 MiB each."""
_LEAST_BYTES, _PIECE_BYTES = 1 << 20, 4 << 20
_IDLE_S, _WAIT_S = 5.0, 0.05


class Hole(NamedTuple):
    """A range of offsets with records missing inside a log: from `begin` to before `end`."""

    topic: str
    partition: int
    begin: int
    end: int


@dataclasses.dataclass(slots=True)
class _Open:
    """A batch that is read in pieces; only one at a time, because its window may be 128 MiB."""

    place: tuple[str, int]
    pieces: batches.Pieces
    used_s: float


class Fetches:
    """Limits what one client fetches, and reports what was removed from the logs.

    Args:
        client: aiokafka's client of a consumer.
        assigned: Returns how many partitions share the limit.
    """

    def __init__(self, client: Any, assigned: Callable[[], int]) -> None:
        self._described: dict[tuple[str, int, int], str] = {}
        self._holes: dict[tuple[str, int], Hole] = {}
        self._assigned = assigned
        self._open: _Open | None = None
        self._send = client.send
        client.send = self._ask

    def holes(self) -> list[Hole]:
        """Return the gaps found since the last call, as one for each partition."""
        found, self._holes = self._holes, {}
        return list(found.values())

    def reasons(self, records: Sequence[Any]) -> list[tuple[int, str]]:
        """Return which records' values must not be read, and why; call it once for each record."""
        found = [
            (at, batches.too_long(record.serialized_value_size))
            for at, record in enumerate(records)
            if record.serialized_value_size > batches.RECORD_BYTES
        ]
        if self._described:
            places = ((at, (r.topic, r.partition, r.offset)) for at, r in enumerate(records))
            told = ((at, self._described.pop(place, None)) for at, place in places)
            found += [(at, why) for at, why in told if why]
        return found

    def forget(self) -> None:
        """Forget what was fetched: other partitions are assigned."""
        self._holes, self._open = {}, None
        self._described.clear()

    async def peek(self, node_id: int, tp: TopicPartition, offset: int) -> bytes:
        """Fetch the raw batch at an offset without waiting; empty if there is none.

        Raises:
            KafkaError: The broker did not answer, or refused.
        """
        place = [(tp.topic, [(tp.partition, offset, 1)])]
        response = await self._send(node_id, FetchRequest(0, 1, 1, READ_COMMITTED, place))
        [(_, [(_, error, *_, fetched)])] = response.topics
        if (refused := for_code(error)) is not NoError:
            raise refused(tp)
        return fetched or b""

    async def _ask(self, node_id: int, request: Any, **options: Any) -> Any:
        response = await self._send(node_id, request, **options)
        if isinstance(request, FetchRequest):
            await self._bound(request, response)
        return response

    async def _bound(self, request: Any, response: Any) -> None:
        budget = max(_LEAST_BYTES, FETCH_BYTES // max(1, self._assigned()))
        asked = {(topic, p): offset for topic, some in request.topics for p, offset, _ in some}
        topics = []
        for topic, partitions in response.topics:
            bounded = []
            for partition, *told, fetched in partitions:
                place = topic, partition
                if fetched:
                    fetched = await self._judge(place, asked[place], fetched, budget)
                bounded.append((partition, *told, fetched))
            topics.append((topic, bounded))
        response.topics = topics

    async def _judge(
        self, place: tuple[str, int], offset: int, fetched: bytes, budget: int
    ) -> bytes:
        """Return as much of a log as the budget allows, and note the gaps in it."""
        expected, size = offset, 0
        for batch in batches.split(fetched):
            size += batches.plain_bytes(batch)
            if size > budget and batch.at:
                return fetched[: batch.at]
            if batch.base > expected:
                self._lost(Hole(*place, expected, batch.base))
            if batch.lacks:
                self._lost(Hole(*place, batch.base, batch.end))
            expected = batch.end
            if size > budget and batch.compressed:
                return await self._piece(place, batch, offset, budget)
        return fetched

    def _lost(self, hole: Hole) -> None:
        place = hole.topic, hole.partition
        known = self._holes.get(place, hole)
        begin, end = min(known.begin, hole.begin), max(known.end, hole.end)
        self._holes[place] = Hole(*place, begin, end)

    async def _piece(
        self, place: tuple[str, int], batch: batches.Batch, offset: int, budget: int
    ) -> bytes:
        held, now_s = self._open, time.monotonic()
        if held is not None and held.place != place and now_s - held.used_s < _IDLE_S:
            await asyncio.sleep(_WAIT_S)
            return b""
        if held is None or held.place != place or not held.pieces.continues(batch, offset):
            held = _Open(place, batches.Pieces(batch, offset), now_s)
        self._open = held
        piece = await held.pieces.next(min(budget, _PIECE_BYTES))
        held.used_s = time.monotonic()
        if held.pieces.done:
            self._open = None
        self._described |= {(*place, at): why for at, why in piece.described.items()}
        return piece.raw
