"""A seeded schedule of faults, one after the other, each followed by its recovery."""

import asyncio
import functools
import os
import pathlib
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from cerberus import stack
from chaos import cluster, service, traffic

RECOVER_S = 180.0
CUT_MS = 10_000
"""Half of the window; older records are deleted from the log."""
_SWELLING, _SWOLLEN, _SWOLLEN_BYTES = 3, 240, 250_000_000
_FIRST_GUESS_S = 12.0
_AHEAD_S = 3_600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, and how long it took until all partitions were live again.

    Attributes:
        kind: Name of the fault.
        began_s: When it began, wall clock.
        recovered_s: Seconds until every partition had a live owner at the log's end and every
            instance answered; None when that took more than 3 min.
    """

    kind: str
    began_s: float
    recovered_s: float | None


class Schedule:
    """Injects faults one after the other.

    Args:
        target: The system under test.
        publisher: Its rate is set so that the records last as long as the faults.
        kinds: Names of the faults, in order.
        rng: Chooses the instances and the pauses.

    Attributes:
        done: The faults so far.
        killed: How many instances were killed.
        unasked: Instances that ended by themselves, with their status.
    """

    def __init__(
        self,
        target: cluster.Cluster,
        publisher: traffic.Publisher,
        kinds: Iterable[str],
        rng: random.Random,
    ) -> None:
        self.done: list[Fault] = []
        self.killed = 0
        self.unasked: list[str] = []
        self._target = target
        self._publisher = publisher
        self._kinds = list(kinds)
        self._rng = rng

    async def run(self, say: Callable[[str], None]) -> None:
        """Inject all faults.

        Raises:
            TimeoutError: The service did not recover from a fault; later ones would prove nothing.
        """
        for kind in self._kinds:
            self._pace()
            await asyncio.sleep(self._rng.uniform(0.5, 2.0))
            began_s = time.time()
            await _INJECT[kind](self)
            hit_s = time.time()
            try:
                whole = functools.partial(self._whole, hit_s)
                await cluster.until(whole, f"recovered from: {kind}", RECOVER_S)
            except TimeoutError:
                self.done.append(Fault(kind, began_s, None))
                raise
            self.done.append(Fault(kind, began_s, time.time() - began_s))
            say(f"{kind:<34} recovered after {self.done[-1].recovered_s:5.1f} s")

    def _pace(self) -> None:
        took_s = [fault.recovered_s or RECOVER_S for fault in self.done]
        each_s = sum(took_s) / len(took_s) + 1.5 if took_s else _FIRST_GUESS_S
        left_s = each_s * (len(self._kinds) - len(self.done))
        self._publisher.rate = max(20.0, (self._publisher.total - self._publisher.sent) / left_s)

    async def _whole(self, since_s: float) -> bool:
        for instance in self._target.instances:
            if instance.up and instance.status is not None:
                self.unasked.append(f"{instance.name} ended by itself, status {instance.status}")
                instance.kill()
                instance.start()
        return await self._target.answer() and await self._target.live(since_s)

    def _some(self, count: int) -> list[service.Instance]:
        return self._rng.sample(list(self._target.instances), count)

    async def kill(self, count: int) -> None:
        """Kill instances and start them again after a pause."""
        hit = self._some(count)
        for instance in hit:
            instance.kill()
            self.killed += 1
        for instance in hit:
            await asyncio.sleep(self._rng.uniform(0, 3))
            instance.start()

    async def pause(self) -> None:
        """Freeze an instance for longer than its session lasts, then let it continue."""
        [instance] = self._some(1)
        instance.pause()
        await asyncio.sleep(cluster.SESSION_S + self._rng.uniform(1, 6))
        instance.resume()

    async def restart(self) -> None:
        """Ask an instance to end, as a release does, and start it again."""
        [instance] = self._some(1)
        status = await asyncio.to_thread(instance.end)
        if status not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            self.unasked.append(f"{instance.name} did not stop cleanly in 30 s, status {status}")
        instance.start()

    async def broker(self, *, hard: bool) -> None:
        """Restart the broker, cleanly or after SIGKILL."""
        await self._server(self._target.servers.kafka, hard=hard)

    async def _server(self, server: stack.Server, *, hard: bool = True) -> None:
        if not hard:
            await asyncio.to_thread(server.restart)
            return
        await asyncio.to_thread(server.kill, signal.SIGKILL)
        await asyncio.sleep(self._rng.uniform(0.2, 4))
        await asyncio.to_thread(server.start)

    async def redis(self) -> None:
        """Kill Redis and start it again."""
        await self._server(self._target.servers.redis)

    async def redis_power(self) -> None:
        """Cut the power of Redis: what it appended to its file in the last seconds is lost."""
        redis = self._target.redis
        await redis.config_set("auto-aof-rewrite-percentage", 0)  # a rewrite changes the lengths

        async def settled() -> bool:
            return not (await redis.info("persistence"))["aof_rewrite_in_progress"]

        await cluster.until(settled, "the rewrite of the file has finished", 30)
        found = await redis.config_get("dir")
        lengths = _lengths(pathlib.Path(found["dir"]))
        await asyncio.sleep(self._rng.uniform(0.5, 3))
        server = self._target.servers.redis
        await asyncio.to_thread(server.kill, signal.SIGKILL)
        for file, length in lengths.items():
            os.truncate(file, length)
        await asyncio.to_thread(server.start)

    async def redis_handed_over(self) -> None:
        """Fail Redis over to another server and back, without ending a connection."""
        for back in (False, True):
            began_s = time.time()
            await self._target.pair.hand_over(back=back)
            whole = functools.partial(self._whole, began_s)
            await cluster.until(whole, "recovered from a hand-over of Redis", RECOVER_S)

    async def clock_ahead(self) -> None:
        """Let an instance own partitions with a clock an hour ahead, then kill it."""
        [instance] = self._some(1)
        instance.kill()
        instance.start(service.AHEAD)
        await cluster.until(self._owned_ahead, "it owns something", RECOVER_S)
        await asyncio.sleep(self._rng.uniform(1, 3))
        instance.kill()
        self.killed += 2
        await asyncio.sleep(cluster.SESSION_S + self._rng.uniform(3, 6))
        instance.start()

    async def _owned_ahead(self) -> bool:
        states = await self._target.online.states()
        late_ms = (time.time() + _AHEAD_S / 2) * 1000
        return any(state.caught_up_ms > late_ms for state in states.values())

    async def postgres(self) -> None:
        """Kill Postgres and start it again."""
        await self._server(self._target.servers.postgres)

    async def flush(self) -> None:
        """Empty Redis."""
        await self._target.redis.flushall()

    async def flush_all_down(self) -> None:
        """Empty Redis while no instance runs."""
        hit = self._some(len(self._target.instances))
        for instance in hit:
            instance.kill()
            self.killed += 1
        await self.flush()
        for instance in hit:
            instance.start()

    async def cut(self) -> None:
        """Delete the log up to the middle of the windows, and let others read it from there."""
        await self._target.cut_log(CUT_MS)
        await self.kill(len(self._target.instances))

    async def swell(self) -> None:
        """Send batches of 14 kB that unpack to 214 MB; no instance may use that much memory."""
        before = [instance.greatest_bytes for instance in self._target.instances]
        await self._publisher.swell(_SWELLING, _SWOLLEN)
        await cluster.until(self._target.drained, "what swells is stored", RECOVER_S)
        for instance, bytes_before in zip(self._target.instances, before, strict=True):
            if (taken := instance.greatest_bytes - bytes_before) > _SWOLLEN_BYTES:
                self.unasked.append(f"{instance.name} took {taken:,} bytes for what swells")

    async def partition(self) -> None:
        """Add a partition, so that users move."""
        self._publisher.forget(10)
        await self._target.add_partition()


def _lengths(directory: pathlib.Path) -> dict[pathlib.Path, int]:
    return {file: file.stat().st_size for file in directory.rglob("appendonly*.aof*")}


_INJECT: dict[str, Callable[[Schedule], Awaitable[None]]] = {
    "kill": lambda s: s.kill(1),
    "kill two at once": lambda s: s.kill(2),
    "kill all": lambda s: s.kill(len(s._target.instances)),
    "pause": lambda s: s.pause(),
    "restart": lambda s: s.restart(),
    "broker restarted": lambda s: s.broker(hard=False),
    "broker killed": lambda s: s.broker(hard=True),
    "redis killed": lambda s: s.redis(),
    "redis without power": lambda s: s.redis_power(),
    "redis handed over": lambda s: s.redis_handed_over(),
    "clock ahead": lambda s: s.clock_ahead(),
    "redis flushed": lambda s: s.flush(),
    "redis flushed while all are down": lambda s: s.flush_all_down(),
    "postgres killed": lambda s: s.postgres(),
    "partition added": lambda s: s.partition(),
    "log cut": lambda s: s.cut(),
    "batches swell": lambda s: s.swell(),
}
