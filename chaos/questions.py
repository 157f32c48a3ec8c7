"""Requests that are sent while records flow, and the check of their answers."""

import asyncio
import collections
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from cerberus import transactions
from chaos import cluster, compare, oracle, service, traffic

UNSEEN_S = 6.0
"""A record acknowledged this long before a question must be in the answer, unless the answer is
marked as degraded: 5 s of staleness, and 1 s until a new number of partitions is noticed."""
KILL_S = 2.0
"""A decision that was answered this long before its instance was killed must be stored: 200 ms
until it is sent to the stores, and the time that a busy machine takes to store it."""
LIMITS = httpx.Limits(
    max_connections=None,
    max_keepalive_connections=50,
    keepalive_expiry=2.0,  # before the servers' 5 s, or a question could meet a closing connection
)
_ASK_S = 5.0
_OUTCOMES = {
    0: "connection refused or broken",
    -1: "no answer in 5 s",
    409: "409, decided with another amount",
    503: "503",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and its answer; times are wall clock, s.

    Attributes:
        instance: The instance that was asked.
        sent_s: When the question was sent.
        received_s: When the answer arrived.
        user_id: The user that it was about.
        payment: The transaction in hand; None for a question about a user alone.
        status: HTTP status; 0 when the connection was refused or broke, -1 after a timeout.
        body: Body of the answer.
    """

    instance: service.Instance
    sent_s: float
    received_s: float
    user_id: int
    payment: traffic.Payment | None
    status: int
    body: dict[str, Any]

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why the answer may be inexact, as the answer itself says."""
        return tuple(self.body.get("degraded", ()))


class Asker:
    """Sends `rate` questions a second to one instance after the other, until cancelled.

    Attributes:
        answers: All answers, in order of arrival.
        asked: The transactions in hand, answered or not.
        publisher: The publisher whose payments are asked about.
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
        self.asked: set[traffic.Payment] = set()
        self.publisher = publisher
        self._target = target
        self._users = users
        self._rng = rng
        self._rate = rate

    async def run(self) -> None:
        """Ask until cancelled; a slow answer delays no other question."""
        async with (
            httpx.AsyncClient(timeout=_ASK_S, limits=LIMITS) as client,
            asyncio.TaskGroup() as group,
        ):
            next_s = time.monotonic()
            while True:
                for instance in self._target.instances:
                    next_s = max(next_s + 1 / self._rate, time.monotonic() - 1)
                    await asyncio.sleep(next_s - time.monotonic())
                    group.create_task(self.ask(client, instance, *self._question()))

    async def ask(
        self,
        client: httpx.AsyncClient,
        instance: service.Instance,
        question: dict[str, Any],
        payment: traffic.Payment | None,
    ) -> Answer:
        """Ask one instance once; the answer is also appended to `answers`."""
        if payment is not None:
            self.asked.add(payment)
        url = f"http://127.0.0.1:{instance.port}/predict"
        sent_s, status, body = time.time(), 0, {}
        try:
            response = await client.post(url, json=question)
            status, body = response.status_code, response.json()
        except httpx.TimeoutException:
            status = -1
        except httpx.TransportError:
            pass
        user_id = question["user_id"]
        answer = Answer(instance, sent_s, time.time(), user_id, payment, status, body)
        self.answers.append(answer)
        return answer

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
        log: Its whole log.
        acked_s: When each record was acknowledged, wall clock, by (partition, offset).
        epoch: The greatest epoch of its fences.
        began_s: When it was created, wall clock.
    """

    log: compare.Log
    acked_s: Mapping[tuple[int, int], float]
    epoch: int
    began_s: float


def answers(
    target: cluster.Cluster, given: Iterable[Answer], lives: Sequence[Life]
) -> tuple[collections.Counter[str], compare.Findings]:
    """Compare every answer that is not marked as degraded with the log that its fence refers to.

    Returns:
        The number of answers by outcome, and the findings.
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
    # An instance may not know yet of a life that has just begun, and answer from the one before.
    begun = [life for life in lives if life.began_s < answer.received_s]
    known = sum(life.began_s < answer.sent_s - UNSEEN_S for life in begun)
    possible = begun[max(0, known - 1) :]
    if fence is not None:
        possible = [life for life in possible if fence["epoch"] <= life.epoch][:1]
    pairs = [held(answer, life) for life in possible] or [("an older life of the topic", None)]
    expected, got = next((pair for pair in pairs if pair[0] == pair[1]), pairs[-1])
    found.equal("answer", what, expected, got)


def held(answer: Answer, life: Life) -> tuple[Any, Any]:
    """Return the answer that one life of the topic demands, and the actual one."""
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
            if unseen and age_s > UNSEEN_S and not body["replayed"]:
                missed.append(f"missed {number}:{offset}, {age_s:.1f} s old")
    return (*stats, []), (*compare.shown(body["features"]), missed)


async def kept(target: cluster.Cluster, asker: Asker) -> tuple[int, compare.Findings]:
    """Compare the answers with the decisions that are stored and published.

    There is one answer for each transaction, and it is kept unless its instance was killed right
    afterwards.

    Returns:
        How many answers were lost to a kill, and the findings.
    """
    stored, told = await compare.decided(target), await compare.published(target)
    found, lost = compare.Findings(), 0
    for answer in asker.answers:
        if answer.status == 409 and answer.payment is not None:
            name = str(transactions.decision_id(*answer.payment[:3]))
            found.equal("refused answer", name, True, stored[name].cents != answer.payment.cents)
        if answer.status != 200:
            continue
        body = answer.body
        name, fence = body["decision_id"], body["fence"]
        value = (*compare.shown(body["features"]), fence and fence["offset"])
        # An answer that was in transit when its instance was killed arrives after the kill.
        later_s = [s - answer.received_s for s in answer.instance.killed_s if s >= answer.sent_s]
        killed_s = min(later_s, default=float("inf"))
        killed = killed_s < KILL_S
        what = f"{name} by {answer.instance.name}, {killed_s:.1f} s before its kill"
        decision = stored.get(name)
        if decision is None and killed:
            lost += 1
            continue
        found.equal("kept answer", what, value, decision and decision.value)
        if not (killed and name not in told):
            found.equal("published answer", what, {value}, told.get(name))
    asked = {(each.user_id, each.name, each.at_ms) for each in asker.asked}
    for name, decision in stored.items():
        # A client that asks about a user alone learns the decision's id only from the answer.
        if decision.door == "http" and decision.identity not in asked and decision.named:
            found.equal("kept answer", name, None, decision.value)
    return lost, found
