"""Partitions in Redis: who is live, the trail of written rows, and when batch views were loaded."""

import contextlib
import dataclasses
import itertools
import math
import secrets
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import redis.asyncio
import redis.exceptions

from cerberus import clock
from cerberus.features import evaluation, fences
from cerberus.online import pool as redis_pool

MATERIALIZED = "cerberus:{materialized}"  # a cluster places keys by what is in braces
LOADING = f"{MATERIALIZED}:loading"
_PROVED, _PROVED_MS, _NODES = "cerberus:proved:{{{}}}", 60_000, 64

# KEYS[1] is the topic's hash of partitions. ARGV: partition, epoch, offset, the trail that was left
# and the one that was tried. Goes on unless the fence is older (0) or the trail differs (-1); an
# empty trail is not compared.
_FENCED = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
local readable, s = pcall(cjson.decode, stored)
if stored and readable then
  local e, o = tonumber(ARGV[2]), tonumber(ARGV[3])
  if s.epoch > e or (s.epoch == e and s.offset > o) then return 0 end
end
local trail = redis.call('HGET', KEYS[1], 'trail:' .. ARGV[1])
if ARGV[4] ~= '' and trail ~= ARGV[4] and trail ~= ARGV[5] then return -1 end
"""
# Further ARGV: the new trail.
_LEAVE_TRAIL = f"""{_FENCED}
redis.call('HSET', KEYS[1], 'trail:' .. ARGV[1], ARGV[6])
return 1
"""
# Further ARGV: state as JSON, whether to create a missing one, the number of partitions.
_WRITE_STATE = f"""{_FENCED}
if not (stored and readable) and ARGV[7] == '0' then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[6], 'count', ARGV[8])
return 1
"""


@dataclass(slots=True)
class Trail:
    """What the last write of a partition's rows left beside them.

    A store that was set back to an earlier moment, as by a crash or a failover, does not have the
    trail that its writer remembers, and has lost rows.

    Attributes:
        left: Acknowledged; None before the first write.
        tried: Sent last, acknowledged or not; None before the first write.
    """

    left: str | None = None
    tried: str | None = None


_UNHEARD_S = 10.0
NO_TRAILS: Mapping[int, Trail] = types.MappingProxyType({})


class Versions:
    """Chooses the version in which claims and commits are written.

    A newer version is written only after the owners of all partitions have read it for a while
    without interruption. An older release that comes back within that time can read everything.

    Args:
        patience_s: How long all owners must have read a version before it is written.
        clock: A monotonic clock, in seconds.

    Attributes:
        spoken: The version to write.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float]) -> None:
        self.spoken = 0
        self._patience_s = patience_s
        self._clock = clock
        self._heard = 0
        self._since_s = self._last_s = -math.inf

    def hear(self, version: int) -> None:
        """Take note of the newest version that all owners read now; 0 if an owner is missing.

        More than 10 s without a call interrupt the wait, too.
        """
        now_s = self._clock()
        if version != self._heard or now_s - self._last_s > _UNHEARD_S:
            self._heard, self._since_s = version, now_s
        self._last_s = now_s
        if version <= self.spoken or now_s - self._since_s >= self._patience_s:
            self.spoken = version


class PartitionStates:
    """The hash of a topic's partitions in Redis: states, trails and the witness of a cluster.

    Args:
        client: The shared pool.
        topic: Whose partitions are followed.
        versions: Learns at each read which version all owners read.
        clock: The wall clock in ms since the Unix epoch.

    Attributes:
        key: Of the hash.
    """

    def __init__(
        self, client: Any, topic: str, versions: Versions, clock: clock.Clock = clock.now_ms
    ) -> None:
        self.key = f"cerberus:partitions:{topic}"
        self.versions = versions
        self._client = client
        self._clock = clock
        self._ahead: dict[int, tuple[int, float]] = {}
        self._trails = map(f"{secrets.token_hex(8)}:{{}}".format, itertools.count())

    async def write(
        self,
        count: int,
        states: Mapping[int, fences.PartitionState],
        *,
        trails: Mapping[int, Trail] = NO_TRAILS,
        create: bool = False,
    ) -> set[int]:
        """Write the states of owned partitions and how many partitions there are, fenced.

        Args:
            count: How many partitions there are.
            states: Of those owned.
            trails: Of their rows.
            create: Whether to create states that Redis does not have.

        Returns:
            The partitions of which Redis has lost rows: it lacks their state or their trail.

        Raises:
            FeaturesUnavailable: Redis did not acknowledge within 2 s.
        """
        calls: list[redis_pool.Call] = []
        for number, state in states.items():
            trail = trails.get(number, Trail())
            left, tried = trail.left or "", trail.tried or ""
            known: list[int | str] = [number, state.epoch, state.offset, left, tried]
            told: list[bytes | int] = [state.pack(), int(create), count]
            calls.append((_WRITE_STATE, [self.key], [*known, *told]))
        answers = await redis_pool.evaluate(self._client, calls)
        return {p for p, answer in zip(states, answers, strict=True) if answer == -1}

    async def follow(self, witness: str) -> None:
        """Make the loss of one node of a cluster, which changes the witness, the loss of all.

        States, trails and the mark that the batch views are loaded are deleted when another witness
        stands beside them; every owner notices that. Idempotent: yes.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s; follow again.
        """
        new, loaded = witness.encode(), f"{MATERIALIZED}:witness"
        if (old := await redis_pool.answers(self._client, self._client.get(loaded))) != new:
            if old is not None:
                await redis_pool.answers(self._client, self._client.delete(MATERIALIZED, LOADING))
            await redis_pool.answers(self._client, self._client.set(loaded, new))
        if (
            old := await redis_pool.answers(self._client, self._client.hget(self.key, "witness"))
        ) != new:
            if old is not None:
                await redis_pool.answers(self._client, self._client.delete(self.key))
            await redis_pool.answers(self._client, self._client.hset(self.key, "witness", new))

    async def read(self) -> dict[int, fences.PartitionState]:
        """Read what the owners say about all partitions.

        Raises:
            FeaturesUnavailable: Redis did not answer within 2 s.
        """
        return await self._ask(self._client.pipeline(transaction=False))

    async def prove(self, *, clustered: bool) -> dict[int, fences.PartitionState]:
        """Write a mark that expires, on a cluster one for each node, and read all states.

        A replica and a server without memory still answer reads.

        Raises:
            FeaturesUnavailable: Redis does not answer, or takes no writes.
        """
        pipe = self._client.pipeline(transaction=False)
        for part in range(_NODES if clustered else 1):
            pipe.set(_PROVED.format(part), 1, px=_PROVED_MS)
        return await self._ask(pipe)

    async def _ask(self, pipe: Any) -> dict[int, fences.PartitionState]:
        """Read all states, after what the pipeline holds, from a server that is no replica."""
        pipe.hgetall(self.key)
        clustered = isinstance(self._client, redis.asyncio.RedisCluster)
        if not clustered:
            pipe.info("replication")

        async def asked() -> Any:
            found = await pipe.execute(raise_on_error=clustered)
            role = None if clustered else found.pop()
            for refused in (each for each in found if isinstance(each, Exception)):
                raise refused
            # It may be set to take writes, which it loses. Where INFO is forbidden, nobody knows.
            if isinstance(role, Mapping) and role.get("role") == "slave":
                raise redis.exceptions.ReadOnlyError("a replica", status_code="READONLY")
            return found[-1]

        return self.unpack(await redis_pool.answers(self._client, asked()))[1]

    async def materialized_ms(self) -> int | None:
        """Return when the batch views were last loaded; None when Redis has lost them."""
        value = await redis_pool.answers(self._client, self._client.get(MATERIALIZED))
        return None if value is None else int(value)

    def unpack(self, found: Mapping[bytes, bytes]) -> tuple[int, dict[int, fences.PartitionState]]:
        """Return how many partitions there are and their states, from the hash's fields.

        A state that is broken counts as gone, and its owner writes it again. A topic that was
        created again with fewer partitions leaves some behind.
        """
        states, count, now_ms = {}, int(found.get(b"count", 0)), self._clock()
        for field, value in found.items():
            if field.isdigit() and int(field) < count:
                with contextlib.suppress(ValueError, TypeError):
                    state = fences.PartitionState.unpack(value)
                    if state.caught_up_ms > now_ms:
                        state = self._aged(int(field), state, now_ms)
                    states[int(field)] = state
        whole = 0 < len(states) == count
        self.versions.hear(min(state.version for state in states.values()) if whole else 0)
        return count, states

    def _aged(
        self, number: int, state: fences.PartitionState, now_ms: int
    ) -> fences.PartitionState:
        """Judge a time from the future by how long it has not changed.

        Otherwise an owner whose clock was an hour ahead would become stale only an hour after it
        ended.
        """
        now_s = time.monotonic()
        stamp_ms, since_s = self._ahead.get(number, (0, now_s))
        if stamp_ms != state.caught_up_ms:
            self._ahead[number] = (state.caught_up_ms, now_s)
            return state
        silent_ms = int((now_s - since_s) * 1000)
        if silent_ms <= evaluation.STALE_MS:
            return state
        return dataclasses.replace(state, caught_up_ms=now_ms - silent_ms)

    def leave(
        self, trail: Trail, partition: int, fence: fences.Fence
    ) -> tuple[redis_pool.Call, str]:
        """Return the call that leads a trail on behind rows, and the trail that it will leave."""
        new = next(self._trails)
        arguments: list[bytes | int | str] = [
            partition,
            fence.epoch,
            fence.offset,
            trail.left or "",
            trail.tried or "",
            new,
        ]
        trail.tried = new
        return (_LEAVE_TRAIL, [self.key], arguments), new
