"""The model's training: simulated traffic through the stream's own window and feature code.

Nothing is drawn from a label. Transactions go as bytes through `partition.Partition.take`; a
read of a user alone is evaluated from the packed window by `evaluation.as_of`, as in serving.

One rule labels every row: *the truth about the user's latest transaction as of the row's moment*.
For a transaction in hand that is the transaction itself. For a user alone it is the last payment,
however long ago, so the labels of reads have the base rate at any traffic, and a user with an
empty window, or an unknown one, gets the base rate.
"""

import functools
import hashlib
import itertools
import os
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import xgboost

from cerberus import partition, synthetic, transactions, window
from cerberus.decisions import models
from cerberus.features import declared, evaluation, matrix
from cerberus.features import packed as packed_windows
from cerberus.learning import calibration as platt_calibration

PARAMETERS: dict[str, Any] = {
    "objective": "binary:logistic",
    # Fitted to a low base rate, the intercept makes the hessian of a row so small that
    # min_child_weight forbids the first splits; 0.5 keeps it at 0.25.
    "base_score": 0.5,
    # Histogram bins blur thin tails; exact splits also lie halfway between two seen values.
    "tree_method": "exact",
    "max_depth": 3,
    "eta": 0.2,
    "nthread": 1,
}
ROUNDS = 40
START_MS = 1_767_571_200_000  # 2026-01-05T00:00:00Z: a fixed time, so that a seed fixes every byte
RATES = (0.1, 2.0, 10.0, 50.0)
CYCLES = (3, 1, 1)
MASKED = (0.05, 0.1, 0.15)  # shares of rows without stats, credit score, amount in hand
NOTE = (
    "On this traffic the figures measure the generator, not detection: fraud is 5,000 to 10,000, "
    "all else 5 to 150, so the amount alone separates them. "
    "A user alone is judged on whether the latest transaction was fraud."
)
THRESHOLD_RULE = "max F1 at calibration transactions in hand; of ties the middle of the widest gap"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to simulate and to train on.

    The simulation runs through `RATES` (transactions a second over all users), each for the
    longest span, in cycles: three to train on, one to calibrate on, one to measure on. Users pay
    independently, so a sample of them at the population's rate per user has the same law; its
    size follows from `events`, which is how long windows stay affordable. Windows busier than the
    highest rate makes them are scored as the busiest seen.

    Attributes:
        spans: The window lengths, increasing.
        seed: Of the simulation, the masks and the training.
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
    """A log that is written, observed and read in the order of event time."""

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
        seen = self._log.take(record, partition.judge(record, "USD", self._spans))
        if not isinstance(seen, partition.Observed) or seen.row is None:
            raise AssertionError(f"the stream refuses its own traffic: {seen}")
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


def auc(fraud: Bools, score: Floats) -> float:
    """Return the chance that a random fraud scores above a random other row; ties count half."""
    hits, flagged = _cuts(fraud, score)
    false = flagged - hits
    area = np.trapezoid(np.append(0, hits), np.append(0, false))
    return float(area / (hits[-1] * false[-1]))


def average_precision(fraud: Bools, score: Floats) -> float:
    """Return the precision at each cut, weighted by the recall that the cut adds."""
    hits, flagged = _cuts(fraud, score)
    gained = np.diff(hits, prepend=0)
    return float((hits / flagged * gained).sum() / hits[-1])


def brier(fraud: Bools, probability: Floats) -> float:
    """Return the mean squared distance of the probability from the truth."""
    return float(((probability - fraud) ** 2).mean())


def calibration_error(fraud: Bools, probability: Floats, bins: int = 10) -> float:
    """Return |mean probability − share of fraud| over bins of equal width, weighted by rows."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, probability - fraud, bins)).sum() / len(fraud))


_MEASURES: dict[str, Callable[[Bools, Floats], float]] = {
    "auc": auc,
    "average_precision": average_precision,
    "brier": brier,
    "calibration_error": calibration_error,
    "mean_probability": lambda fraud, probability: float(probability.mean()),
}


def threshold(fraud: Bools, probability: Floats) -> float:
    """Return the cut with the greatest F1; of equal ones the middle of the widest gap."""
    hits, flagged = _cuts(fraud, probability)
    values = np.unique(probability)[::-1]
    f1 = (2 * hits / (flagged + hits[-1]))[:-1]
    gaps = values[:-1] - values[1:]
    best = np.lexsort((gaps, f1))[-1]
    return round(float(values[best] - gaps[best] / 2), 6)


def _cuts(fraud: Bools, score: Floats) -> tuple[Floats, Floats]:
    """Return frauds and rows at or above each distinct score, from the highest down."""
    _, place, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.cumsum(np.bincount(place, fraud)), np.cumsum(counts).astype(float)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows as the model sees them. Shape: inputs (n, names) float32, fraud (n,)."""

    names: Sequence[str]
    inputs: npt.NDArray[np.float32]
    fraud: Bools

    @classmethod
    def of(cls, drawn: Sequence[Example], spans: Sequence[str]) -> "_Part":
        names = declared.names(declared.inputs(spans))
        inputs = matrix.matrix([example.row for example in drawn], spans)
        return cls(names, inputs, np.array([example.fraud for example in drawn]))

    def columns(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.inputs.take([self.names.index(name) for name in names], axis=1)

    @property
    def in_hand(self) -> Bools:
        return ~np.isnan(self.columns([declared.AMOUNT.name])[:, 0])


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A calibrated model on the inputs `names`."""

    names: Sequence[str]
    booster: xgboost.Booster
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def fit(cls, names: Sequence[str], rows: _Part, calibration: _Part, seed: int) -> "_Fitted":
        table = xgboost.DMatrix(
            rows.columns(names), rows.fraud, feature_names=list(names), nthread=1
        )
        booster = xgboost.train(PARAMETERS | {"seed": seed}, table, ROUNDS)
        margin = cls(names, booster).margin(calibration)
        return cls(names, booster, *platt_calibration.platt(calibration.fraud, margin))

    def margin(self, part: _Part) -> Floats:
        margin: npt.NDArray[np.float32] = self.booster.inplace_predict(
            part.columns(self.names), predict_type="margin", validate_features=False
        )
        return margin.astype(np.float64)

    def probability(self, part: _Part) -> Floats:
        return models.calibrate(self.margin(part), self.slope, self.intercept)


def train(plan: Plan, path: pathlib.Path, say: Callable[[str], object] = print) -> models.Manifest:
    """Simulate, train, calibrate, measure, and write the model file and its manifest.

    The same plan gives the same bytes with the same XGBoost. The manifest is replaced last: a
    reader between the two is refused, never served a model under another's manifest.

    Args:
        plan: What to train on.
        path: The model file; its manifest stands beside it.
        say: Receives the lines of the report.

    Raises:
        OSError: The files cannot be written.

    Cost: about 10 s with the default plan; a minute with a window of a day.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = declared.names(declared.inputs(plan.spans))
    say(f"simulating {plan.sample} of {plan.users} users, windows {','.join(plan.spans)}")
    drawn = list(examples(plan))
    times_ms = [example.row.as_of_ms for part in drawn for example in part]
    rows, calibration, test = (_Part.of(part, plan.spans) for part in drawn)
    model = _Fitted.fit(names, rows, calibration, plan.seed)
    amount_only = _Fitted.fit([declared.AMOUNT.name], rows, calibration, plan.seed)
    in_hand = calibration.in_hand
    content = bytes(model.booster.save_raw("json"))
    manifest = models.Manifest(
        features=names,
        dtypes=("float32",) * len(names),
        spans=plan.spans,
        calibrator={"kind": "platt", "slope": model.slope, "intercept": model.intercept},
        threshold=threshold(calibration.fraud[in_hand], model.probability(calibration)[in_hand]),
        threshold_rule=THRESHOLD_RULE,
        metrics=_metrics(test, model=model, amount_only=amount_only),
        seed=plan.seed,
        data_range=(transactions.format_ms(times_ms[0]), transactions.format_ms(times_ms[-1])),
        parameters=PARAMETERS | {"num_boost_round": ROUNDS},
        xgboost_version=xgboost.__version__,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    _write(path, content)
    readable = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    _write(models.manifest_path(path), orjson.dumps(asdict(manifest), option=readable))
    say(f"{path}: {len(content):,} bytes; rows {[len(part) for part in drawn]}")
    _report(manifest.metrics, say)
    return manifest


def _metrics(test: _Part, **models: _Fitted) -> dict[str, Any]:
    probabilities = {name: model.probability(test) for name, model in models.items()}
    found: dict[str, Any] = {"note": NOTE}
    for kind, chosen in (("transaction_in_hand", test.in_hand), ("user_alone", ~test.in_hand)):
        fraud = test.fraud[chosen]
        found[kind] = {"rows": len(fraud), "fraud_rate": round(float(fraud.mean()), 6)}
        for name, probability in probabilities.items():
            found[kind][name] = {
                measure: round(measured(fraud, probability[chosen]), 6)
                for measure, measured in _MEASURES.items()
            }
    return found


def _report(metrics: dict[str, Any], say: Callable[[str], object]) -> None:
    say(f"{'':34}{'rows':>7}{'fraud':>8}{'AUC':>8}{'AP':>8}{'Brier':>8}{'ECE':>8}{'mean p':>8}")
    for kind, name in itertools.product(
        ("transaction_in_hand", "user_alone"), ("model", "amount_only")
    ):
        of = metrics[kind]
        values = "".join(f"{value:8.4f}" for value in of[name].values())
        say(f"{kind:22}{name:12}{of['rows']:7,}{of['fraud_rate']:8.4f}{values}")
    say(metrics["note"])


def _write(path: pathlib.Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
