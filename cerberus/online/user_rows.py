"""The online store: Redis in Feast's own layout, plus the service's keys under `cerberus:`.

All views of a user share one hash, so one HMGET reads them; a batch is one pipelined round trip. A
row is taken only if its fence is not older than the stored one, in one atomic step. Commands are
those of Redis 6.2.
"""

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import redis.asyncio
import redis.exceptions

from cerberus import clock, errors, transactions, window
from cerberus.features import declared, evaluation, fences
from cerberus.features import packed as packed_windows
from cerberus.online import layout, partition_states
from cerberus.online import pool as redis_pool

_T = TypeVar("_T")
_UNREADABLE = (ValueError, IndexError, struct.error)

# KEYS[1] the user's hash. ARGV: the field of `recent`, epoch, offset, as_of_ms, then field and
# value pairs. Returns 1 if the row was taken, 0 if its fence is older.
_WRITE_ROW = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored and #stored > 25 then
  local at = 2  -- the length follows the tag, seven bits a byte
  while string.byte(stored, at) > 127 do at = at + 1 end
  local _, epoch, offset, as_of = struct.unpack('>I1I4i8i8', stored, at + 1)
  local e, o, t = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
  if epoch > e then return 0 end
  if epoch == e and (offset > o or (offset == o and as_of > t)) then return 0 end
end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
return 1
"""

# KEYS[1] the user's hash. ARGV: the newest event, ms, that came outside the user's partition.
_MARK_SPLIT = """
if tonumber(redis.call('HGET', KEYS[1], 'cerberus:split') or 0) < tonumber(ARGV[1]) then
  redis.call('HSET', KEYS[1], 'cerberus:split', ARGV[1])
end
return 1
"""


class _Hash(NamedTuple, Generic[_T]):
    """What is read of a user's hash: the names of its fields, or their values."""

    window: _T
    window_at: _T
    credit: _T
    credit_at: _T
    split_ms: _T


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One user's row to write: the packed window and its aggregates as of the fence."""

    user_id: int
    recent: bytes
    stats: tuple[window.WindowStats, ...]
    fence: fences.Fence
    partition: int


class OnlineStore:
    """Reads and writes the rows that decisions are made from.

    Args:
        client: The shared pool.
        plan: What Feast's registry says of views, types and TTLs.
        spans: The window definition.
        topic: The topic whose partitions are followed.
        clock: The wall clock in ms since the Unix epoch.
        patience_s: How long the owners of all partitions must have read a version of claims and
            commits, without interruption, before this process writes it.

    Raises:
        ModelMismatch: The plan was compiled for other windows.
    """

    def __init__(
        self,
        client: "redis.asyncio.Redis | redis.asyncio.RedisCluster",
        plan: layout.Plan,
        spans: window.Spans,
        topic: str,
        clock: clock.Clock = clock.now_ms,
        *,
        patience_s: float = 3600.0,
    ) -> None:
        streamed = declared.names(declared.streamed(spans.names))
        if (
            plan.schema.get(declared.STATS_VIEW, {}).keys() != set(streamed)
            or plan.ttl_ms.get(declared.WINDOW_VIEW) != spans.keep_ms
        ):
            raise errors.ModelMismatch(
                "the feature plan beside the model is not for windows "
                f"{','.join(spans.names)} kept for {spans.keep_ms} ms: run `python -m cerberus "
                "features apply`, then `python -m cerberus features compile`"
            )
        self._client: Any = client  # its types know str keys only
        self._plan = plan
        self._spans = spans
        self._partitions = partition_states.PartitionStates(
            client, topic, partition_states.Versions(patience_s, time.monotonic), clock
        )
        self._fields = _Hash(
            window=layout.field(declared.WINDOW_VIEW, "recent"),
            window_at=layout.ts_field(declared.WINDOW_VIEW),
            credit=layout.field(declared.CREDIT_VIEW, declared.CREDIT_SCORE.name),
            credit_at=layout.ts_field(declared.CREDIT_VIEW),
            split_ms=b"cerberus:split",
        )
        self._stats_at = layout.ts_field(declared.STATS_VIEW)
        self._stat_fields = [
            [layout.field(each.view, each.name) for each in declared.of_window(span)]
            for span in spans.names
        ]

    @property
    def spoken(self) -> int:
        """The version to write claims and commits in, as of the last read of users or states."""
        return self._partitions.versions.spoken

    async def read(
        self, user_ids: Sequence[int], now_ms: int, timeout_s: float
    ) -> list[evaluation.OnlineRow]:
        """Read users and the state of their partitions in one round trip.

        Deadline: `timeout_s`. Idempotent: yes.

        Raises:
            FeaturesUnavailable: Redis did not answer in time.
        """
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(self._partitions.key)
        for user_id in user_ids:
            pipe.hmget(self._key(user_id), self._fields)
        found, *hashes = await redis_pool.answers(self._client, pipe.execute(), timeout_s)
        count, states = self._partitions.unpack(found)
        rows = []
        for user_id, values in zip(user_ids, hashes, strict=True):
            home = transactions.partition_of(user_id, count) if count else 0
            state = states.get(home)
            if state is not None and state.count not in (0, count):
                state = None  # its former owner does not know who has moved there
            # One user's broken value must not fail the batch's other users.
            stored: _Hash[bytes | None] = _Hash(*values)
            recent, broken_window = _readable(self._window, stored.window, stored.window_at, now_ms)
            score, broken_score = _readable(self._score, stored.credit, stored.credit_at, now_ms)
            rows.append(
                evaluation.OnlineRow(
                    user_id=user_id,
                    recent=recent,
                    credit_score=score,
                    partition=home,
                    state=state,
                    unreadable=(evaluation.Doubt.RECENT_UNREADABLE,) * broken_window
                    + (evaluation.Doubt.CREDIT_SCORE_UNREADABLE,) * broken_score,
                    split_ms=int(stored.split_ms or 0),
                    score_ms=0 if score is None else layout.stamp_ms(stored.credit_at),
                )
            )
        return rows

    async def credit_scores(
        self, user_ids: Sequence[int], now_ms: int
    ) -> tuple[dict[int, int | None], bool]:
        """Read the credit scores of distinct users in one round trip; None where there is none.

        Returns:
            The scores, and whether they were loaded before and after; if not, one may be missing.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s.
        """
        pipe = self._client.pipeline(transaction=False)
        pipe.get(partition_states.MATERIALIZED)
        for user_id in user_ids:
            pipe.hmget(self._key(user_id), (self._fields.credit, self._fields.credit_at))
        pipe.get(partition_states.MATERIALIZED)
        before, *values, after = await redis_pool.answers(self._client, pipe.execute())
        scores = {
            user_id: _readable(self._score, score, at, now_ms)[0]
            for user_id, (score, at) in zip(user_ids, values, strict=True)
        }
        return scores, before is not None and after is not None

    async def write(
        self, rows: Sequence[StreamRow], trail: partition_states.Trail | None = None
    ) -> bool:
        """Store rows whose fence is not older than what is there. Idempotent: yes.

        Args:
            rows: Of one partition, when there is a trail.
            trail: Compared, then led on.

        Returns:
            Whether Redis has lost earlier rows, because it does not have the trail.

        Raises:
            FeaturesUnavailable: Not all was acknowledged within 2 s; write again.
        """
        calls: list[redis_pool.Call] = [
            (_WRITE_ROW, [self._key(row.user_id)], self._row_arguments(row)) for row in rows
        ]
        if trail is None or not rows:
            await redis_pool.evaluate(self._client, calls)
            return False
        leave, left = self._partitions.leave(trail, rows[-1].partition, rows[-1].fence)
        # After the rows, so that what loses one of them loses the trail.
        led_on = (await redis_pool.evaluate(self._client, [*calls, leave]))[-1]
        if led_on == 1:
            trail.left = left
        return bool(led_on == -1)

    async def mark_split(self, newest: Mapping[int, int]) -> None:
        """Record until when (ms) users have events outside their partition. Idempotent: yes.

        Raises:
            FeaturesUnavailable: Not all was acknowledged within 2 s; write again.
        """
        await redis_pool.evaluate(
            self._client, [(_MARK_SPLIT, [self._key(u)], [ms]) for u, ms in newest.items()]
        )

    async def write_states(
        self,
        count: int,
        states: Mapping[int, fences.PartitionState],
        *,
        trails: Mapping[int, partition_states.Trail] = partition_states.NO_TRAILS,
        create: bool = False,
    ) -> set[int]:
        """Write who is live; see `PartitionStates.write`."""
        return await self._partitions.write(count, states, trails=trails, create=create)

    async def follow(self, witness: str) -> None:
        """Make the loss of one node the loss of all; see `PartitionStates.follow`."""
        await self._partitions.follow(witness)

    async def states(self) -> dict[int, fences.PartitionState]:
        """Read what the owners say about all partitions.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s.
        """
        return await self._partitions.read()

    async def prove(self, *, clustered: bool) -> dict[int, fences.PartitionState]:
        """Check that Redis takes writes, and read all states; see `PartitionStates.prove`."""
        return await self._partitions.prove(clustered=clustered)

    async def materialized_ms(self) -> int | None:
        """Return when the batch views were last loaded; None when Redis has lost them."""
        return await self._partitions.materialized_ms()

    async def advise_policy(self) -> str | None:
        """Return a sentence when Redis may evict rows by itself, else None."""
        try:
            found = await self._client.config_get("maxmemory*")
        except redis_pool.REDIS_DOWN:
            return None  # managed services often forbid CONFIG
        if found.get("maxmemory", "0") in ("0", 0) or found["maxmemory-policy"] == "noeviction":
            return None
        return (
            f"Redis evicts rows (maxmemory-policy {found['maxmemory-policy']}): "
            "set it to noeviction, or users will look new and transactions will be decided twice"
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._client.aclose()

    def _key(self, user_id: int) -> bytes:
        return layout.entity_key(user_id, self._plan.project)

    def _window(
        self, value: bytes | None, at: bytes | None, now_ms: int
    ) -> packed_windows.Recent | None:
        if not value or not at or not self._plan.alive(declared.WINDOW_VIEW, at, now_ms):
            return None
        packed = layout.decode(value)
        if not isinstance(packed, bytes):
            raise ValueError(f"recent: {type(packed).__name__} instead of bytes")
        return packed_windows.unpack(packed, self._spans)

    def _score(self, value: bytes | None, at: bytes | None, now_ms: int) -> int | None:
        if not value or not at or not self._plan.alive(declared.CREDIT_VIEW, at, now_ms):
            return None
        score = layout.decode(value)
        return score if isinstance(score, int) else None

    def _row_arguments(self, row: StreamRow) -> list[bytes | int | str]:
        stamp = layout.encode_timestamp(row.fence.as_of_ms * 1000)
        pairs: list[bytes | int | str] = [
            self._fields.window,
            *row.fence,
            self._fields.window,
            layout.encode_bytes(row.recent),
            self._fields.window_at,
            stamp,
            self._stats_at,
            stamp,
        ]
        for (count_field, total_field), stats in zip(self._stat_fields, row.stats, strict=True):
            pairs += (count_field, layout.encode_int64(stats.count))
            pairs += (total_field, layout.encode_double(stats.total_minor / 100))
        return pairs


def _readable(
    read: Callable[[bytes | None, bytes | None, int], _T | None],
    value: bytes | None,
    at: bytes | None,
    now_ms: int,
) -> tuple[_T | None, bool]:
    """Read a value and its time; the flag says that it is there and broken."""
    try:
        return read(value, at, now_ms), False
    except _UNREADABLE:
        return None, True
