"""The online store, where it must not vouch for what it holds."""

import dataclasses

import pytest
from served import NOW_MS, Served, redis_only, transaction

from cerberus.features import fences

pytestmark = pytest.mark.anyio


@pytest.fixture
async def served(servers):
    async with Served(redis_only(servers)) as served:
        yield served


async def test_versions_are_spoken_that_the_owners_of_all_partitions_read(served):
    served.store._partitions.versions._patience_s = 0.0
    await served.store.states()
    assert served.store.spoken == 0  # nobody tells it
    await served.live(version=1)
    await served.store.states()
    assert served.store.spoken == 1
    await served.live(count=2, version=1)
    await served.store.write_states(2, {})
    state = fences.PartitionState(1, 0, "live", NOW_MS, version=0)
    await served.store.write_states(2, {1: state}, create=True)
    await served.store.read([1], NOW_MS, 1.0)
    assert served.store.spoken == 0  # one owner of two does not read it
    await served.store.write_states(2, {1: dataclasses.replace(state, version=7)})
    await served.store.write_states(2, {0: dataclasses.replace(state, count=2, version=1)})
    await served.store.read([1], NOW_MS, 1.0)
    assert served.store.spoken == 1


@pytest.mark.parametrize(
    "interruption", ["an owner that reads less", "a missing owner", "nobody who reads the states"]
)
async def test_a_newer_version_is_spoken_after_an_hour_without_interruption(served, interruption):
    now_s = [0.0]
    served.store._partitions.versions._clock = lambda: now_s[0]

    async def spoken(at_s):
        while now_s[0] < at_s:
            now_s[0] = min(at_s, now_s[0] + 10.0)
            await served.store.states()
        return served.store.spoken

    await served.live(version=1)
    await served.store.states()
    assert await spoken(3_590.0) == 0
    if interruption == "nobody who reads the states":
        now_s[0] += 11.0
    elif interruption == "a missing owner":
        await served.client.delete("cerberus:partitions:transactions")
    else:
        await served.live(version=0)
    await served.store.states()
    await served.live(version=1)
    await served.store.read([1], NOW_MS, 1.0)
    again_s = now_s[0]
    assert await spoken(again_s + 3_590.0) == 0
    assert await spoken(again_s + 3_600.0) == 1
    await served.live(version=0)
    await served.store.states()
    assert served.store.spoken == 0  # at once: somebody cannot read version 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_owner_of_another_number_of_partitions_vouches_for_nobody(served, streamed):
    if streamed:
        await served.stream(transaction("a"))
    await served.live(count=2)  # while the number of partitions is told as 1
    [row] = await served.store.read([1], NOW_MS, 1.0)
    assert row.state is None
    doubted = await served.ask(user_id=1)
    assert doubted.record.decision.row.degraded == ("owner_missing",)
    await served.live(count=1)
    assert (await served.ask(user_id=1)).record.decision.row.degraded == ()
