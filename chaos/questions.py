"""What is asked while records flow, and whether the answers are right."""

import asyncio
import collections
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from chaos import cluster, compare, oracle, traffic

UNSEEN_S = 6.0
"""A record acknowledged this long before a question must be in its answer, or the answer says that
it may not be: 5 s of staleness, and a second in which the number of partitions may go unnoticed."""
_ASK_S = 5.0
_OUTCOMES = {0: "connection refused or broken", -1: "no answer in 5 s", 503: "503"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and what came of it; times are wall clock, s.

    Attributes:
        sent_s: When it was asked.
        received_s: When the answer was there.
        payment: The transaction in hand; None when a user alone was asked about.
        status: Of HTTP; 0 when the connection was refused or broke, -1 when no answer came in time.
        body: Of the answer.
    """

    sent_s: float
    received_s: float
    user_id: int
    payment: traffic.Payment | None
    status: int
    body: dict[str, Any]

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why the answer may be wrong, as it says."""
        return tuple(self.body.get("degraded", ()))


class Asker:
    """Asks `rate` questions a second, of one instance after the other, until cancelled.

    Attributes:
        answers: All that came back, in order of their end.
        publisher: Whose payments are asked about.
    """

    def __init__(
        self,
        target: cluster.Cluster,
        users: Sequence[int],
        rng: random.Random,
        publisher: traffic.Publisher,
        rate: float = 50.0,
    ) -> None:
        self.answers: list[Answer] = []
        self.publisher = publisher
        self._target = target
        self._users = users
        self._rng = rng
        self._rate = rate

    async def run(self) -> None:
        """Ask until cancelled; a slow answer delays no other question."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
        async with (
            httpx.AsyncClient(timeout=_ASK_S, limits=limits) as client,
            asyncio.TaskGroup() as group,
        ):
            next_s = time.monotonic()
            while True:
                for instance in self._target.instances:
                    next_s = max(next_s + 1 / self._rate, time.monotonic() - 1)
                    await asyncio.sleep(next_s - time.monotonic())
                    url = f"http://127.0.0.1:{instance.port}/predict"
                    group.create_task(self._ask(client, url))

    async def _ask(self, client: httpx.AsyncClient, url: str) -> None:
        question, payment = self._question()
        sent_s, status, body = time.time(), 0, {}
        try:
            answer = await client.post(url, json=question)
            status, body = answer.status_code, answer.json()
        except httpx.TimeoutException:
            status = -1
        except httpx.TransportError:
            pass
        self.answers.append(Answer(sent_s, time.time(), question["user_id"], payment, status, body))

    def _question(self) -> tuple[dict[str, Any], traffic.Payment | None]:
        rng, draw, now = self._rng, self._rng.random(), traffic.now_ms()
        user_id = rng.choice(self._users)
        if draw < 0.6:
            return {"user_id": user_id}, None
        if draw < 0.7:
            return {
                "user_id": user_id,
                "timestamp": traffic.stamp(now - rng.randrange(5_000)),
            }, None
        payment = traffic.Payment(user_id, f"q{rng.getrandbits(64)}", now, rng.randrange(1_000_000))
        if draw < 0.85 and self.publisher.recent:
            payment = rng.choice(self.publisher.recent)
            if payment.at_ms > now:
                payment = payment._replace(at_ms=now)
        return payment.document(), payment


@dataclass(frozen=True, slots=True)
class Life:
    """One life of the topic.

    Attributes:
        log: All that was in it.
        acked_s: When each record was acknowledged, wall clock, by (partition, offset).
        epoch: The greatest that its fences have.
        began_s: When it was made.
    """

    log: compare.Log
    acked_s: Mapping[tuple[int, int], float]
    epoch: int
    began_s: float


def answers(
    target: cluster.Cluster, given: Iterable[Answer], lives: Sequence[Life]
) -> tuple[collections.Counter[str], compare.Findings]:
    """Compare every answer that does not say `degraded` with the log that its fence is of.

    Returns:
        How many there were by outcome, and what the comparison found.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    found = compare.Findings()
    for answer in given:
        if answer.status != 200:
            outcomes[_OUTCOMES.get(answer.status, f"status {answer.status}")] += 1
            if answer.status not in _OUTCOMES:
                found.equal("answer", answer.body, 200, answer.status)
        elif answer.degraded:
            outcomes["degraded"] += 1
            outcomes.update(f"degraded: {reason}" for reason in answer.degraded)
        else:
            outcomes["exact"] += 1
            _exact(target, answer, lives, found)
    return outcomes, found


def _exact(
    target: cluster.Cluster, answer: Answer, lives: Sequence[Life], found: compare.Findings
) -> None:
    body, fence = answer.body, answer.body["fence"]
    what = f"{answer.user_id} as of {body['as_of']} at {fence}, asked at {answer.sent_s:.3f}"
    if target.credit:
        score = cluster.credit_score(answer.user_id)
        found.equal("answered credit score", what, score, body["features"]["credit_score"])
    # A life that began a moment ago may not be known yet; the one before it may be answered from.
    begun = [life for life in lives if life.began_s < answer.received_s]
    known = sum(life.began_s < answer.sent_s - UNSEEN_S for life in begun)
    possible = begun[max(0, known - 1) :]
    if fence is not None:
        possible = [life for life in possible if fence["epoch"] <= life.epoch][:1]
    held = [_held(answer, life) for life in possible] or [("an older life of the topic", None)]
    expected, got = next((pair for pair in held if pair[0] == pair[1]), held[-1])
    found.equal("answer", what, expected, got)


def _held(answer: Answer, life: Life) -> tuple[Any, Any]:
    """Return what an answer had to be by one life of the topic, and what it was."""
    body, fence, payment = answer.body, answer.body["fence"], answer.payment
    until_ms = oracle.to_ms(body["as_of"])
    after_ms = until_ms - compare.RULES.span_ms
    stats, seen = oracle.Stats(0, 0), (-1, 0)
    if fence is not None:
        seen = fence["partition"], fence["offset"]
        stats = life.log[seen[0]].stats(
            answer.user_id, after_ms, until_ms, seen[1], payment and payment.name
        )
    if payment is not None:
        stats = oracle.Stats(stats.count + 1, stats.cents + payment.cents)
    missed = []
    for number, part in life.log.items():
        if (user := part.users.get(answer.user_id)) is None:
            continue
        for offset in user.offsets[user.inside(after_ms, until_ms, part.end)].tolist():
            unseen = number != seen[0] or offset >= seen[1]
            age_s = answer.sent_s - life.acked_s.get((number, offset), answer.sent_s)
            if unseen and age_s > UNSEEN_S:
                missed.append(f"missed {number}:{offset}, {age_s:.1f} s old")
    return (*stats, []), (*compare.shown(body["features"]), missed)
