"""The state of the service: ready, degraded with reasons, or failed.

A load balancer removes an instance that answers 503. So 503 is kept for what another instance can
do better: features are unreachable, or a task was given up. Everything else is `degraded`:
predictions go on, and carry their own reasons.
"""

import asyncio
import functools
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cerberus import assembly, endpoints
from cerberus.features import evaluation, fences

PROBE_S = 1.0
"""How long `/health` waits for the servers, s."""
# Length, ApiVersions, version 0, correlation id, client id; an answer is longer.
_API_VERSIONS = struct.pack(">ihhih8s", 18, 18, 0, 1, 8, b"cerberus")
_SPLIT = (
    "has records of users of another one: key every record with user_id as ASCII digits and the "
    "default (murmur2) partitioner; after partitions were added, this passes by itself"
)
Probe = Callable[[], Awaitable[Any]]


class Servers:
    """Asks whether the servers answer: at most once a second, each for at most a second.

    Args:
        probes: By server; any answer is good. `redis` answers with the partitions' states.
    """

    def __init__(self, probes: Mapping[str, Probe]) -> None:
        self._probes = probes
        self._asking = asyncio.Lock()
        self._asked_s = -PROBE_S
        self._asked: dict[str, asyncio.Task[Any]] = {}
        self._answers: dict[str, Any] = {}

    async def ask(self) -> Mapping[str, Any]:
        """Return each server's answer, or the exception that it raised."""
        async with self._asking:
            if time.monotonic() - self._asked_s >= PROBE_S:
                await self._ask()
                self._asked_s = time.monotonic()
        return self._answers

    async def _ask(self) -> None:
        """Ask each server, unless an earlier question to it is still being cancelled.

        Not `asyncio.timeout`: it would wait until a frozen server has released the connection.
        """
        for name in self._probes.keys() - self._asked.keys():
            self._asked[name] = asyncio.ensure_future(self._probes[name]())
        await asyncio.wait(self._asked.values(), timeout=PROBE_S)
        for name, asked in list(self._asked.items()):
            if asked.done():
                del self._asked[name]
            if asked.done() and not asked.cancelled():
                self._answers[name] = asked.exception() or asked.result()
            else:
                asked.cancel()
                self._answers[name] = TimeoutError(f"no answer within {PROBE_S:g} s")


async def reach_kafka(kafka: endpoints.Kafka, tls: Any) -> None:
    """Ask any broker which requests it knows, which needs no login.

    A connection alone proves nothing: the kernel accepts it for a frozen broker.

    Deadline: 1 s.

    Raises:
        ConnectionError: No broker answered.
    """

    async def ask(address: str) -> None:
        host, _, port = address.rpartition(":")
        async with asyncio.timeout(PROBE_S * 0.9):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=tls)
            try:
                writer.write(_API_VERSIONS)
                await reader.readexactly(len(_API_VERSIONS))
            finally:
                writer.close()

    tried = await asyncio.gather(*map(ask, kafka.bootstrap), return_exceptions=True)
    if all(isinstance(result, Exception) for result in tried):
        raise ConnectionError(f"no broker answers at {', '.join(kafka.bootstrap)}")


def probes(service: assembly.Service) -> dict[str, Probe]:
    """Return the probes of the servers that this process needs besides Redis."""
    if service.config.tasks == {"api"}:
        return {}
    reach = functools.partial(reach_kafka, service.config.kafka, service.tls)
    return {"postgres": service.postgres.schema.check, "kafka": reach}


class Health:
    """Judges all parts together.

    Args:
        service: The parts.
        servers: The servers that the parts use.
    """

    def __init__(self, service: assembly.Service, servers: Servers) -> None:
        self._config = service.config
        self._model = service.model
        self._servers = servers
        self._supervisor = service.supervisor
        self._log = service.outbox
        self._consumer = service.consumer if "consumer" in service.config.tasks else None
        self._labels = service.label_consumer

    async def report(self, now_ms: int, longest_ms: int) -> tuple[bool, dict[str, Any]]:
        """Return whether this instance can serve, and the state of each part. Deadline: 1 s."""
        answers = await self._servers.ask()
        down = {
            name: f"{type(answer).__name__}: {answer}" if isinstance(answer, Exception) else None
            for name, answer in answers.items()
        }
        failed = self._failures(down)
        doubts = self._doubts(down)
        if isinstance(states := answers.get("redis"), Mapping):
            doubts += _partition_doubts(states, now_ms, longest_ms)
        report: dict[str, Any] = {
            "status": "failed" if failed else "degraded" if doubts else "ready",
            "reasons": failed + doubts,
            "tasks": {
                name: {
                    "state": task.state,
                    "since_s": round(task.since_s, 1),
                    "restarts": task.restarts,
                    "last_error": task.last_error,
                }
                for name, task in self._supervisor.status().items()
            },
            "model": {
                "sha256": self._model.sha256,
                "threshold": self._model.manifest.threshold,
                "policy": self._model.policy.sha256,
            },
            "decisions": self._log.report(),
            "servers": down,
            "partitions": self._partitions(),
        }
        if "producer" in self._config.tasks:
            report["producer"] = {
                "rate": self._config.rate,
                "reason": self._config.rate_reason,
            }
        return not failed, report

    def _failures(self, down: Mapping[str, str | None]) -> list[str]:
        found = []
        if self._supervisor.gave_up is not None:
            found.append(f"gave up: {self._supervisor.gave_up}")
        if "api" in self._config.tasks and down.get("redis"):
            found.append("no prediction is possible: features are unreachable")
        return found

    def _doubts(self, down: Mapping[str, str | None]) -> list[str]:
        found = [
            f"task {name} is {task.state}" + (f": {task.last_error}" if task.last_error else "")
            for name, task in self._supervisor.status().items()
            if not task.sound
        ]
        found += [f"{name} does not answer: {why}" for name, why in down.items() if why]
        for store, told in self._log.report().items():
            if told["dropped"]:
                found.append(
                    f"{told['dropped']} decisions were not stored: {store} was down too long, or "
                    "refused their data; the log names those"
                )
            elif told["problem"]:
                found.append(f"{told['waiting']} decisions wait for {store}: {told['problem']}")
        if self._consumer is not None:
            # Partition states record split users, also after a restart.
            problems = self._consumer.problems.items()
            found += [sentence for name, sentence in problems if name != "split_user"]
        if self._labels.problem is not None:
            found.append(f"labels on the topic wait: {self._labels.problem}")
        found += filter(None, (self._labels.lost, self._labels.advice))
        return found

    def _partitions(self) -> dict[str, Any]:
        if self._consumer is None:
            return {}
        lag, remaining_s = self._consumer.lag(), self._consumer.remaining_s()
        return {
            str(number): {
                "state": state.state,
                "progress": round(state.progress, 3),
                "remaining_s": round(remaining_s.get(number, 0.0), 1),
                "lag": lag.get(number),
                "epoch": state.epoch,
                "offset": state.offset,
            }
            for number, state in sorted(self._consumer.states().items())
        }


def _partition_doubts(
    states: Mapping[int, fences.PartitionState], now_ms: int, longest_ms: int
) -> list[str]:
    if not states:
        return ["no consumer has reported its state: streamed values are null"]
    doubted: dict[str, list[str]] = {}
    for number, state in sorted(states.items()):
        if state.state != fences.LIVE:
            done = (
                f", {state.progress:.0%} done" if state.state == evaluation.Doubt.REPLAYING else ""
            )
            doubted.setdefault(f"is {state.state}{done}", []).append(str(number))
        if now_ms - state.caught_up_ms > evaluation.STALE_MS:
            doubted.setdefault("is stale: behind the end of its log", []).append(str(number))
        if state.caught_up_ms - now_ms > evaluation.AHEAD_MS:
            ahead = "is reported by a process whose clock is ahead of this one: run NTP on both"
            doubted.setdefault(ahead, []).append(str(number))
        if state.split_ms > now_ms - longest_ms:
            doubted.setdefault(_SPLIT, []).append(str(number))
        if state.known_from_ms > now_ms - longest_ms:
            doubted.setdefault("is warming: its log begins too late or lost records", []).append(
                str(number)
            )
    return [f"partition {', '.join(found)} {why}" for why, found in doubted.items()]
