"""One run: records, questions and faults side by side, then the comparison and its table."""

import asyncio
import collections
import contextlib
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos import cluster, compare, faults, questions, traffic

USERS = range(1_000, 3_000)
_READY_S, _DRAIN_S = 120.0, 600.0
_LAST_RATE = 3_000.0
_SHOWN = 10
_REBORN = "topic deleted and made again"
_HEAD = f"{'fault':<34}{'times':>6}{'recovered, s':>16}{'degraded, s':>16}{'share':>10}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        events: How many records are published during the faults.
        kinds: Names of the faults, in order.
        reborn: How many records follow after the topic was deleted and created again; 0 for
            neither.
        seed: The seed of all random choices.
    """

    events: int
    kinds: Sequence[str]
    reborn: int
    seed: int


@dataclass(slots=True)
class Told:
    """What a run found.

    Attributes:
        events: How many records the log held, in all its lives.
        injected: The injected faults.
        killed: How many instances were killed.
        unasked: Instances that ended by themselves, and timeouts, one sentence each.
        stores: Findings in the stores, one entry for each life of the topic.
        outcomes: Number of answers by outcome.
        answers: Findings in the answers.
        kept: Findings in the stored answers.
        unkept: How many answers were lost to a kill right after them.
        given: The answers themselves.
    """

    events: int = 0
    injected: list[faults.Fault] = field(default_factory=list)
    killed: int = 0
    unasked: list[str] = field(default_factory=list)
    stores: list[compare.Findings] = field(default_factory=list)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    answers: compare.Findings = field(default_factory=compare.Findings)
    kept: compare.Findings = field(default_factory=compare.Findings)
    unkept: int = 0
    given: list[questions.Answer] = field(default_factory=list)

    @property
    def findings(self) -> list[compare.Findings]:
        """All that was compared."""
        return [*self.stores, self.answers, self.kept]

    @property
    def differences(self) -> list[str]:
        """All failures and differences, one sentence each."""
        return self.unasked + [line for found in self.findings for line in found.differences]


def default(events: int, kills: int, seed: int) -> Plan:
    """Return the plan of `make chaos`: every kind of fault, and `kills` killed instances."""
    rng = random.Random(seed)
    kinds = ["pause"] * max(5, kills // 3) + ["restart"] * 3
    kinds += ["redis without power", "redis flushed", "postgres killed"] * 2 + ["redis killed"]
    kinds += ["redis handed over", "clock ahead"] * 2
    kinds += ["broker restarted", "broker killed", "redis flushed while all are down"]
    left = kills - 3
    while left > 0:
        count = min(left, rng.choice((1, 1, 1, 2, 3)))
        kinds.append(("kill", "kill two at once", "kill all")[count - 1])
        left -= count
    rng.shuffle(kinds)
    for at, kind in ((1, "log cut"), (2, "partition added"), (2, "batches swell")):
        kinds.insert(len(kinds) * at // 3, kind)
    return Plan(events, kinds, events // 10, seed)


async def run(target: cluster.Cluster, plan: Plan, say: Callable[[str], None]) -> Told:
    """Carry out a plan on a cluster where nothing runs yet, and compare.

    A timeout ends the run and counts as a difference.
    """
    rng, told = random.Random(plan.seed), Told()
    publisher = traffic.Publisher(target, USERS, plan.events, rng)
    asker = questions.Asker(target, USERS, rng, publisher)
    schedule = faults.Schedule(target, publisher, plan.kinds, rng)
    told.injected, told.unasked, told.given = schedule.done, schedule.unasked, asker.answers
    stages = _Stages(target, asker, told, say)
    try:
        await stages.start()
        await stages.under_fire(schedule, publisher)
        if plan.reborn:
            await stages.reborn(traffic.Publisher(target, USERS, plan.reborn, rng, "r"))
    except TimeoutError as error:
        told.unasked.append(str(error))
    lives = stages.lives
    told.killed = schedule.killed
    told.events = sum(part.end for life in lives for part in life.log.values())
    if lives:
        told.outcomes, told.answers = questions.answers(target, asker.answers, lives)
        told.unkept, told.kept = await questions.kept(target, asker)
    return told


@dataclass(slots=True)
class _Stages:
    """The stages of a run; each life of the topic is compared when it is over."""

    target: cluster.Cluster
    asker: questions.Asker
    told: Told
    say: Callable[[str], None]
    lives: list[questions.Life] = field(default_factory=list)

    async def start(self) -> None:
        for instance in self.target.instances:
            instance.start()
        took_s = await cluster.until(lambda: _ready(self.target), "the instances serve", _READY_S)
        self.say(f"{'start':<34} ready after     {took_s:5.1f} s")

    async def under_fire(self, schedule: faults.Schedule, publisher: traffic.Publisher) -> None:
        began_s = time.time()
        async with beside(self.asker.run()):
            async with beside(publisher.run()) as publishing:
                await schedule.run(self.say)
                publisher.rate = _LAST_RATE
                await asyncio.wait([publishing])
            await self._drain()
        await self._compare(publisher, began_s)

    async def reborn(self, publisher: traffic.Publisher) -> None:
        began_s = time.time()
        async with beside(self.asker.run()):
            publisher.rate, self.asker.publisher = _LAST_RATE / 3, publisher
            await self.target.recreate_topic()
            async with beside(publisher.run()) as publishing:
                await cluster.until(self.target.live, "the new topic is read", _READY_S)
                took_s = time.time() - began_s
                self.told.injected.append(faults.Fault(_REBORN, began_s, took_s))
                self.say(f"{_REBORN:<34} recovered after {took_s:5.1f} s")
                await asyncio.wait([publishing])
            await self._drain()
        await self._compare(publisher, began_s)

    async def _drain(self) -> None:
        took_s = await cluster.until(self.target.drained, "all is stored", _DRAIN_S)
        self.say(f"{'drain':<34} took            {took_s:5.1f} s")
        await asyncio.sleep(2)

    async def _compare(self, publisher: traffic.Publisher, began_s: float) -> None:
        await cluster.until(self.target.kept, "what was answered last is stored", _READY_S)
        self.lives.append(await _life(self.target, publisher, began_s))
        found = await compare.stores(self.target, [life.log for life in self.lives])
        self.told.stores.append(found)
        self.say(f"{sum(found.compared.values()):,} values compared in the stores")


async def _ready(target: cluster.Cluster) -> bool:
    if not await target.answer() or not await target.live():
        return False
    return not target.credit or await target.online.materialized_ms() is not None


async def _life(
    target: cluster.Cluster, publisher: traffic.Publisher, began_s: float
) -> questions.Life:
    query = "SELECT epoch FROM log_epochs WHERE topic = $1"
    epoch = await target.pool.fetchval(query, target.topic)
    return questions.Life(await compare.read_log(target), publisher.acked_s, epoch, began_s)


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Run something during the body; cancel it at the end, and raise its error there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def table(told: Told) -> str:
    """Lay out what a run found."""
    lines = [f"{'records in the log':<44}{told.events:>12,}"]
    lines += [f"{'instances killed':<44}{told.killed:>12,}", "", _HEAD]
    by_kind: dict[str, list[faults.Fault]] = {}
    for fault in told.injected:
        by_kind.setdefault(fault.kind, []).append(fault)
    shares = _degraded(told)
    for kind, some in by_kind.items():
        recovered = _middle_and_worst([f.recovered_s for f in some if f.recovered_s is not None])
        cleared = _middle_and_worst([shares[f][1] for f in some])
        asked = sum(shares[f][2] for f in some)
        share = sum(shares[f][0] for f in some) / asked if asked else 0.0
        lines.append(f"{kind:<34}{len(some):>6}{recovered}{cleared}{share:>10.1%}")
    lines += ["", f"{'answers':<44}{len(told.given):>12,}"]
    lines += [f"  {name:<42}{count:>12,}" for name, count in told.outcomes.most_common()]
    lines.append("")
    compared: collections.Counter[str] = collections.Counter()
    for found in told.findings:
        compared |= found.compared
    lines += [f"{f'compared: {name}':<44}{count:>12,}" for name, count in compared.items()]
    lines.append(f"{'answers lost to a kill within 2 s':<44}{told.unkept:>12,}")
    lines.append(f"{'lost':<44}{sum(found.lost for found in told.findings):>12,}")
    lines.append(f"{'double counted':<44}{sum(found.doubled for found in told.findings):>12,}")
    lines.append(f"{'differences':<44}{len(told.differences):>12,}")
    return "\n".join(lines + [f"  {line}" for line in told.differences[:_SHOWN]])


def _degraded(told: Told) -> dict[faults.Fault, tuple[int, float, int]]:
    """Count inexact answers between each fault and the next.

    Returns:
        For each fault: how many answers were inexact, when the last of them was asked (s after the
        fault), and how many answers there were.
    """
    shares = {}
    ends = [fault.began_s for fault in told.injected] + [float("inf")]
    for fault, end_s in zip(told.injected, ends[1:], strict=True):
        asked = [a for a in told.given if fault.began_s <= a.sent_s < end_s]
        unsure = [a.sent_s - fault.began_s for a in asked if a.degraded or a.status == 503]
        shares[fault] = (len(unsure), max(unsure, default=0.0), len(asked))
    return shares


def _middle_and_worst(values: Sequence[float]) -> str:
    if not values:
        return f"{'':>16}"
    return f"{statistics.median(values):>8.1f}{max(values):>8.1f}"
