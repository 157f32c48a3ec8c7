"""A group of two versions, whose members come and go while records and requests flow."""

import asyncio
import collections
import contextlib
import pathlib
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from cerberus import stack
from chaos import cluster, compare, questions, releases, service, traffic

USERS = range(1_000, 1_400)
_UNLIKE = {"replayed", "latency_stats"}
_LEAVE_S = 1.0  # a load balancer's last requests have arrived by then
_GIVE_UP_S = 20.0
_ENDED = (0, -15, 128 + 15)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        events: How many records are published, a quarter of them before the roll-out.
        rounds: How often a third member joins and leaves while the group is mixed.
        hold_s: How long each state of the group lasts.
        seed: The seed of records and questions.
        back: Whether the older version comes back after the roll-out.
        within_s: How long a change of the group may take until all partitions are live.
    """

    events: int
    rounds: int
    hold_s: float
    seed: int
    back: bool = True
    within_s: float = 90.0


@dataclass(slots=True)
class Told:
    """What a run found.

    Attributes:
        wrong: Failures, one sentence each.
        findings: Findings in the stores, in the answers and in the stored answers.
        counts: How many records, answers, moves and comparisons there were, by name.
    """

    wrong: list[str] = field(default_factory=list)
    findings: list[compare.Findings] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def differences(self) -> list[str]:
        """All failures and differences."""
        return self.wrong + [line for found in self.findings for line in found.differences]


class Rollout:
    """A group whose members come and go, as a load balancer and an operator see it.

    Args:
        target: Its servers; `target.instances` are the instances that receive requests.
        fleet: Two instances of each version, by name.
        plan: What to do.

    Attributes:
        back_s: When the older version came back, wall clock.
        told: What was found.
    """

    def __init__(
        self, target: cluster.Cluster, fleet: Mapping[str, service.Instance], plan: Plan
    ) -> None:
        self.target = target
        self.fleet = fleet
        self.plan = plan
        self.told = Told()
        self.back_s = float("inf")
        self.rotation: list[service.Instance] = []
        target.instances = self.rotation

    async def start(self, *names: str) -> None:
        """Start instances, and send them requests as soon as they are healthy.

        Raises:
            TimeoutError: Not every partition was live in time.
        """
        began_s = time.time()
        for name in names:
            self.fleet[name].start()
        for name in names:
            one = self.fleet[name]
            await self._healthy(one)
            if (wrong := releases.impostor(one)) is not None:
                self.told.wrong.append(wrong)
            self.rotation.append(one)
        await self._settled(began_s, f"all is live after {', '.join(names)} came")

    async def end(self, name: str) -> None:
        """Stop sending requests to an instance, then ask it to end.

        Raises:
            TimeoutError: Not every partition was live in time.
        """
        one = self.fleet[name]
        if one in self.rotation:
            self.rotation.remove(one)
        await asyncio.sleep(_LEAVE_S)
        gone = one.status
        status = gone if gone is not None else await asyncio.to_thread(one.end)
        if gone is not None or status not in _ENDED:
            self.told.wrong.append(f"{name} ended with status {status}, not when asked to")
        one.kill()
        await self._settled(time.time(), f"all is live after {name} went")

    async def _healthy(self, one: service.Instance) -> None:
        async def serves() -> bool:
            if one.status is not None:
                raise TimeoutError(f"{one.name} ended by itself, status {one.status}")
            return (await _health(one)).get("status_code") == 200

        await cluster.until(serves, f"{one.name} serves", self.plan.within_s)

    async def _settled(self, since_s: float, what: str) -> None:
        async def whole() -> bool:
            if self.told.wrong and time.time() > since_s + _GIVE_UP_S:
                raise TimeoutError(f"not within {_GIVE_UP_S:g} s, after what was found: {what}")
            owned = [len((await _health(one)).get("partitions", ())) for one in self.rotation]
            return (
                all(owned) and sum(owned) == cluster.PARTITIONS and await self.target.live(since_s)
            )

        await cluster.until(whole, what, self.plan.within_s)

    async def run(self, say: Callable[[str], None]) -> None:
        """Roll forward through a mixed group.

        Raises:
            TimeoutError: Not every partition was live in time.
        """
        steps: list[tuple[str, str]] = [("start", "new-0"), ("end", "old-0")]
        steps += [("start", "old-0"), ("end", "old-0")] * self.plan.rounds
        steps += [("start", "new-1"), ("end", "old-1")]
        await self._take(steps, say)

    async def back(self, say: Callable[[str], None]) -> None:
        """Roll one instance back for a while, then forward again.

        Raises:
            TimeoutError: Not every partition was live in time.
        """
        self.back_s = time.time()
        steps = [("start", "old-0"), ("end", "new-0"), ("start", "new-0"), ("end", "old-0")]
        await self._take(steps, say)

    async def _take(self, steps: Sequence[tuple[str, str]], say: Callable[[str], None]) -> None:
        for step, name in steps:
            began_s = time.monotonic()
            await (self.start(name) if step == "start" else self.end(name))
            group = "+".join(sorted(one.name for one in self.rotation))
            took_s = time.monotonic() - began_s
            say(f"{f'{step} {name}':<14} {group:<22} live after {took_s:5.1f} s")
            await asyncio.sleep(self.plan.hold_s)

    async def watch(self) -> None:
        """Check every second for restarted tasks and dropped decisions, until cancelled."""
        seen: set[tuple[str, str]] = set()
        while True:
            for one in [one for one in self.fleet.values() if one.up]:
                if one.status is not None:
                    one.up = False
                    one.killed_s.append(time.time())
                health = await _health(one)
                ill = {
                    f"task {name} was restarted: {task['last_error']}"
                    for name, task in health.get("tasks", {}).items()
                    if task["restarts"]
                }
                ill |= {
                    f"{store} has not kept {buffer['dropped']} decisions"
                    for store, buffer in health.get("decisions", {}).items()
                    if buffer["dropped"]
                }
                for what in ill:
                    if (one.name, what) not in seen:
                        seen.add((one.name, what))
                        self.told.wrong.append(f"{one.name}: {what}")
            await asyncio.sleep(1)

    async def compare_doors(self, asker: questions.Asker, rng: random.Random) -> None:
        """Ask two instances about the same transaction, repeatedly, until cancelled.

        Half of the transactions are new and are published afterwards, as payments are.
        """
        async with httpx.AsyncClient(timeout=5.0, limits=questions.LIMITS) as client:
            while True:
                await asyncio.sleep(0.15)
                if len(self.rotation) < 2:
                    continue
                first, second = rng.sample(self.rotation, 2)
                now = traffic.now_ms()
                paid = traffic.Payment(rng.choice(USERS), f"p{rng.getrandbits(64)}", now, 1_234)
                recent = asker.publisher.recent
                if recent and rng.random() < 0.5 and recent[-1].at_ms <= now:
                    paid = recent[-1]
                one = await asker.ask(client, first, paid.document(), paid)
                if second not in self.rotation:
                    continue
                other = await asker.ask(client, second, paid.document(), paid)
                self._same(one, other)
                if paid.name.startswith("p"):
                    asker.publisher.given.append(paid)

    def _same(self, one: questions.Answer, other: questions.Answer) -> None:
        first, second = one.instance.name, other.instance.name
        when = "" if one.sent_s < self.back_s else ", rolled back"
        self.told.counts[f"asked {version(first)}, then {version(second)}{when}"] += 1
        differ = {
            name
            for name in (one.body.keys() | other.body.keys()) - _UNLIKE
            if one.body.get(name) != other.body.get(name)
        }
        if one.status != other.status:
            differ = {"status"}
        elif one.status == 200 and not other.body["replayed"]:
            differ.add("replayed")
        if differ:
            sentence = f"{second} and {first}, asked before it, differ in {sorted(differ)}"
            self.told.wrong.append(sentence)


async def _health(instance: service.Instance) -> dict[str, Any]:
    try:
        async with httpx.AsyncClient(timeout=2.0) as client:
            answer = await client.get(f"http://127.0.0.1:{instance.port}/health")
            health: dict[str, Any] = answer.json()
            return health | {"status_code": answer.status_code}
    except (httpx.TransportError, ValueError):
        return {}


def version(name: str) -> str:
    """Return the version of the instance with this name."""
    return name.partition("-")[0]


@contextlib.asynccontextmanager
async def opened(
    servers: stack.Stack,
    environ: Mapping[str, str],
    directory: pathlib.Path,
    versions: Sequence[releases.Release],
    plan: Plan,
) -> AsyncIterator[Rollout]:
    """Yield a group without members; its first member makes tables and topics."""
    setup = cluster.Setup(USERS, instances=0, credit=False, prepared=False)
    async with cluster.opened(servers, environ, directory, setup) as target:
        own = cluster.environment(environ, directory, credit=False) | {
            "CERBERUS_TASKS": "api,consumer,labels,retention",
            "CERBERUS_READ_TIMEOUT_MS": "2000",  # a machine that starts instances is slow
        }
        made = [each.instance(n, directory, own) for each in versions for n in range(2)]
        with contextlib.ExitStack() as undo:
            for instance in made:
                undo.callback(instance.kill)
            yield Rollout(target, {instance.name: instance for instance in made}, plan)
