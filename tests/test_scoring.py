"""Scoring: a decision depends on its row alone, and a model that does not fit is refused."""

import collections
import dataclasses
import hashlib
import itertools
import math

import numpy as np
import orjson
import pytest
import xgboost
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cerberus import errors, judging, partition, settings, synthetic, transactions, window
from cerberus.decisions import models, records
from cerberus.features import declared, evaluation, matrix
from cerberus.features import packed as packed_windows
from cerberus.learning import calibration, training

SPANS = window.Spans()
BASE_RATE = synthetic.FRAUD_SHARE
MODEL = models.Model.load(settings.MODEL_PATH, SPANS.names)
BOOSTER = xgboost.Booster({"nthread": 1}, model_file=settings.MODEL_PATH)

stats = st.builds(
    lambda count, mean: (window.WindowStats(count, count * mean),),
    st.integers(0, 60),
    st.integers(0, 10**6),
)
rows = st.builds(
    evaluation.FeatureRow,
    user_id=st.just(1),
    as_of_ms=st.just(0),
    stats=st.none() | stats,
    credit_score=st.none() | st.integers(300, 850),
    amount_minor=st.none() | st.integers(0, 10**6) | st.integers(0, transactions.MAX_AMOUNT_MINOR),
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.lists(rows, max_size=70))
def test_a_batch_decides_as_its_rows_alone_to_the_bit(batch):
    assert MODEL.decide(batch) == [MODEL.decide([row])[0] for row in batch]


def test_no_rows_are_no_decisions():
    assert MODEL.decide([]) == []


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=40))
def test_what_is_missing_reaches_the_model_as_missing(batch):
    nan = math.nan
    table = [
        [
            nan if row.stats is None else row.stats[0].count,
            nan if row.stats is None else row.stats[0].total_minor / 100,
            nan if row.credit_score is None else row.credit_score,
            nan if row.amount_minor is None else row.amount_minor / 100,
        ]
        for row in batch
    ]
    oracle = BOOSTER.predict(
        xgboost.DMatrix(np.array(table), feature_names=list(MODEL.manifest.features)),
        output_margin=True,
    )
    assert [d.score for d in MODEL.decide(batch)] == oracle.tolist()


def test_each_value_stands_under_its_own_name():
    spans = ("10m", "1h")
    stats = (window.WindowStats(1, 250), window.WindowStats(3, 1_050))
    row = evaluation.FeatureRow(1, 0, stats, 700, 1_225)
    [values] = matrix.matrix([row], spans).tolist()
    assert dict(zip(declared.names(declared.inputs(spans)), values, strict=True)) == {
        "transaction_count_10m": 1,
        "total_amount_10m": 2.5,
        "transaction_count_1h": 3,
        "total_amount_1h": 10.5,
        "credit_score": 700,
        "amount": 12.25,
    }
    assert records.show_features(row, spans) == {
        "txn_count_10m": 1,
        "total_amount_10m": 2.5,
        "txn_count_1h": 3,
        "total_amount_1h": 10.5,
        "credit_score": 700,
    }


def test_an_amount_that_is_missing_is_not_an_amount_of_zero():
    after_fraud = (window.WindowStats(1, 700_000),)
    alone, zero = MODEL.decide(
        [evaluation.FeatureRow(1, 0, after_fraud, 700, amount) for amount in (None, 0)]
    )
    assert alone.probability > 0.5 > zero.probability


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=2, max_size=40))
def test_a_higher_margin_is_a_higher_probability_and_the_threshold_parts_them(batch):
    decisions = sorted(MODEL.decide(batch), key=lambda d: d.score)
    for lower, higher in itertools.pairwise(decisions):
        assert (lower.score == higher.score) == (lower.probability == higher.probability)
        assert lower.probability <= higher.probability
    for d in decisions:
        assert 0 < d.probability < 1
        assert d.prediction == ("FRAUD" if d.probability >= MODEL.manifest.threshold else "LEGIT")


@given(st.floats(0.5, 2), st.floats(-3, 1), st.integers(0, 2**32))
@hypothesis_settings(max_examples=20, deadline=None)
def test_platt_finds_the_calibration_that_the_truth_was_drawn_with(slope, intercept, seed):
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 2, 20_000)
    fraud = rng.random(20_000) < 1 / (1 + np.exp(-(slope * margin + intercept)))
    assert calibration.platt(fraud, margin) == pytest.approx((slope, intercept), abs=0.25)


@pytest.mark.parametrize("scale", [0.01, 1, 7, 100])
def test_platt_stays_finite_where_the_margin_separates(scale):
    fraud = np.arange(1000) >= 950
    slope, intercept = calibration.platt(fraud, np.where(fraud, scale, -scale))
    probability = models.calibrate(np.array([-scale, scale]), slope, intercept)
    assert probability == pytest.approx([1 / 952, 51 / 52], abs=1e-4)


NAMES = declared.names(declared.inputs(("10m",)))


def _small_model(path, names=NAMES, **changes):
    rng = np.random.default_rng(0)
    inputs = rng.random((50, len(names)))
    table = xgboost.DMatrix(inputs, inputs[:, -1] > 0.5, feature_names=list(names))
    content = bytes(xgboost.train({"objective": "binary:logistic"}, table, 2).save_raw("json"))
    return _written(path, changes.pop("content", content), **changes)


def _written(path, content, **changes):
    manifest = {
        "features": NAMES,
        "dtypes": ["float32"] * 4,
        "spans": ["10m"],
        "calibrator": {"kind": "platt", "slope": 1.0, "intercept": 0.0},
        "threshold": 0.5,
        "threshold_rule": "",
        "metrics": {},
        "seed": 0,
        "data_range": ["", ""],
        "parameters": {},
        "xgboost_version": xgboost.__version__,
        "sha256": hashlib.sha256(content).hexdigest(),
    } | changes
    path.write_bytes(content)
    models.manifest_path(path).write_bytes(orjson.dumps(manifest))
    return path


def _refusal(path, spans=("10m",)):
    with pytest.raises(errors.ModelMismatch) as caught:
        models.Model.load(path, spans)
    message = str(caught.value)
    assert "python -m cerberus train" in message
    assert "CERBERUS_MODEL" in message
    return message


def test_a_model_that_fits_its_manifest_loads(tmp_path):
    path = _small_model(tmp_path / "model.json")
    model = models.Model.load(path, ("10m",))
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


SHUFFLED = ["credit_score", "amount", "transaction_count_10m", "total_amount_10m"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sha256": "0" * 64}, "its sha256 is not the manifest's"),
        ({"spans": ["1h"]}, "it was trained on windows 1h, CERBERUS_SPANS says 10m"),
        ({"spans": [600]}, "it was trained on windows 600, CERBERUS_SPANS says 10m"),
        ({"features": SHUFFLED}, "its inputs are ('credit_score', 'amount', "),
        ({"features": 4}, "its inputs are 4, not"),
        ({"dtypes": ["float64"] * 4}, "its inputs must all be float32"),
        ({"dtypes": ["float32"] * 3}, "its inputs must all be float32"),
        (
            {"calibrator": {"kind": "isotonic", "slope": 1.0, "intercept": 0.0}},
            "its calibrator must be of kind platt",
        ),
        ({"calibrator": {"kind": "platt"}}, "its calibrator must be of kind platt"),
        ({"calibrator": None}, "its calibrator must be of kind platt"),
        (
            {"calibrator": {"kind": "platt", "slope": -1.0, "intercept": 0.0}},
            "with a slope above 0",
        ),
        ({"threshold": 0.0}, "its threshold must lie between 0 and 1"),
        ({"threshold": 1.0}, "its threshold must lie between 0 and 1"),
        ({"threshold": "0.5"}, "its threshold must lie between 0 and 1"),
        ({"content": b'{"learner": {}}'}, "is not an XGBoost model"),
        ({"content": b"hello"}, "is not an XGBoost model"),
        ({"content": b""}, "it is empty"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_remedy(tmp_path, changes, sentence):
    assert sentence in _refusal(_small_model(tmp_path / "model.json", **changes))


def test_a_model_whose_own_columns_are_in_another_order_is_refused(tmp_path):
    path = _small_model(tmp_path / "model.json", names=SHUFFLED)
    assert "its inputs are not its manifest's" in _refusal(path)


def test_a_model_for_other_windows_than_the_deployments_is_refused(tmp_path):
    path = _small_model(tmp_path / "model.json")
    sentence = "it was trained on windows 10m, CERBERUS_SPANS says 10m,1h"
    assert sentence in _refusal(path, ("10m", "1h"))


@pytest.mark.parametrize("manifest", [b"[]", b"{", b"{}", b"7"])
def test_a_broken_manifest_is_refused(tmp_path, manifest):
    path = _small_model(tmp_path / "model.json")
    models.manifest_path(path).write_bytes(manifest)
    assert "model.manifest.json is not a manifest of this version" in _refusal(path)


@pytest.mark.parametrize("missing", ["model.json", "model.manifest.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    path = _small_model(tmp_path / "model.json")
    (tmp_path / missing).unlink()
    assert f"cannot read {tmp_path / missing}" in _refusal(path)


def test_the_committed_model_is_small_and_pins_what_its_training_pins():
    manifest = MODEL.manifest
    assert settings.MODEL_PATH.stat().st_size <= 300_000
    assert manifest.parameters == training.PARAMETERS | {"num_boost_round": training.ROUNDS}
    assert manifest.parameters["base_score"] == 0.5
    assert manifest.parameters["tree_method"] == "exact"
    stored = orjson.loads(settings.MODEL_PATH.read_bytes())["learner"]["learner_model_param"]
    assert float(stored["base_score"].strip("[]")) == 0.5


Record = collections.namedtuple("Record", "offset timestamp value")


def _population_alone(rates, seed):
    """Every user alone after 12 minutes at each rate in turn, read as serving reads."""
    people = synthetic.Population(1000, 1000, "USD", seed)
    log = partition.Partition(0, SPANS, partition.Start(1, 0, 0))
    start_ms = 1_800_000_000_000
    for rate in rates:
        for paid in people.traffic(start_ms, rate):
            if paid.transaction.event_ms > start_ms + 720_000:
                break
            value = transactions.encode(paid.transaction)
            record = Record(log.offset, paid.transaction.event_ms, value)
            log.take(record, judging.judge(record, "USD", SPANS))
        start_ms += 720_000
    state = dataclasses.replace(log.state(), caught_up_ms=start_ms)
    packed = {user_id: value for user_id, value, _ in log.rows(set(people.user_ids))}
    known = [(user_id, synthetic.credit_score(user_id, 7)) for user_id in people.user_ids]
    unknown = [(user_id, None) for user_id in range(900_000, 900_050)]
    return [
        evaluation.as_of(
            evaluation.OnlineRow(
                user_id,
                packed_windows.unpack(packed[user_id], SPANS) if user_id in packed else None,
                credit_score,
                0,
                state,
            ),
            start_ms,
            None,
            now_ms=start_ms,
            rules=evaluation.Rules(SPANS, 60_000),
        )
        for user_id, credit_score in known + unknown
    ]


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("rates", [(0.1,), (2,), (10,), (50,), (50, 0.1), (0.1, 10), (2, 0.001)])
def test_users_alone_have_the_base_rate_on_average_whatever_the_traffic(rates, seed):
    population = _population_alone(rates, seed)
    assert all(row.degraded == () and row.amount_minor is None for row in population)
    probability = [d.probability for d in MODEL.decide(population)]
    assert BASE_RATE / 2 <= np.mean(probability) <= BASE_RATE * 2


def test_users_alone_of_whom_nothing_is_known_have_the_base_rate():
    unknown = [
        evaluation.FeatureRow(1, 0, streamed, credit_score)
        for streamed in (None, (window.EMPTY,))
        for credit_score in (None, 350, 500, 650, 720, 800)
    ]
    for decision in MODEL.decide(unknown):
        assert BASE_RATE / 2 <= decision.probability <= BASE_RATE * 2
        assert decision.prediction == models.LEGIT


@pytest.mark.parametrize("rates", [(0.1,), (2,), (50,)])
@pytest.mark.parametrize(
    ("amount_minor", "prediction"), [(700_000, models.FRAUD), (4_000, models.LEGIT)]
)
def test_the_amount_in_hand_decides_whatever_the_user_did_before(rates, amount_minor, prediction):
    in_hand = [
        evaluation.FeatureRow(
            row.user_id,
            row.as_of_ms,
            (window.WindowStats(s.count + 1, s.total_minor + amount_minor),),
            row.credit_score,
            amount_minor,
        )
        for row in _population_alone(rates, 13)
        for s in row.stats
    ]
    assert {d.prediction for d in MODEL.decide(in_hand)} == {prediction}
