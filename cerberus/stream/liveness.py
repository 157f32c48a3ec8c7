"""Who is live: how far each partition is behind the log's end, and what Redis has lost.

An owner writes its partitions' states with every batch and each second. If Redis has lost a
state or the trail that rows leave, it has lost rows too, and all live rows are sent again. The loss
of one node of a cluster is treated as the loss of all.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError

from cerberus import errors, kafka, partition, supervision
from cerberus.features import fences
from cerberus.stream import assignment, dependencies, ownership, sink

_TELL_S, _MARK_MS = 1.0, 2_000
_SEED_S = 0.25
Parts = Mapping[aiokafka.TopicPartition, ownership.Owned]


def states(parts: Parts) -> dict[int, fences.PartitionState]:
    """Return the state of each partition by its number."""
    return {owned.part.number: owned.state() for owned in parts.values()}


class Liveness:
    """Writes who is live, and restores what Redis has lost.

    The partitions are given with each call: a view of those owned, which may change during it.

    Args:
        given: Settings, stores and model.
        rows: Sends rows again.
        resolver: Knows which log each partition was resolved on.

    Attributes:
        ended: Partitions whose log was found to be another one; the reader clears it.
    """

    def __init__(
        self, given: dependencies.Dependencies, rows: sink.Sink, resolver: assignment.Resolver
    ) -> None:
        self._resend_s = given.config.stream.resend_s
        self._topic = given.config.kafka.topic(kafka.TRANSACTIONS)
        self._online = given.online
        self._postgres = given.postgres
        self._rows = rows
        self._resolver = resolver
        self._claims = given.claims
        self._clock = given.clock
        self._clustered = given.config.redis.cluster
        self._count = 0
        self._marks: dict[aiokafka.TopicPartition, tuple[int, int]] = {}
        self._since_s: dict[aiokafka.TopicPartition, float] = {}
        self._marking: asyncio.Task[None] | None = None
        self._scores_lost: bool | None = None
        self._looked_s = self._told_s = self._resent_s = 0.0
        self._seeding: dict[partition.Partition, AsyncGenerator[None, None]] = {}
        self.ended: set[aiokafka.TopicPartition] = set()

    def succeed(
        self, resolved: assignment.Resolved, told: Mapping[int, fences.PartitionState]
    ) -> None:
        """Take over from the former owners.

        Args:
            resolved: What is owned from now on.
            told: The states that the former owners wrote last; the rows are theirs, and as old.
        """
        self._count = resolved.count
        for tp, owned in resolved.owned.items():
            self._since_s[tp] = time.monotonic()
            if not owned.follow(told.get(owned.part.number), self._clock()):
                self._scores_lost = None

    def forget(self) -> None:
        """Forget where the log ended; nothing is owned any more."""
        self._marks.clear()

    async def stop(self) -> None:
        """Stop asking where the log ends, and what lies before a replay's reach."""
        if self._marking is not None:
            self._marking.cancel()
        await self._give_up_seeding({})

    def lag(self, parts: Parts) -> dict[int, int]:
        """Return how many offsets each partition was behind when that was last asked."""
        marks = {tp: end for tp, (end, _) in self._marks.items() if tp in parts}
        return {tp.partition: max(0, end - parts[tp].part.offset) for tp, end in marks.items()}

    def remaining_s(self, parts: Parts) -> dict[int, float]:
        """Estimate how long each replay will still take, s, from its speed so far."""
        now_s = time.monotonic()
        done = {
            tp: (now_s - since_s, parts[tp].part.state().progress)
            for tp, since_s in self._since_s.items()
            if tp in parts and parts[tp].part.replaying
        }
        return {tp.partition: took * (1 - p) / p for tp, (took, p) in done.items() if p > 0}

    def look(self, client: Any, parts: Parts, progress: supervision.Progress, *, now: bool) -> bool:
        """Note which partitions are at the log's end; ask each second where it is, without waiting.

        Args:
            client: The consumer that asks.
            parts: Those owned.
            progress: Is notified whether any of them lags.
            now: Whether there is something to write before the second is over.

        Returns:
            Whether `tell` is due.
        """
        self._looked_s = time.monotonic()
        due = self._looked_s - self._told_s >= _TELL_S
        if not (now or due or self._seeding):
            return False
        if due:
            if self._marking is None or self._marking.done():
                self._marking = asyncio.create_task(self._mark(client, parts))
            progress.lagging(any(self.lag(parts).values()))
        for tp, (end, asked_ms) in self._marks.items():
            owned = parts.get(tp)
            if owned and owned.part.offset >= end and abs(self._clock() - asked_ms) < _MARK_MS:
                owned.reached_end(asked_ms)
        return True

    async def tell(self, parts: Parts, beat: Callable[[], None]) -> None:
        """Write who is live, as of the last look, and send again the rows that Redis has lost.

        Idempotent: yes.

        Raises:
            FeaturesUnavailable: Redis did not acknowledge.
            StoreUnavailable: Postgres did not answer.
        """
        due = self._looked_s - self._told_s >= _TELL_S
        if due:
            self._scores_lost = None  # an import makes them be loaded again
            await self._online.states()  # all owners' states say which versions they read
            if self._clustered:
                await self._online.follow(await self._claims.witness())
        await self._restore(parts, beat)
        if due:
            self._told_s = time.monotonic()

    async def _mark(self, client: Any, parts: Parts) -> None:
        """Ask where the log begins and ends; without an answer, the last one ages.

        It runs in a task of its own, because it waits behind a fetch that waits for records.
        """
        asked_ms, owned = self._clock(), list(parts)
        with contextlib.suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(_MARK_MS / 1000):
                # Each question waits behind a fetch, so they are asked together.
                ends, firsts = await asyncio.gather(
                    client.end_offsets(owned), assignment.first_records(client, owned)
                )
                self.ended |= self._resolver.ended(firsts)
            known = client.partitions_for_topic(self._topic) or ()
            # If there are more, the new ones may have records that nobody reads yet.
            if len(known) == self._count:
                self._marks = {
                    # The end that is returned leaves out what follows an open transaction.
                    tp: (max(end, client.highwater(tp) or 0), asked_ms)
                    for tp, end in ends.items()
                    if tp in parts
                }

    async def _restore(self, parts: Parts, beat: Callable[[], None]) -> None:
        """Write the partitions' states; where Redis has lost a state or a trail, it has lost rows.

        The state is then created again as "restoring", the rows follow, and the next state is
        written only if both are still there, so a loss in between is noticed. The state stays
        "restoring" until the credit scores are loaded again, too.
        """
        due = time.monotonic() - self._resent_s >= self._resend_s
        if self._scores_lost is not False:
            await self._look_for_scores(parts)
        if lost := await self._write_states(parts):
            await self._look_for_scores(parts)
            await self._online.write_states(self._count, states(parts), create=True)
        await self._give_up_seeding(parts)
        for owned in list(parts.values()):
            if owned.part.replaying or not (due or owned.restoring):
                continue
            if owned.restoring and not await self._seed(owned.part, beat):
                continue
            if not await self._rows.write_rows(owned, owned.part.windows.users, beat):
                owned.restored()
            else:
                owned.lost_rows()
        if due:
            self._resent_s = time.monotonic()
        if lost:
            await self._write_states(parts)

    async def _seed(self, part: partition.Partition, beat: Callable[[], None]) -> bool:
        """Fetch events from before the replay for a moment; return True when none is missing.

        The consumer goes on in between, or its group and its other partitions would miss it. One
        partition is fetched at a time: each holds a connection of the pool until its last page.
        """
        if not part.seeds:
            return True
        if self._seeding and part not in self._seeding:
            return False
        pages = self._seeding.pop(part, None) or assignment.seed(
            self._postgres, self._topic, part, part.imported_until_ms or 0
        )
        ends_s = time.monotonic() + _SEED_S
        async for _ in pages:
            beat()
            if time.monotonic() >= ends_s:
                self._seeding[part] = pages
                return False
        return True

    async def _give_up_seeding(self, parts: Parts) -> None:
        """Stop fetching for partitions that are no longer owned or need nothing any more."""
        mine = {owned.part for owned in parts.values()}
        for part in [p for p in self._seeding if p not in mine or p.replaying or not p.seeds]:
            # An error from a dead connection must not leave the others open.
            with contextlib.suppress(errors.CerberusError):
                await self._seeding.pop(part).aclose()

    async def _look_for_scores(self, parts: Parts) -> None:
        self._scores_lost = (
            await self._online.materialized_ms() is None
            and await self._postgres.credit_scores.were_served()
        )
        for owned in parts.values():
            owned.unloaded = self._scores_lost

    async def _write_states(self, parts: Parts) -> bool:
        """Write the states and return whether Redis has lost rows."""
        mine = {owned.part.number: owned for owned in parts.values()}
        lost = await self._online.write_states(
            self._count,
            states(parts),
            trails={number: owned.trail for number, owned in mine.items()},
        )
        for number in lost:
            mine[number].lost_trail()
        return bool(lost)
