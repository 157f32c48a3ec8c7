"""One decision a transaction: whoever asks, at whichever door, however many at once."""

import asyncio
import collections
import contextlib
import dataclasses
import operator
import random
import subprocess
import threading
import time
from typing import Any

import asyncpg
import httpx
import orjson
import pytest
import redis
from changes import changed
from pipeline import live, now_ms, payment, running, until, world
from records import decided
from served import NOW_MS, Served
from service import free_port, service

from cerberus import claims, errors, settings, stack, transactions, window
from cerberus.decisions import records
from cerberus.online import pool as redis_pool
from cerberus.postgres import ledger, stores
from cerberus.postgres import pool as postgres_pool

pytestmark = pytest.mark.anyio


@dataclasses.dataclass
class Side:
    """One of several processes, as its claims see the world."""

    config: settings.Settings
    redis: Any
    ledger: ledger.Ledger
    claimed: claims.Claims

    def mark(self, bucket):
        return claims._mark(self.config, bucket)

    async def vouching(self):
        """Let Redis have known all claims for long."""
        await self.redis.mset({self.mark(bucket): 0 for bucket in range(64)})

    async def settle(self, *records):
        return await self.claimed.settle(records, now_ms(), set())

    async def claimed_keys(self):
        return await self.redis.keys(f"{self.mark('*')}:" + "?" * 32)


@contextlib.asynccontextmanager
async def side(environ, *, version=records.VERSION, **changes):
    config = changed(settings.load(environ), **changes)
    client = redis_pool.connect(config, claims.recognise(config))
    try:
        async with postgres_pool.connect(config) as pool:
            kept = ledger.Ledger(pool)
            yield Side(config, client, kept, claims.Claims(config, client, kept, lambda: version))
    finally:
        await client.aclose()


@pytest.fixture
async def one(environ):
    async with side(environ) as opened:
        await stores.on(opened.ledger._pool, ("10m",)).schema.migrate()
        yield opened


@pytest.fixture
async def other(environ, one):
    async with side(environ) as opened:
        yield opened


def eventually(call):
    end_s = time.monotonic() + 20
    while True:
        try:
            return call()
        except redis.exceptions.RedisError:
            assert time.monotonic() < end_s
            time.sleep(0.05)


def bucket_of(record):
    return record.decision_id.int % 64


# Redis and Postgres alone.


@pytest.mark.parametrize("vouching", [True, False])
def test_of_all_who_claim_at_once_in_two_loops_one_wins_each(environ, vouching):
    at, together, told = now_ms(), threading.Barrier(2), [[], []]

    async def prepare():
        async with side(environ) as here:
            await stores.on(here.ledger._pool, ("10m",)).schema.migrate()
            if vouching:
                await here.vouching()

    async def contend(number):
        rng = random.Random(number)

        async def ask(here, attempt):
            names = rng.choices(range(25), k=6)
            mine = [decided(n, at + n, f"{number}{attempt:03}{i}") for i, n in enumerate(names)]
            standing = await here.settle(*mine)
            told[number] += zip(names, mine, standing, strict=True)

        async with side(environ) as here:
            together.wait(20)
            for attempt in range(0, 60, 4):
                await asyncio.gather(*(ask(here, attempt + i) for i in range(4)))

    asyncio.run(prepare())
    threads = [threading.Thread(target=asyncio.run, args=(contend(n),)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(some) for some in told] == [360, 360]
    for name in range(25):
        heard = [(mine, stands) for some in told for n, mine, stands in some if n == name]
        assert len({stands.pack() for _, stands in heard}) == 1
        assert sum(mine.trace_id == stands.trace_id for mine, stands in heard) == 1


async def test_the_same_identity_with_other_content_gets_what_stands(one, other):
    await one.vouching()
    at = now_ms()
    first, second = decided("a", at, "1", 1_000), decided("a", at, "2", 1_001)
    assert await one.settle(first) == await other.settle(second) == [first]
    assert first.differing(second.transaction) == "amount"


@pytest.mark.parametrize("version", [0, 1])
async def test_a_claim_of_either_version_stands_for_who_writes_the_other(environ, one, version):
    await one.vouching()
    at = now_ms()
    first, second = (decided("a", at, told_by) for told_by in "12")
    async with (
        side(environ, version=version) as writer,
        side(environ, version=1 - version) as other,
    ):
        assert await writer.settle(first) == await other.settle(second) == [first]
        [name] = await one.claimed_keys()
        assert (await one.redis.get(name)).startswith(b"{" if version else b"[")


async def test_a_claim_of_a_later_version_is_neither_replaced_nor_overlooked(one):
    await one.vouching()
    at = now_ms()
    first, second = (decided("a", at, told_by) for told_by in "12")
    later = first.pack().replace(b'"version":1', b'"version":2')
    await one.redis.set(claims.key(one.config, first.decision_id), later)
    assert await one.claimed.claim([second], now_ms(), set()) == [None]
    with pytest.raises(errors.StoreUnavailable, match="later version"):
        await one.settle(second)
    await one.ledger.write([first])
    assert await one.settle(second) == [first]


@pytest.mark.parametrize("door", [records.HTTP, records.STREAM])
async def test_what_was_decided_before_a_flush_is_found_in_postgres(one, other, door):
    await one.vouching()
    first = [decided(n, now_ms() - 1_000, "1", door=door) for n in range(20)]
    assert await one.settle(*first) == first
    await one.ledger.write(first)
    await one.redis.flushdb()
    again = [dataclasses.replace(record, trace_id="2" * 32) for record in first]
    assert await other.settle(*again) == first
    assert await one.settle(*again) == first


async def test_what_a_flush_met_on_its_way_to_postgres_is_waited_for(environ, one):
    await one.vouching()
    first = [decided(n, now_ms() - 1_000, "1") for n in range(20)]
    assert await one.settle(*first) == first
    await one.redis.flushdb()

    async def store_at_the_next_flush():
        await asyncio.sleep(1)
        await one.ledger.write(first)

    again = [dataclasses.replace(record, trace_id="2" * 32) for record in first]
    async with side(environ, flush_ms=1_000) as other:
        storing = asyncio.create_task(store_at_the_next_flush())
        assert await other.settle(*again) == first
        await storing


@pytest.fixture
def redis_of_its_own(machine, tmp_path):
    """Yield the address of a Redis, and what ends it hard and starts it from its last snapshot."""
    port = free_port()
    program = stack.redis.find(machine).path
    options = f"--port {port} --bind 127.0.0.1 --dbfilename kept.rdb --save".split()
    running = []

    def start():
        running.append(
            subprocess.Popen([program, *options, "", "--dir", tmp_path], stdout=subprocess.DEVNULL)
        )
        with redis.Redis(port=port) as client:
            eventually(client.ping)

    def restart():
        running[-1].kill()
        running[-1].wait(timeout=10)
        start()

    start()
    yield f"redis://127.0.0.1:{port}", restart
    running[-1].kill()
    running[-1].wait(timeout=10)


async def test_a_redis_that_has_gone_back_in_time_is_not_believed(environ, one, redis_of_its_own):
    url, restart = redis_of_its_own
    async with side(environ | {"REDIS_URL": url}) as before:
        await before.vouching()
        await before.redis.save()
        first = [decided(n, now_ms() - 1_000, "1") for n in range(20)]
        await before.settle(*first)
        await before.ledger.write(first)
        await asyncio.to_thread(restart)
        again = [dataclasses.replace(record, trace_id="2" * 32) for record in first]
        assert await before.settle(*again) == first


async def test_a_mark_that_is_lost_alone_makes_nothing_be_decided_twice(one, other):
    await one.vouching()
    at = now_ms() - 1_000
    records = [decided(n, at, "1") for n in range(400)]
    bucket = bucket_of(records[0])
    here = [record for record in records if bucket_of(record) == bucket]
    claimed, stored, unknown = here[0], here[1], here[2]
    elsewhere = next(record for record in records if bucket_of(record) != bucket)
    assert await one.settle(claimed) == [claimed]
    await one.ledger.write([stored, elsewhere])
    await one.redis.delete(one.mark(bucket))
    again = [
        dataclasses.replace(record, trace_id="2" * 32) for record in (claimed, stored, unknown)
    ]
    assert await other.settle(*again) == [claimed, stored, again[2]]
    # Who lost one mark will have lost claims of other buckets, too.
    assert await other.settle(dataclasses.replace(elsewhere, trace_id="2" * 32)) == [elsewhere]


async def test_when_neither_store_can_vouch_nothing_is_decided(environ, one):
    await one.vouching()
    first = decided("a", now_ms() - 1_000, "1")
    await one.settle(first)
    await one.redis.flushdb()
    away = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x"}
    async with side(environ | away) as alone:
        with pytest.raises(errors.StoreUnavailable):
            await alone.settle(dataclasses.replace(first, trace_id="2" * 32))
    assert await one.claimed_keys() == []


# From the judgement that a transaction is young, or from its look-up, to the claim.
WAIT_MS = 20_000


@pytest.mark.parametrize("ahead_ms", [-5_000, 0, 50_000])
@pytest.mark.parametrize("door", [records.HTTP, records.STREAM])
async def test_while_anyone_may_take_a_transaction_for_young_its_claim_is_there(
    environ, one, ahead_ms, door
):
    async with side(environ, claim_ms=60_000, max_future_skew_ms=50_000) as brief:
        await brief.vouching()
        paid = decided("a", now_ms() + ahead_ms, "1", door=door)
        assert await brief.settle(paid) == [paid]
        [key] = await brief.claimed_keys()
        gone_ms = now_ms() + await brief.redis.pttl(key)
        assert brief.claimed.old(paid.transaction, gone_ms - WAIT_MS)
        assert not brief.claimed.old(paid.transaction, now_ms())


async def test_a_claim_of_the_stream_lasts_while_its_write_is_tried_again(one):
    await one.vouching()
    paid = decided("a", now_ms() - 3_600_000, "1", door=records.STREAM)
    for _ in range(3):
        standing = await one.claimed.settle([paid], now_ms(), {paid.decision_id})
        assert standing == [paid]
        [key] = await one.claimed_keys()
        left_ms = await one.redis.pttl(key)
        assert WAIT_MS < left_ms < one.config.decisions.claim_ms / 10
        await one.redis.pexpire(key, 500)  # as when a while has passed
    later = dataclasses.replace(paid, door=records.HTTP, trace_id="2" * 32)
    assert await one.claimed.settle([later], now_ms(), {paid.decision_id}) == [paid]


@pytest.fixture
async def served(environ):
    served = Served(environ)
    yield served
    await served.close()


async def test_a_decision_whose_claim_has_run_out_is_looked_up(served):
    await served.migrated()
    await served.live()
    hand = in_hand(1, NOW_MS)
    first = await served.ask(**hand)
    await served.postgres.ledger.write([first.record])
    served.now_ms += served.config.decisions.claim_ms + 60_000
    await served.forget()
    await served.credit(1, 500, at_ms=served.now_ms)
    again = await served.ask(**hand)
    assert (again.record, again.replayed) == (first.record, True)
    with pytest.raises(errors.Conflict, match="amount"):
        await served.ask(**hand | {"amount": 1})
    unknown = await served.ask(**hand | {"transaction_id": "t2"})
    assert not unknown.replayed


async def test_a_transaction_that_may_have_been_decided_is_not_while_postgres_is_away(
    environ, served
):
    away = Served(environ | {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x"})
    await served.live()
    served.now_ms = away.now_ms = NOW_MS + served.config.decisions.claim_ms
    with pytest.raises(errors.DecisionsUnavailable):
        await away.ask(**in_hand(1, NOW_MS))
    assert (await away.ask(**in_hand(1, away.now_ms))).record.decision.probability > 0
    assert (await away.ask(user_id=1)).record.transaction is None
    await away.close()


# Both doors.


def in_hand(user_id, at_ms, **more):
    stamp = transactions.format_ms(at_ms)
    return {"transaction_id": "t1", "user_id": user_id, "amount": 10.0, "timestamp": stamp} | more


def answer(predictor, document):
    return predictor.predict(predictor.parse(document))


@pytest.mark.parametrize("first", [records.HTTP, records.STREAM])
async def test_a_transaction_at_both_doors_has_the_decision_of_the_first(environ, first):
    async with world(environ | {"CERBERUS_PARTITIONS": "2"}) as here:
        kept, users, at = [], range(1000, 1010), now_ms() - 1_000
        predictor = here.predictor(kept.append)
        hands = [in_hand(user, at + user) for user in users]
        names = [transactions.decision_id(user, "t1", at + user) for user in users]

        async def ask():
            return await asyncio.gather(*(answer(predictor, hand) for hand in hands))

        async def stored():
            found = [await here.postgres.ledger.get(name) for name in names]
            return None not in found and found

        async with running(one := here.consumer()):
            await until(lambda: live(one, partitions=2), "all is caught up")
            early = await ask() if first == records.HTTP else []
            await here.publish([(u, payment(1, u, at + u), at + u) for u in users])
            standing = await until(stored, "the stream has decided")
            answers = early + await ask()
        shown = await here.published()
    name = operator.attrgetter("decision_id")
    assert [record.door for record in standing] == [first] * 10
    assert [p.record for p in answers] == standing * (len(answers) // 10)
    assert [p.replayed for p in answers] == [False] * len(early) + [True] * 10
    assert sorted(kept, key=name) == sorted((p.record for p in answers), key=name)
    assert shown.keys() == {str(name) for name in names}
    for record in standing:
        told = orjson.loads(orjson.dumps(record.public()))
        assert all(each == told for each in shown[str(record.decision_id)])


async def test_the_stream_keeps_a_decision_that_was_taken_on_other_content_and_counts_it(environ):
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as here:
        at = now_ms() - 1_000
        predictor = here.predictor([].append)
        first = await answer(predictor, in_hand(1000, at, amount=11.0))
        async with running(one := here.consumer()):
            await here.publish([(1000, payment(1, 1000, at, 10.0), at)])
            stored = await until(
                lambda: here.postgres.ledger.get(first.record.decision_id), "the stream is through"
            )
            await until(lambda: live(one, partitions=1), "all is caught up")
            row = await here.certain(1000, at)
        with pytest.raises(errors.Conflict, match="amount"):
            await answer(predictor, in_hand(1000, at, amount=10.0))
    assert stored == first.record
    assert one._sink.otherwise == 1
    assert row.stats == (window.WindowStats(1, 1_000),)  # the window is the log's alone


TOLD = (
    "decision_id",
    "user_id",
    "transaction_id",
    "decision",
    "prediction",
    "probability",
    "features",
    "as_of",
    "degraded",
    "approximate",
    "fence",
    "model_version",
    "policy_version",
)


async def test_clients_of_two_processes_and_the_stream_at_once_get_one_decision_each(environ):
    rng = random.Random(31)
    environ |= {
        "CERBERUS_RATE": "0",
        "CERBERUS_PARTITIONS": "2",
        "CERBERUS_MAX_STALENESS_S": "600",
        "CERBERUS_READ_TIMEOUT_MS": "5000",
    }
    async with world(environ) as here:
        with service(environ) as one, service(environ) as two:
            for each in (one, two):
                await asyncio.to_thread(each.wait_until_ready)
            hands, told = {}, collections.defaultdict(list)

            async def ask(http, document):
                await asyncio.sleep(rng.uniform(0, 0.6))
                port = rng.choice((one.port, two.port))
                url = f"http://127.0.0.1:{port}/predict"

                async def answered():
                    response = await http.post(url, json=document)
                    return None if response.status_code == 503 else response

                response = await until(answered, "an answer comes")
                told[document["transaction_id"]].append((document, response))

            async def deliver(document, at):
                await asyncio.sleep(rng.uniform(0, 0.6))
                user = document["user_id"]
                await here.publish([(user, orjson.dumps(document), at)])

            async with httpx.AsyncClient(timeout=20) as http:
                for turn in range(4):
                    work, now = [], now_ms()
                    for i in range(40):
                        at = now + rng.choice((-1_000, -30_000, -500_000, 50_000))
                        hand = in_hand(rng.randrange(1000, 1008), at, transaction_id=f"{turn}.{i}")
                        hands[hand["transaction_id"]] = hand
                        others = [hand | {"amount": 10.01}] * (i % 8 == 0)
                        work += [ask(http, h) for h in [hand] * rng.randint(0, 4) + others]
                        work.append(deliver(hand, now))
                    rng.shuffle(work)
                    await asyncio.gather(*work)
            names = {
                transactions.decision_id(
                    hand["user_id"], name, transactions.parse_timestamp(hand)
                ): name
                for name, hand in hands.items()
            }

            async def stored():
                found = [await here.postgres.ledger.get(name) for name in names]
                return None not in found and found

            standing = await until(stored, "all is decided and stored")
            assert {one.end()[0], two.end()[0]} <= {0, -15, 143}
        shown = await here.published()
        assert await here.pool.fetchval("SELECT count(*) FROM decisions") == len(names)
    assert shown.keys() == {str(name) for name in names}
    doors = collections.Counter()
    for record in standing:
        doors[record.door] += 1
        public = orjson.loads(orjson.dumps(record.public()))
        assert all(each == public for each in shown[str(record.decision_id)])
        first = 0
        for document, response in told[names[record.decision_id]]:
            body = response.json()
            if document["amount"] != public["amount"]:
                assert (response.status_code, body["field"]) == (409, "amount")
            else:
                assert {k: body[k] for k in TOLD} == {k: public[k] for k in TOLD}
                first += not body["replayed"]
        assert first == (record.door == records.HTTP)
    assert min(doors.values()) > 10  # both doors came first at times


async def test_a_decision_that_the_topic_has_shown_is_the_one_that_postgres_gets(
    environ, servers, monkeypatch
):
    monkeypatch.setattr(postgres_pool, "QUERY_S", 1)
    monkeypatch.setattr(claims, "_MARGIN_MS", 300)  # an outage is longer than any claim
    async with world(environ | {"CERBERUS_PARTITIONS": "1"}) as here:
        at = now_ms() - 1_000
        async with running(one := here.consumer()):
            await until(lambda: live(one, partitions=1), "all is caught up")
            locked = await asyncpg.connect(here.config.postgres.url)
            await locked.execute("BEGIN; LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE")
            await here.publish([(1000, payment(1, 1000, at), at)])
            await until(lambda: "store" in one.problems, "the write is not acknowledged")
            await asyncio.to_thread(servers.postgres.stop)
            locked.terminate()
            await asyncio.sleep(0.5)
            await asyncio.to_thread(servers.postgres.start)
            stored = await until(
                lambda: here.postgres.ledger.get(transactions.decision_id(1000, "t1", at)),
                "the decision is stored",
            )
            await until(lambda: live(one, partitions=1) and not one.problems, "all is well")
        [shown] = (await here.published()).values()
    assert all(told == orjson.loads(orjson.dumps(stored.public())) for told in shown)
