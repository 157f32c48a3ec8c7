"""A seeded stream of transactions, valid and invalid."""

import asyncio
import collections
import contextlib
import datetime
import json
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiokafka.errors import KafkaError

from cerberus import transactions
from chaos import cluster, swelling

_TICK_S = 0.02
_SPAN_MS, _KEEP_MS, _SKEW_MS = 20_000, 30_000, 5_000


def now_ms() -> int:
    """Return the wall clock, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000


def stamp(at_ms: int) -> str:
    """Write ms since the Unix epoch as RFC 3339."""
    moment = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Payment(NamedTuple):
    """A transaction that is published or asked about."""

    user_id: int
    name: str
    at_ms: int
    cents: int

    def document(self, **more: Any) -> dict[str, Any]:
        """Return its JSON object, with further fields."""
        return {
            "user_id": self.user_id,
            "transaction_id": self.name,
            "timestamp": stamp(self.at_ms),
            "amount": self.cents / 100,
        } | more


class Publisher:
    """Sends `total` records, at a rate that others set, until all are acknowledged or have failed.

    Of the records, 5 % are duplicates (half of them with a new timestamp, a tenth with another
    amount), 10 % are late within the lateness, 1 % are expired, 0.5 % are poison, and 0.5 % are
    ahead of the clock.

    Args:
        target: The cluster whose topic receives the records.
        users: The users who pay.
        total: How many records to send.
        rng: Makes all random choices.
        name: Prefix of the transactions' ids.

    Attributes:
        rate: Records a second.
        sent: How many records were passed to a producer.
        failed: How many were not acknowledged.
        acked_s: Wall time of each acknowledgement, by (partition, offset).
        recent: The payments that were published last.
        given: Payments to send before random ones.
    """

    def __init__(
        self,
        target: cluster.Cluster,
        users: Sequence[int],
        total: int,
        rng: random.Random,
        name: str = "t",
    ) -> None:
        self.rate = 0.0
        self.sent = self.failed = 0
        self.total = total
        self.acked_s: dict[tuple[int, int], float] = {}
        self.recent: collections.deque[Payment] = collections.deque(maxlen=500)
        self.given: collections.deque[Payment] = collections.deque()
        self._target = target
        self._users = users
        self._rng = rng
        self._name = name
        self._broken = False
        self._unlike_s = 0.0

    def forget(self, for_s: float) -> None:
        """Send no duplicate of records from before `for_s` seconds from now.

        While users move between partitions, a duplicate may go to another partition than its
        original. There, by rule, it is the first record of a transaction.
        """
        self._unlike_s = time.monotonic() + for_s

    async def run(self) -> None:
        """Send all records; a producer that fails is replaced."""
        while self.sent < self.total:
            producer = self._target.producer()
            try:
                async with asyncio.timeout(10):
                    await producer.start()
                self._broken = False
                await self._send(producer)
            except (TimeoutError, OSError, KafkaError):
                await asyncio.sleep(0.2)
            finally:
                with contextlib.suppress(TimeoutError, OSError, KafkaError):
                    async with asyncio.timeout(10):
                        await producer.stop()

    async def backlog(self, from_ms: int, until_ms: int) -> None:
        """Send all records at once, with timestamps spread evenly between two moments."""
        async with self._target.producer() as producer:
            for sent in range(self.total):
                now = from_ms + (until_ms - from_ms) * sent // self.total
                user_id, value = self._draw(now)
                acknowledged = await producer.send(
                    self._target.topic, value, key=b"%d" % user_id, timestamp_ms=now
                )
                acknowledged.add_done_callback(self._acknowledged)
                self.sent += 1

    async def swell(self, batches: int, records: int) -> None:
        """Send batches of long payments to one partition, each with one that is too long."""
        count = len(await self._target.ends())
        home = self._rng.randrange(count)
        users = [u for u in self._users if transactions.partition_of(u, count) == home]
        now = now_ms()

        def batch(number: int) -> list[swelling.Record]:
            some = []
            for at in range(records):
                user_id = self._rng.choice(users)
                paid = Payment(user_id, f"swollen{self.sent}-{number}-{at}", now, 1_000 + at)
                size = swelling.TOO_LONG if at == records // 2 else swelling.PAD_BYTES
                some.append((b"%d" % user_id, swelling.padded(paid.document(), size), now))
            return some

        some = map(batch, range(batches))
        await swelling.publish(self._target.servers.kafka.url, self._target.topic, home, some)

    async def _send(self, producer: Any) -> None:
        due, before_s = 0.0, time.monotonic()
        while self.sent < self.total and not self._broken:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            due = min(due + self.rate * (now_s - before_s), self.rate)
            before_s = now_s
            while due >= 1 and self.sent < self.total and not self._broken:
                due -= 1
                now = now_ms()
                user_id, value = self._draw(now)
                async with asyncio.timeout(10):
                    sent = await producer.send(self._target.topic, value, key=b"%d" % user_id)
                self.sent += 1
                sent.add_done_callback(self._acknowledged)

    def _acknowledged(self, sent: "asyncio.Future[Any]") -> None:
        if sent.cancelled() or sent.exception() is not None:
            self.failed += 1
            self._broken = True
        else:
            place = sent.result()
            self.acked_s[place.partition, place.offset] = time.time()

    def _draw(self, now: int) -> tuple[int, bytes | None]:
        rng = self._rng
        if self.given:
            payment = self.given.popleft()
            return payment.user_id, json.dumps(payment.document()).encode()
        user_id = rng.choice(self._users)
        payment = Payment(user_id, f"{self._name}{self.sent}", now, rng.randrange(1, 1_000_000))
        if time.monotonic() < self._unlike_s:
            self.recent.clear()
        draw = rng.random()
        if draw < 0.05 and self.recent:
            payment = rng.choice(self.recent)
            if draw < 0.025:
                payment = payment._replace(at_ms=now)
            elif draw < 0.03:
                payment = payment._replace(cents=payment.cents + 1)
        elif draw < 0.15:
            payment = payment._replace(at_ms=now - rng.randrange(5_000))
        elif draw < 0.16:
            payment = payment._replace(at_ms=now - _KEEP_MS - rng.randrange(5_100, 60_000))
        elif draw < 0.165:
            return user_id, self._poison(payment)
        elif draw < 0.17:
            payment = payment._replace(at_ms=now + rng.randrange(3_000))
        self.recent.append(payment)
        more = {"merchant_id": f"m{rng.randrange(50)}"}
        return payment.user_id, json.dumps(payment.document(**more)).encode()

    def _poison(self, payment: Payment) -> bytes | None:
        broken = payment.document() | self._rng.choice(
            (
                {"amount": -1.0},
                {"amount": 1.001},
                {"amount": "1"},
                {"user_id": None},
                {"transaction_id": 7.5},
                {"timestamp": "yesterday"},
                {"timestamp": stamp(payment.at_ms + _SKEW_MS + 1_000)},
            )
        )
        return self._rng.choice((None, b"", b"{", b"[]", *[json.dumps(broken).encode()] * 4))
