"""The online store, where it must not vouch for what it holds."""

import pytest
from served import NOW_MS, Served, redis_only, transaction

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


@pytest.fixture
async def served(servers):
    async with Served(redis_only(servers)) as served:
        yield served


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
