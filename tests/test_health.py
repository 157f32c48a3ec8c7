"""How a process says it is: `GET /health`, through the real routes on a real Redis."""

import asyncio

import anyio
import pytest
from asking import client, validate
from served import NOW_MS, Served, redis_only, transaction

from cerberus import supervision
from cerberus.api import openapi

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served(servers):
    async with Served(redis_only(servers)) as served:
        await served.stream(transaction("a"))
        yield served


async def test_health_is_ready_when_every_part_is(http, served):
    response = await http.get("/health")
    body = response.json()
    assert (response.status_code, body["status"], body["reasons"]) == (200, "ready", [])
    assert body["model"]["sha256"] == served.model.sha256
    assert body["servers"] == {"redis": None}
    assert body["producer"] == {"rate": 2.0, "reason": served.config.rate_reason}
    validate((await http.get("/openapi.json")).json(), "Health", body)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "replaying", "progress": 0.4}, "partition 0 is replaying"),
        ({"state": "rebuilding"}, "partition 0 is rebuilding"),
        ({"caught_up_ms": NOW_MS - 5_001}, "partition 0 is stale"),
        ({"known_from_ms": NOW_MS - 599_999}, "partition 0 is warming"),
    ],
)
async def test_health_is_degraded_while_a_partition_is(http, served, changes, reason):
    served.offset += 1
    await served.live(**changes)
    response = await http.get("/health")
    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    assert [r[: len(reason)] for r in response.json()["reasons"]] == [reason]


async def test_health_is_degraded_when_no_consumer_was_ever_there(http, served):
    await served.client.flushdb()
    assert (await http.get("/health")).json()["status"] == "degraded"


async def test_health_is_degraded_while_a_server_is_down_and_failed_without_features(served):
    async def down():
        raise ConnectionRefusedError("nobody listens")

    async def hangs():
        await asyncio.sleep(30)

    async with client(served.app({"postgres": down, "kafka": hangs})) as http:
        response = await http.get("/health")
        body = response.json()
        assert (response.status_code, body["status"]) == (200, "degraded")
        assert body["servers"]["redis"] is None
        assert body["servers"]["postgres"] == "ConnectionRefusedError: nobody listens"
        assert body["servers"]["kafka"].startswith("TimeoutError")


async def test_servers_are_asked_once_however_many_ask_for_health(served):
    asked = 0

    async def count():
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)

    async with client(served.app({"postgres": count})) as http:
        await asyncio.gather(*(http.get("/health") for _ in range(20)))
    assert asked == 1


async def test_health_never_says_ready_with_a_task_that_does_not_run(served):
    async def dies(progress):
        raise RuntimeError("broken pipe")

    async def lives(progress):
        await progress.stopping.wait()

    policy = supervision.Policy(backoff_base_s=0.01, backoff_cap_s=0.01, max_failures=2)
    served.supervisor = supervision.Supervisor(lambda reason: None, policy=policy)
    served.supervisor.add("lives", lives)
    served.supervisor.add("dies", dies)
    seen = set()
    async with (
        client(served.app()) as http,
        asyncio.timeout(20),
        anyio.create_task_group() as group,
    ):
        seen.add((await http.get("/health")).json()["status"])
        served.supervisor.start(group)
        while served.supervisor.gave_up is None:
            seen.add((await http.get("/health")).json()["status"])
        response = await http.get("/health")
        await served.supervisor.stop()
    body = response.json()
    assert (response.status_code, body["status"]) == (503, "failed")
    assert any("broken pipe" in reason for reason in body["reasons"])
    assert body["tasks"]["dies"]["state"] == "failed"
    assert "ready" not in seen
    validate(openapi.document(("10m",), "USD"), "Health", body)
