"""Comparison of the stores with the log: exact integers, no tolerance."""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cerberus import kafka
from cerberus.features import declared
from cerberus.features import packed as packed_windows
from cerberus.online import layout
from chaos import cluster, oracle

RULES = oracle.Rules()
Log = Mapping[int, oracle.Partition]
_WINDOW = declared.of_window("20s")
_JSON = ("features", "latency_ms")
_PUBLISHED = """
SELECT decision_id::text, as_of_ms, user_id, transaction_id, amount_minor, currency, merchant_id,
    door, features, degraded, approximate, score, probability, prediction, decision, model_sha256,
    policy_sha256, fence_epoch, fence_offset, fence_partition, latency_ms, trace_id,
    (extract(epoch FROM decided_at) * 1000)::bigint
FROM decisions
"""


@dataclass(slots=True)
class Findings:
    """What a comparison found.

    Attributes:
        compared: How many values were compared, by kind.
        lost: How many effects of the log a store lacks.
        doubled: How many effects a store counts more often than the log.
        differences: One sentence for each difference.
    """

    compared: collections.Counter[str] = field(default_factory=collections.Counter)
    lost: int = 0
    doubled: int = 0
    differences: list[str] = field(default_factory=list)

    def equal(self, kind: str, what: object, expected: Any, found: Any) -> None:
        """Compare one value; None means that there is none."""
        self.compared[kind] += 1
        if expected == found:
            return
        self.lost += found is None
        self.doubled += _count(found) > _count(expected)
        self.differences.append(f"{kind} of {what}: expected {expected}, found {found}")

    def among(self, kind: str, what: object, expected: set[Any], found: Any) -> None:
        """Compare with several values that may be right, one from each partition that has it."""
        self.equal(kind, what, found if found in expected else min(expected), found)


def _count(value: Any) -> int:
    return value[0] if isinstance(value, tuple) and value and isinstance(value[0], int) else 0


async def read_log(target: cluster.Cluster) -> Log:
    """Read the whole topic, deleted records included, into one oracle for each partition."""
    found = {}
    for number, records in (await target.log(kafka.TRANSACTIONS)).items():
        told = [(r.offset, r.timestamp, r.value) for r in records]
        found[number] = oracle.Partition(RULES, told)
        if gone := target.removed.get(number):
            found[number].short = oracle.Partition(RULES, told[len(gone) :])
    return found


async def stores(target: cluster.Cluster, lives: Sequence[Log]) -> Findings:
    """Compare every effect of every life of the topic; online rows with the last life only."""
    found = Findings()
    everything = list(itertools.chain.from_iterable(life.items() for life in lives))
    await _facts(target, everything, found)
    await _decided(target, everything, found)
    await _dead_letters(target, everything, found)
    await _rows(target, lives[-1], found)
    return found


async def _facts(
    target: cluster.Cluster, logs: Iterable[tuple[int, oracle.Partition]], found: Findings
) -> None:
    expected: dict[Any, set[Any]] = collections.defaultdict(set)
    for number, log in logs:
        for identity, event in log.first.items():
            expected[identity].add((1, number, event.offset, event.cents))
    stored = await target.pool.fetch(
        "SELECT user_id, transaction_id, event_ms, partition, log_offset, amount_minor "
        "FROM transactions"
    )
    got = {tuple(r)[:3]: (1, *tuple(r)[3:]) for r in stored}
    for identity, values in expected.items():
        found.among("fact", identity, values, got.pop(identity, None))
    for identity, value in got.items():
        found.equal("fact", identity, None, value)


async def _decided(
    target: cluster.Cluster, logs: Iterable[tuple[int, oracle.Partition]], found: Findings
) -> None:
    decisions: dict[Any, set[Any]] = collections.defaultdict(set)
    history: dict[Any, set[Any]] = collections.defaultdict(set)
    for _, log in logs:
        for event, stats in log.decisions():
            decisions[event.identity].add((*stats, event.offset + 1))
            moment = event.at_ms * 1000 + min(event.rank, 999)
            history[event.user_id, moment].add((*stats, event.offset + 1))
    stored = await decided(target)
    _add_short(logs, {d.identity for d in stored.values() if d.degraded}, decisions, history)
    found.equal("decision", "all names", len(stored), len({d.identity for d in stored.values()}))
    streamed = {d.identity: d.value for d in stored.values() if d.door == "stream"}
    # Decisions that a request made first are compared with its answer.
    asked = {d.identity for d in stored.values() if d.door == "http"}
    found.compared["decision"] += len(decisions.keys() & asked)
    _each("decision", {k: v for k, v in decisions.items() if k not in asked}, streamed, found)
    rows = await target.pool.fetch(
        "SELECT user_id, (extract(epoch FROM event_timestamp) * 1000000)::bigint, "
        f"{_WINDOW.transaction_count.name}, round({_WINDOW.total_amount.name} * 100)::bigint, "
        "log_offset FROM user_transaction_stats"
    )
    _each("history row", history, {tuple(r)[:2]: tuple(r)[2:] for r in rows}, found)
    told = await published(target)
    for name, decision in stored.items():
        # A rebuilt life publishes again: each id must be there, always with the same content.
        if decision.identity in decisions:
            found.equal("published decision", decision.identity, {decision.value}, told.get(name))


def _add_short(
    logs: Iterable[tuple[int, oracle.Partition]],
    doubted: set[tuple[int, str, int]],
    decisions: dict[Any, set[Any]],
    history: dict[Any, set[Any]],
) -> None:
    """Add what an owner that began after a deletion knew; its decision must say `degraded`.

    A history row has no column for a doubt.
    """
    for short in (log.short for _, log in logs if log.short):
        for event, stats in short.decisions():
            value = (*stats, event.offset + 1)
            if event.identity in doubted and event.identity in decisions:
                decisions[event.identity].add(value)
            history[event.user_id, event.at_ms * 1000 + min(event.rank, 999)].add(value)


@dataclass(frozen=True, slots=True)
class Decided:
    """One row of table `decisions`.

    Attributes:
        identity: User, transaction and event time; the decision's id replaces a missing
            transaction.
        named: Whether there was a transaction.
        door: "stream" or "http".
        cents: Amount of the transaction.
        value: Count and cents as served, and the offset where their prefix ends.
        decided_s: When the decision was made, wall clock.
        degraded: Whether it says that it may be inexact.
    """

    identity: tuple[int, str, int]
    named: bool
    door: str
    cents: int | None
    value: tuple[int, int, int | None]
    decided_s: float
    degraded: bool


async def decided(target: cluster.Cluster) -> dict[str, Decided]:
    """Read table `decisions`, by decision id."""
    rows = await target.pool.fetch(
        "SELECT decision_id::text, user_id, coalesce(transaction_id, decision_id::text), as_of_ms, "
        "door, amount_minor, features, fence_offset, extract(epoch FROM decided_at)::float8, "
        "cardinality(degraded) > 0 FROM decisions"
    )
    return {
        name: Decided((user, txn, ms), txn != name, door, cents, (*shown(json.loads(v)), at), s, d)
        for name, user, txn, ms, door, cents, v, at, s, d in rows
    }


async def published(target: cluster.Cluster) -> dict[str, set[Any]]:
    """Read topic `decisions`: the values under each decision id."""
    found: dict[str, set[Any]] = collections.defaultdict(set)
    for record in itertools.chain.from_iterable((await target.log(kafka.DECISIONS)).values()):
        told = json.loads(record.value)
        offset = told["fence"] and told["fence"]["offset"]
        found[told["decision_id"]].add((*shown(told["features"]), offset))
    return found


def _each(kind: str, expected: dict[Any, set[Any]], got: dict[Any, Any], found: Findings) -> None:
    for key, values in expected.items():
        found.among(kind, key, values, got.pop(key, None))
    for key, value in got.items():
        found.equal(kind, key, None, value)


def shown(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return count and cents as the API shows them; -1 when they were unavailable."""
    total = values[_WINDOW.total_amount.public]
    return (
        (-1, -1)
        if total is None
        else (values[_WINDOW.transaction_count.public], round(total * 100))
    )


async def _dead_letters(
    target: cluster.Cluster, logs: Iterable[tuple[int, oracle.Partition]], found: Findings
) -> None:
    expected = {(p, offset, value) for p, log in logs for offset, value in log.rejected.items()}
    got = set()
    for record in itertools.chain.from_iterable((await target.log(kafka.DEAD_LETTERS)).values()):
        headers = dict(record.headers)
        # An earlier commit names its headers without the prefix.
        prefix = "cerberus-" if "cerberus-offset" in headers else ""
        place = (int(headers[f"{prefix}{name}"]) for name in ("partition", "offset"))
        got.add((*place, record.value))
    for letter in expected | got:
        found.equal(
            "dead letter",
            letter[:2],
            letter if letter in expected else None,
            letter if letter in got else None,
        )


async def _rows(target: cluster.Cluster, log: Log, found: Findings) -> None:
    users = sorted({user_id for part in log.values() for user_id in part.users})
    for at in range(0, len(users), 500):
        # As of 1970, no row has expired.
        for row in await target.online.read(users[at : at + 500], 0, 10.0):
            state, recent, part = row.state, row.recent, log[row.partition]
            user = part.users.get(row.user_id)
            last = -1 if user is None else int(user.offsets.max())
            if state is None or recent is None or recent.fence.epoch < state.epoch:
                # Rows that Redis lost are restored only while the user still has events.
                kept_ms = part.frontier_ms(part.end) - RULES.keep_ms
                alive = user is not None and int(user.at_ms.max()) > kept_ms
                found.equal("online row", row.user_id, "a row" if alive else None, None)
            elif recent.partition != row.partition or recent.fence.offset <= last:
                place = f"{row.partition}, past {last}"
                found.equal("online row", row.user_id, place, (recent.partition, recent.fence))
            else:
                expected, got = packed(part, row.user_id, recent)
                stats = await _aggregates(target, row.user_id)
                if recent.lower_ms > recent.fence.as_of_ms - RULES.span_ms:
                    expected = expected[0], stats  # it says that its window is not complete
                found.equal("online row", row.user_id, expected, (got, stats))


def packed(part: oracle.Partition, user_id: int, recent: packed_windows.Recent) -> tuple[Any, Any]:
    """Return the events and aggregates that a row must hold at its fence, and what it holds."""
    end, as_of_ms = recent.fence.offset, part.frontier_ms(recent.fence.offset)
    events: list[tuple[int, int]] = []
    if (user := part.users.get(user_id)) is not None:
        inside = user.inside(max(as_of_ms - RULES.keep_ms, recent.lower_ms), as_of_ms, end)
        pairs = zip(user.at_ms[inside].tolist(), user.cents[inside].tolist(), strict=True)
        events = sorted(pairs)
    stats = part.stats(user_id, as_of_ms - RULES.span_ms, as_of_ms, end)
    times = (recent.events["age_ms"].astype("int64") + recent.lower_ms).tolist()
    held = sorted(zip(times, recent.events["amount_minor"].tolist(), strict=True))
    return ((as_of_ms, events), tuple(stats)), (recent.fence.as_of_ms, held)


async def _aggregates(target: cluster.Cluster, user_id: int) -> tuple[Any, int]:
    names = [layout.field(each.view, each.name) for each in _WINDOW]
    key = layout.entity_key(user_id, layout.PROJECT)
    values: Iterator[Any] = map(layout.decode, await target.redis.hmget(key, names))
    count, total = values
    return count, round(float(total) * 100)


async def agree(target: cluster.Cluster) -> Findings:
    """Compare table `decisions` with the topic, field by field, in both directions."""
    found = Findings()
    published: dict[str, set[str]] = collections.defaultdict(set)
    for some in (await target.log("decisions")).values():
        for record in some:
            shown = json.loads(record.value)
            published[shown["decision_id"]].add(json.dumps(_columns(shown), sort_keys=True))
    for row in await target.pool.fetch(_PUBLISHED):
        name, *values = (json.loads(v) if k in _JSON else v for k, v in row.items())
        stored = json.dumps([name, *values], sort_keys=True)
        found.equal("decision on topic and table", name, {stored}, published.pop(name, None))
    for name in published:
        found.equal("decision on topic and table", name, None, "on the topic alone")
    return found


def _columns(shown: Mapping[str, Any]) -> list[Any]:
    amount, fence = (
        shown["amount"],
        shown["fence"] or dict.fromkeys(("epoch", "offset", "partition")),
    )
    same = ("user_id", "transaction_id")
    return [
        shown["decision_id"],
        oracle.to_ms(shown["as_of"]),
        *(shown[name] for name in same),
        None if amount is None else round(amount * 100),
        shown["currency"],
        shown["merchant_id"],
        *(shown[name] for name in ("door", "features", "degraded", "approximate", "score")),
        *(shown[name] for name in ("probability", "prediction", "decision")),
        shown["model_version"],
        shown["policy_version"],
        *(fence[name] for name in ("epoch", "offset", "partition")),
        shown["latency_ms"],
        shown["trace_id"],
        oracle.to_ms(shown["decided_at"]),
    ]
