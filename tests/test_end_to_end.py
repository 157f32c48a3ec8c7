"""A transaction's whole life, on real servers: both doors, one decision, found, and judged."""

import asyncio
import contextlib

import pytest
from asking import client
from pipeline import live, now_ms, payment, running, until, world

from cerberus import transactions
from cerberus.decisions import records

pytestmark = pytest.mark.anyio
AMOUNT, TIMES, MONTH_MS = 6_400.0, 10, 31 * 86_400_000


class Service:
    """The routes and the decision log on a world's stores, at a clock that can be put forward."""

    def __init__(self, here):
        self.ahead_ms = 0
        self.log = here.decision_log()
        self.app = here.app(self.log, clock=lambda: now_ms() + self.ahead_ms)


async def found_by_every_look_up(http, user, name):
    """Return the ids under which the four look-ups know a user's only transaction."""
    by_transaction = (await http.get("/decisions", params={"transaction_id": name})).json()
    by_user = (await http.get("/decisions", params={"user_id": user})).json()
    of_user = (await http.get(f"/users/{user}")).json()
    found = {d["decision_id"] for d in by_transaction["decisions"]}
    assert {d["decision_id"] for d in by_user["decisions"]} == found
    assert {d["decision_id"] for d in of_user["decisions"]} == found
    for each in found:
        assert (await http.get(f"/decisions/{each}")).json() in by_user["decisions"]
    return found


@pytest.mark.parametrize("first", [records.HTTP, records.STREAM])
async def test_both_doors_ten_times_give_one_decision_that_is_found_and_judged(environ, first):
    async with world(environ | {"CERBERUS_PARTITIONS": "2"}) as here:
        service, at, users = Service(here), now_ms() - 1_000, (1000, 1001)
        hands = {
            user: {
                "user_id": user,
                "transaction_id": f"order-{user}",
                "amount": AMOUNT,
                "timestamp": transactions.format_ms(at + user),
            }
            for user in users
        }
        async with (
            running(one := here.consumer()),
            contextlib.AsyncExitStack() as stack,
            running(service.log),
            client(service.app) as http,
        ):
            stack.push_async_callback(service.log.close)
            await until(lambda: live(one, partitions=2), "all is caught up")

            async def ask():
                asked = [http.post("/predict", json=hands[u]) for u in users for _ in range(TIMES)]
                answers.extend(answer.json() for answer in await asyncio.gather(*asked))

            async def stream():
                record = [
                    (u, payment(0, u, at + u, AMOUNT, transaction_id=f"order-{u}"), at + u)
                    for u in users
                ]
                await here.publish(record * TIMES)
                await until(lambda: sum(one.counts.values()) == TIMES * len(users), "all is read")

            async def stored():
                rows = await here.pool.fetch("SELECT user_id, door FROM decisions")
                return sorted(map(tuple, rows)) == [(user, first) for user in users]

            answers = []
            for door in (ask, stream, ask) if first == records.HTTP else (stream, ask, ask):
                await door()
                await until(stored, "each is stored once, from the first door")
            for user in users:
                given = [a for a in answers if a["user_id"] == user]
                assert sum(not a["replayed"] for a in given) == (first == records.HTTP)
                assert len({str(a | {"replayed": 0, "latency_stats": 0}) for a in given}) == 1
                names = {a["decision_id"] for a in given}
                assert await found_by_every_look_up(http, user, f"order-{user}") == names

            async def published():
                shown = await here.published()
                return len(shown) == len(users) and shown

            told = await until(published, "both are on the topic")
            assert {len({str(each) for each in shown}) for shown in told.values()} == {1}

            async def judged():
                [model] = (await http.get("/accuracy")).json()["models"]
                return [model["total"][figure] for figure in ("matured", "recall", "immature")]

            assert await judged() == [0, None, 2]
            label = {"transaction_id": "order-1000", "label": "chargeback", "source": "bank"}
            service.ahead_ms = MONTH_MS // 2
            label["labelled_at"] = transactions.format_ms(now_ms() + service.ahead_ms)
            assert (await http.post("/labels", json=label)).json()["stored"] == 1
            assert await judged() == [0, None, 2]
            service.ahead_ms = MONTH_MS
            # The other one was declined, and nobody has said whether that was right.
            assert await judged() == [1, 1.0, 0]
