"""Simulated traffic to learn from, through the stream's own window and feature code.

No feature is drawn from a label. Transactions go as bytes through `partition.Partition.take`; a
read of a user alone is evaluated from the packed window by `evaluation.as_of`, as in serving.

One rule labels every row: *the truth about the user's latest transaction as of the row's moment*.
For a transaction in hand that is the transaction itself. For a user alone it is the last payment,
however long ago, so the labels of reads have the base rate at any traffic, and a user with an
empty window, or an unknown one, gets the base rate.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from cerberus import judging, partition, synthetic, transactions, window
from cerberus.features import evaluation
from cerberus.features import packed as packed_windows

START_MS = 1_767_571_200_000  # 2026-01-05T00:00:00Z: a fixed time, so that a seed fixes every byte
RATES = (0.1, 2.0, 10.0, 50.0)
CYCLES = (3, 1, 1)
MASKED = (0.05, 0.1, 0.15)  # shares of rows without stats, credit score, amount in hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to simulate and to train on.

    The simulation runs through `RATES` (transactions a second over all users), each for the
    longest span, in cycles: three to train on, one to calibrate on, one to measure on. Users pay
    independently, so a sample of them at the population's rate per user has the same distribution.
    Its size follows from `events`, so that long windows stay affordable. A window busier than any
    seen here is scored like the busiest one.

    Attributes:
        spans: The window lengths, increasing.
        seed: The seed of the simulation, the masks and the training.
        users: Size of the population that `RATES` refer to.
        first_user_id: Its lowest id.
        events: About how many transactions to simulate at most.
    """

    spans: tuple[str, ...] = ("10m",)
    seed: int = 7
    users: int = 1000
    first_user_id: int = 1000
    events: int = 200_000

    @property
    def phase_ms(self) -> int:
        """How long one rate lasts."""
        return window.Spans(self.spans).longest_ms

    @property
    def sample(self) -> int:
        """How many users are simulated."""
        expected = sum(CYCLES) * sum(RATES) * self.phase_ms / 1000
        return max(1, min(self.users, int(self.users * self.events / expected)))


@dataclass(frozen=True, slots=True)
class Example:
    """A feature row and whether the user's latest transaction, as of the row, was fraud."""

    row: evaluation.FeatureRow
    fraud: bool


class _Record(NamedTuple):
    offset: int
    timestamp: int
    value: bytes


class _Simulation:
    """A log that is written, observed and read in order of event time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._spans = window.Spans(plan.spans)
        self._population = synthetic.Population(plan.sample, plan.first_user_id, "USD", plan.seed)
        self._rng = random.Random(f"examples {plan.seed}")  # noqa: S311 - a seed repeats it
        self._log = partition.Partition(0, self._spans, partition.Start(epoch=1, begin=0, commit=0))
        self._latest: dict[int, bool] = {}
        self._credit_score = functools.cache(
            lambda user_id: synthetic.credit_score(user_id, plan.seed)
        )

    def phase(self, start_ms: int, rate: float) -> Iterator[Example]:
        """Run one phase; the rows are capped, so that busy phases do not drown the quiet ones."""
        plan, rng = self._plan, self._rng
        end_ms = start_ms + plan.phase_ms
        per_s = rate * plan.sample / plan.users
        kept = plan.events / 50 / (per_s * plan.phase_ms / 1000)
        moments: list[tuple[int, synthetic.Labelled | None]] = []
        for labelled in self._population.traffic(start_ms, per_s):
            if labelled.transaction.event_ms >= end_ms:
                break
            moments.append((labelled.transaction.event_ms, labelled))
        moments += [(rng.randrange(start_ms, end_ms), None) for _ in range(plan.events // 100)]
        for at_ms, paid in sorted(moments, key=lambda moment: moment[0]):
            if paid is not None:
                row = self._pay(paid)
                if rng.random() < kept:
                    yield Example(self._masked(row), paid.fraud)
            elif (user_id := rng.choice(self._population.user_ids)) in self._latest:
                yield Example(self._masked(self._read(user_id, at_ms)), self._latest[user_id])

    def _pay(self, labelled: synthetic.Labelled) -> evaluation.FeatureRow:
        paid = labelled.transaction
        record = _Record(self._log.offset, paid.event_ms, transactions.encode(paid))
        seen = self._log.take(record, judging.judge(record, "USD", self._spans))
        if not isinstance(seen, partition.Observed) or seen.row is None:
            raise AssertionError(f"the stream rejects its own traffic: {seen}")
        self._latest[paid.user_id] = labelled.fraud
        return replace(seen.row, credit_score=self._credit_score(paid.user_id))

    def _read(self, user_id: int, at_ms: int) -> evaluation.FeatureRow:
        packed = [packed for _, packed, _ in self._log.rows({user_id})]
        online = evaluation.OnlineRow(
            user_id=user_id,
            recent=packed_windows.unpack(packed[0], self._spans) if packed else None,
            credit_score=self._credit_score(user_id),
            partition=0,
            state=replace(self._log.state(), caught_up_ms=at_ms),
        )
        rules = evaluation.Rules(self._spans, max_staleness_ms=0)
        return evaluation.as_of(online, at_ms, None, now_ms=at_ms, rules=rules)

    def _masked(self, row: evaluation.FeatureRow) -> evaluation.FeatureRow:
        without_stats, without_credit, without_amount = (self._rng.random() < m for m in MASKED)
        return replace(
            row,
            stats=None if without_stats else row.stats,
            credit_score=None if without_credit else row.credit_score,
            amount_minor=None if without_amount else row.amount_minor,
        )


def examples(plan: Plan) -> Iterator[list[Example]]:
    """Yield the rows of the training, calibration and test parts, in order of time.

    A silent phase lies between two parts, so that no window reaches into both.
    Cost: about 20 µs a simulated transaction, 60 µs a read.
    """
    simulation = _Simulation(plan)
    starts_ms = itertools.count(START_MS, plan.phase_ms)
    for cycles in CYCLES:
        phases = list(zip(RATES * cycles, starts_ms, strict=False))
        yield [example for rate, start_ms in phases for example in simulation.phase(start_ms, rate)]
        next(starts_ms)
