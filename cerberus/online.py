"""The online store: Redis in Feast's own layout, plus the service's keys under `cerberus:`.

A user is one hash that all views share, so one HMGET reads all; a batch is one pipelined round
trip. Rows are taken only when their fence is not older than the stored one, in one atomic step.
Commands are those of Redis 6.2.
"""

import asyncio
import hashlib
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.asyncio
import redis.exceptions

from cerberus import errors, feast_layout, features, settings, transactions, window

STATS_VIEW, WINDOW_VIEW, CREDIT_VIEW = "user_transaction_stats", "user_window", "user_credit"
MATERIALIZED = "cerberus:{materialized}"  # in braces: what a cluster's keys are placed by
_CALL_S = 2.0
_T = TypeVar("_T")
_DOWN = (
    TimeoutError,
    OSError,
    redis.exceptions.RedisError,
    redis.exceptions.RedisClusterException,
)
_UNREADABLE = (ValueError, IndexError, struct.error)

# KEYS[1] the user's hash. ARGV: the field of `recent`, epoch, offset, as_of_ms, partition, the
# age in ms beyond which a row of another partition is dead, then field and value pairs.
# Returns 1 taken, 0 an older fence, -1 a split user.
_WRITE_ROW = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if stored and #stored > 25 then
  local at = 2  -- behind the tag stands the length, seven bits a byte
  while string.byte(stored, at) > 127 do at = at + 1 end
  local _, epoch, offset, as_of, partition = struct.unpack('>I1I4i8i8I4', stored, at + 1)
  local e, o, t = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
  if epoch > e then return 0 end
  if epoch == e then
    if partition ~= tonumber(ARGV[5]) then
      if as_of > t - tonumber(ARGV[6]) then return -1 end
    elseif offset > o or (offset == o and as_of > t) then return 0 end
  end
end
redis.call('HSET', KEYS[1], unpack(ARGV, 7))
return 1
"""

# KEYS[1] the topic's hash of partitions. ARGV: partition, epoch, offset, state as JSON, whether
# to make what is not there, the number of partitions. Returns 1 taken, 0 an older fence, -1 not
# there.
_WRITE_STATE = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
if not stored and ARGV[5] == '0' then return -1 end
if stored then
  local s = cjson.decode(stored)
  local e, o = tonumber(ARGV[2]), tonumber(ARGV[3])
  if s.epoch > e or (s.epoch == e and s.offset > o) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[4], 'count', ARGV[6])
return 1
"""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """One user's row to write: the packed window and its aggregates as of the fence."""

    user_id: int
    recent: bytes
    stats: tuple[window.WindowStats, ...]
    fence: features.Fence
    partition: int


@dataclass(frozen=True, slots=True)
class Refused:
    """How many rows the store did not take, and why."""

    older: int = 0
    split: int = 0


def options(config: settings.Settings) -> dict[str, Any]:
    """Return what a Redis client is built with; every command has a deadline of 2 s."""
    found: dict[str, Any] = {
        "socket_timeout": _CALL_S,
        "socket_connect_timeout": _CALL_S,
        "health_check_interval": 15,
        "driver_info": None,  # else each connection reads files, then sends what 6.2 has not
    }
    if config.redis_url.startswith("rediss://"):
        found["ssl"] = True
        if not config.redis_tls_verify:
            found |= {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_check_hostname": False}
    located = redis.asyncio.connection.parse_url(config.redis_url)
    located.pop("connection_class", None)
    return {"host": "localhost", "port": 6379, **found, **located}


def connect(config: settings.Settings) -> "redis.asyncio.Redis | redis.asyncio.RedisCluster":
    """Make the shared pool; nothing is sent yet."""
    client = redis.asyncio.RedisCluster if config.redis_cluster else redis.asyncio.Redis
    return client(**options(config))


class OnlineStore:
    """Reads and writes the rows that decisions are made from.

    Args:
        client: The shared pool.
        plan: What Feast's registry says of views, types and TTLs.
        spans: The window definition.
        topic: Whose partitions are followed.

    Raises:
        ModelMismatch: The plan was compiled for other windows.
    """

    def __init__(
        self,
        client: "redis.asyncio.Redis | redis.asyncio.RedisCluster",
        plan: feast_layout.Plan,
        spans: window.Spans,
        topic: str,
    ) -> None:
        streamed = set(features.names(spans.names)[: 2 * len(spans.names)])
        if (
            plan.schema.get(STATS_VIEW, {}).keys() != streamed
            or plan.ttl_ms.get(WINDOW_VIEW) != spans.keep_ms
        ):
            raise errors.ModelMismatch(
                "the feature plan beside the model is not for windows "
                f"{','.join(spans.names)} kept for {spans.keep_ms} ms: run `python -m cerberus "
                "features apply`, then `python -m cerberus features compile`"
            )
        self._client: Any = client  # its types know str keys only
        self._plan = plan
        self._spans = spans
        self._partitions_key = f"cerberus:partitions:{topic}"
        self._recent = feast_layout.field(WINDOW_VIEW, "recent")
        self._credit = feast_layout.field(CREDIT_VIEW, "credit_score")
        self._ts = {v: feast_layout.ts_field(v) for v in (STATS_VIEW, WINDOW_VIEW, CREDIT_VIEW)}
        self._read_fields = (
            self._recent,
            self._ts[WINDOW_VIEW],
            self._credit,
            self._ts[CREDIT_VIEW],
        )
        self._stat_fields = [
            (
                feast_layout.field(STATS_VIEW, f"transaction_count_{span}"),
                feast_layout.field(STATS_VIEW, f"total_amount_{span}"),
            )
            for span in spans.names
        ]

    async def read(
        self, user_ids: Sequence[int], now_ms: int, timeout_s: float
    ) -> list[features.OnlineRow]:
        """Read users and the state of their partitions in one round trip.

        Deadline: `timeout_s`. Idempotent: yes.

        Raises:
            FeaturesUnavailable: Redis did not answer in time.
        """
        pipe = self._client.pipeline(transaction=False)
        pipe.hgetall(self._partitions_key)
        for user_id in user_ids:
            pipe.hmget(self._key(user_id), self._read_fields)
        found, *hashes = await _answers(pipe.execute(), timeout_s)
        states = _states(found)
        count = int(found.get(b"count", 0))
        rows = []
        for user_id, values in zip(user_ids, hashes, strict=True):
            partition = transactions.partition_of(user_id, count) if count else 0
            # One user's broken value must not take the batch's other users with it.
            recent, broken_window = _readable(self._alive_window, values, now_ms)
            credit_score, broken_credit = _readable(self._alive_credit, values, now_ms)
            rows.append(
                features.OnlineRow(
                    user_id=user_id,
                    recent=recent,
                    credit_score=credit_score,
                    partition=partition,
                    state=states.get(partition),
                    unreadable=("recent",) * broken_window + ("credit_score",) * broken_credit,
                )
            )
        return rows

    async def credit_scores(self, user_ids: Sequence[int], now_ms: int) -> dict[int, int | None]:
        """Read the credit scores of distinct users in one round trip; None where there is none.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s.
        """
        pipe = self._client.pipeline(transaction=False)
        for user_id in user_ids:
            pipe.hmget(self._key(user_id), (self._credit, self._ts[CREDIT_VIEW]))
        values = await _answers(pipe.execute())
        return {
            user_id: _readable(self._alive_credit, (None, None, *pair), now_ms)[0]
            for user_id, pair in zip(user_ids, values, strict=True)
        }

    async def write(self, rows: Sequence[StreamRow]) -> Refused:
        """Store rows whose fence is not older than what is there. Idempotent: yes.

        Raises:
            FeaturesUnavailable: not all was acknowledged within 2 s; write again.
        """
        answers = await self._evaluate(
            _WRITE_ROW, [(self._key(row.user_id), self._row_arguments(row)) for row in rows]
        )
        return Refused(older=answers.count(0), split=answers.count(-1))

    async def write_states(
        self,
        count: int,
        states: Mapping[int, features.PartitionState],
        *,
        create: bool = False,
    ) -> set[int]:
        """Say who is live: the state of owned partitions and how many there are, fenced.

        Returns:
            The partitions that Redis does not know, whose rows it has lost; only `create` makes
            their state.

        Raises:
            FeaturesUnavailable: not acknowledged within 2 s.
        """
        answers = await self._evaluate(
            _WRITE_STATE,
            [
                (self._partitions_key, [p, s.epoch, s.offset, s.pack(), int(create), count])
                for p, s in states.items()
            ],
        )
        return {p for p, answer in zip(states, answers, strict=True) if answer == -1}

    async def states(self) -> dict[int, features.PartitionState]:
        """Read what the owners say of all partitions.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s.
        """
        return _states(await _answers(self._client.hgetall(self._partitions_key)))

    async def materialized_ms(self) -> int | None:
        """Return when the batch views were last loaded; None when Redis has lost them."""
        value = await _answers(self._client.get(MATERIALIZED))
        return None if value is None else int(value)

    async def advise_policy(self) -> str | None:
        """Return a sentence when Redis may evict rows by itself, else None."""
        try:
            found = await self._client.config_get("maxmemory*")
        except _DOWN:
            return None  # managed services often forbid CONFIG
        if found.get("maxmemory", "0") in ("0", 0) or found["maxmemory-policy"] == "noeviction":
            return None
        return (
            f"Redis evicts rows (maxmemory-policy {found['maxmemory-policy']}): "
            "set it to noeviction, or users will look new"
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._client.aclose()

    def _key(self, user_id: int) -> bytes:
        return feast_layout.entity_key(user_id, self._plan.project)

    def _alive_window(self, values: Sequence[bytes | None], now_ms: int) -> features.Recent | None:
        value, stamp = values[0], values[1]
        if not value or not stamp or not self._plan.alive(WINDOW_VIEW, stamp, now_ms):
            return None
        packed = feast_layout.decode(value)
        if not isinstance(packed, bytes):
            raise ValueError(f"recent: {type(packed).__name__} instead of bytes")
        return features.unpack(packed, self._spans)

    def _alive_credit(self, values: Sequence[bytes | None], now_ms: int) -> int | None:
        value, stamp = values[2], values[3]
        if not value or not stamp or not self._plan.alive(CREDIT_VIEW, stamp, now_ms):
            return None
        score = feast_layout.decode(value)
        return score if isinstance(score, int) else None

    def _row_arguments(self, row: StreamRow) -> list[bytes | int]:
        stamp = feast_layout.encode_timestamp(row.fence.as_of_ms * 1000)
        pairs: list[bytes | int] = [
            self._recent,
            *row.fence,
            row.partition,
            self._spans.keep_ms,
            self._recent,
            feast_layout.encode_bytes(row.recent),
            self._ts[WINDOW_VIEW],
            stamp,
            self._ts[STATS_VIEW],
            stamp,
        ]
        for (count_field, total_field), stats in zip(self._stat_fields, row.stats, strict=True):
            pairs += (count_field, feast_layout.encode_int64(stats.count))
            pairs += (total_field, feast_layout.encode_double(stats.total_minor / 100))
        return pairs

    async def _evaluate(
        self, script: str, calls: Sequence[tuple[bytes | str, Sequence[bytes | int]]]
    ) -> list[Any]:
        """Run a script on many keys in one round trip, in three where a server has lost it."""
        sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()

        async def call() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            for key, arguments in calls:
                # Not `pipe.evalsha`: its cluster form refuses what the cluster itself can do.
                pipe.execute_command("EVALSHA", sha, 1, key, *arguments)
            answers: list[Any] = await _answers(pipe.execute())
            return answers

        try:
            return await call()
        except redis.exceptions.NoScriptError:
            await _answers(self._client.script_load(script))
            return await call()


async def _answers(command: Awaitable[Any], timeout_s: float = _CALL_S) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await command
    except redis.exceptions.NoScriptError:
        raise
    except _DOWN as error:
        raise errors.FeaturesUnavailable(f"Redis did not answer: {error!r}") from error


def _readable(
    read: Callable[[Sequence[bytes | None], int], _T | None],
    values: Sequence[bytes | None],
    now_ms: int,
) -> tuple[_T | None, bool]:
    """Read a value; the flag says that it is there and broken."""
    try:
        return read(values, now_ms), False
    except _UNREADABLE:
        return None, True


def _states(found: Mapping[bytes, bytes]) -> dict[int, features.PartitionState]:
    return {
        int(field): features.PartitionState.unpack(value)
        for field, value in found.items()
        if field != b"count"
    }
