"""Training: rows come from the stream's code, measures equal their definitions, a seed repeats."""

import bisect
import collections
import datetime
import itertools
import os
import pathlib
import subprocess
import sys
import uuid

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import cerberus.__main__
from cerberus import settings, synthetic, transactions
from cerberus.decisions import models
from cerberus.features import declared
from cerberus.learning import measures, simulation, training

SMALL = simulation.Plan(events=20_000)
SPAN_MS = 600_000
START_MS = 1_800_000_000_000
SCRIPT = pathlib.Path(__file__).parent.parent / "models" / "train_model.py"


@pytest.fixture(scope="module")
def parts():
    return list(simulation.examples(SMALL))


@pytest.fixture(scope="module")
def history():
    """Repeat the traffic behind SMALL, per user in order of time, without the stream's code."""
    people = synthetic.Population(SMALL.sample, 1000, "USD", SMALL.seed)
    users = collections.defaultdict(list)
    phases = [*simulation.RATES * 3, None, *simulation.RATES, None, *simulation.RATES]
    for i, rate in enumerate(phases):
        start_ms = simulation.START_MS + i * SPAN_MS
        for paid in people.traffic(start_ms, rate * SMALL.sample / 1000) if rate else ():
            if paid.transaction.event_ms >= start_ms + SPAN_MS:
                break
            users[paid.transaction.user_id].append(
                (paid.transaction.event_ms, paid.transaction.amount_minor, paid.fraud)
            )
    return users


def _until(events, as_of_ms):
    return events[: bisect.bisect_right(events, as_of_ms, key=lambda event: event[0])]


def test_every_row_and_label_equal_a_recomputation_from_the_whole_traffic(parts, history):
    for example in itertools.chain(*parts):
        row = example.row
        before = _until(history[row.user_id], row.as_of_ms)
        inside = [amount for at_ms, amount, _ in before if at_ms > row.as_of_ms - SPAN_MS]
        if row.stats is not None:
            (stats,) = row.stats
            assert (stats.count, stats.total_minor) == (len(inside), sum(inside))
        assert example.fraud == before[-1][2]
        if row.amount_minor is not None:
            assert row.amount_minor == before[-1][1]
            assert row.as_of_ms == before[-1][0]
        assert row.degraded == ()
        assert row.credit_score in (None, synthetic.credit_score(row.user_id, SMALL.seed))


def test_the_parts_follow_each_other_and_no_window_reaches_into_two(parts):
    times = [[example.row.as_of_ms for example in part] for part in parts]
    assert all(part == sorted(part) for part in times)
    for earlier, later in itertools.pairwise(times):
        assert later[0] - earlier[-1] > SPAN_MS


def test_every_part_holds_every_situation_in_numbers(parts, history):
    for part in parts:
        in_hand = [e for e in part if e.row.amount_minor is not None]
        alone = [e for e in part if e.row.amount_minor is None]
        streamed = [e for e in part if e.row.stats is not None]
        after_fraud = [
            e
            for e in in_hand
            if not e.fraud and e.row.stats and e.row.stats[0].total_minor >= 500_000
        ]
        empty = [e for e in streamed if e.row.stats[0].count == 0]
        busy = [e for e in streamed if e.row.stats[0].count >= 20]
        masked = [
            e
            for e in alone
            if _until(history[e.row.user_id], e.row.as_of_ms)[-1][0] == e.row.as_of_ms
        ]
        without_credit = [e for e in part if e.row.credit_score is None]
        assert len(after_fraud) > 0.1 * len(in_hand)
        assert len(in_hand) > 0.3 * len(part)
        assert len(alone) > 0.3 * len(part)
        assert 0.1 * len(in_hand) < len(masked) < 0.3 * len(in_hand)
        assert len(empty) > 0.03 * len(part)
        assert len(busy) > 0.1 * len(part)
        assert 0.02 * len(part) < len(part) - len(streamed) < 0.1 * len(part)
        assert 0.05 * len(part) < len(without_credit) < 0.2 * len(part)
        for kind in (in_hand, alone):
            assert 0.025 < np.mean([e.fraud for e in kind]) < 0.1


def test_a_genuine_transaction_within_ten_minutes_of_the_users_fraud_is_labelled_genuine(
    parts, history
):
    found = 0
    for example in itertools.chain(*parts):
        row = example.row
        if row.amount_minor is None or example.fraud:
            continue
        earlier = _until(history[row.user_id], row.as_of_ms)[:-1]
        found += any(at_ms > row.as_of_ms - SPAN_MS and fraud for at_ms, _, fraud in earlier)
    assert found > 500


def test_a_sample_of_the_users_keeps_the_rate_per_user():
    assert simulation.Plan().sample == 1000
    long = simulation.Plan(spans=("10m", "1h"))
    assert 100 < long.sample < 200
    assert simulation.Plan(events=10**9).sample == 1000


labelled = st.lists(
    st.tuples(st.booleans(), st.integers(0, 20).map(lambda i: i / 20)), min_size=2, max_size=40
).filter(lambda rows: len({fraud for fraud, _ in rows}) == 2)


def _columns(rows):
    fraud, score = zip(*rows, strict=True)
    return np.array(fraud), np.array(score, dtype=float)


@given(labelled)
def test_auc_is_the_share_of_pairs_in_the_right_order(rows):
    pairs = [
        1.0 if bad > good else 0.5 if bad == good else 0.0
        for is_bad, bad in rows
        for is_good, good in rows
        if is_bad and not is_good
    ]
    assert measures.auc(*_columns(rows)) == pytest.approx(sum(pairs) / len(pairs))


@given(labelled)
def test_average_precision_is_precision_over_the_gain_in_recall(rows):
    total, hits_before, expected = sum(fraud for fraud, _ in rows), 0, 0.0
    for cut in sorted({score for _, score in rows}, reverse=True):
        flagged = [fraud for fraud, score in rows if score >= cut]
        expected += sum(flagged) / len(flagged) * (sum(flagged) - hits_before) / total
        hits_before = sum(flagged)
    assert measures.average_precision(*_columns(rows)) == pytest.approx(expected)


@given(labelled)
def test_the_threshold_has_the_greatest_f1_of_all_cuts(rows):
    def f1(cut):
        hits = sum(fraud for fraud, score in rows if score >= cut)
        flagged = sum(score >= cut for _, score in rows)
        return 2 * hits / (flagged + sum(fraud for fraud, _ in rows))

    values = sorted({score for _, score in rows})
    cuts = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    if cuts:
        assert f1(measures.threshold(*_columns(rows))) == pytest.approx(max(map(f1, cuts)))


def test_of_equal_thresholds_the_middle_of_the_widest_gap_is_taken():
    fraud = np.array([False, False, True, True, True])
    assert measures.threshold(fraud, np.array([0.0, 0.1, 0.7, 0.8, 1.0])) == pytest.approx(0.4)
    # The cuts below .9 and below .6 both have F1 = 2/3.
    fraud = np.array([True, False, False, True, False])
    assert measures.threshold(fraud, np.array([0.9, 0.8, 0.7, 0.6, 0.1])) == pytest.approx(0.35)


def test_the_measures_of_a_case_computed_by_hand():
    fraud, p = np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.1])
    assert measures.auc(fraud, p) == pytest.approx(3 / 4)
    assert measures.average_precision(fraud, p) == pytest.approx(1 / 2 + 2 / 3 / 2)
    assert measures.brier(fraud, p) == pytest.approx((0.01 + 0.64 + 0.09 + 0.01) / 4)
    assert measures.calibration_error(fraud, p) == pytest.approx((0.1 + 0.8 + 0.3 + 0.1) / 4)


def test_the_calibration_error_weighs_bins_by_their_rows_and_keeps_one_in_the_last():
    fraud = np.array([True, False, True, False])
    p = np.array([0.55, 0.58, 0.95, 1.0])
    assert measures.calibration_error(fraud, p) == pytest.approx((0.13 + 0.95) / 4)
    assert measures.calibration_error(fraud, fraud.astype(float)) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "deep" / "model.json"
    said = []
    manifest = training.train(SMALL, path, said.append)
    return path, manifest, said


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(trained, tmp_path):
    path, *_ = trained
    again, other = tmp_path / "again.json", tmp_path / "other.json"
    training.train(SMALL, again, lambda line: None)
    training.train(simulation.Plan(events=20_000, seed=8), other, lambda line: None)
    assert again.read_bytes() == path.read_bytes()
    assert models.manifest_path(again).read_bytes() == models.manifest_path(path).read_bytes()
    assert other.read_bytes() != path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "again.json",
        "again.manifest.json",
        "other.json",
        "other.manifest.json",
    ]


def test_what_is_trained_loads_and_its_manifest_says_where_it_comes_from(trained):
    path, manifest, _ = trained
    assert models.Model.load(path, ("10m",)).manifest == manifest
    assert manifest.features == declared.names(declared.inputs(("10m",)))
    assert manifest.seed == SMALL.seed
    first, last = map(datetime.datetime.fromisoformat, manifest.data_range)
    assert first < last < first + datetime.timedelta(hours=4)


def test_more_windows_are_one_argument_more(tmp_path):
    path, spans = tmp_path / "model.json", ("10m", "1h")
    training.train(simulation.Plan(spans=spans, events=10_000), path, lambda line: None)
    model = models.Model.load(path, spans)
    assert model.manifest.features == declared.names(declared.inputs(spans))


def test_the_measures_stand_beside_an_amount_only_baseline_and_say_what_they_measure(trained):
    _, manifest, said = trained
    metrics = manifest.metrics
    measures = {"auc", "average_precision", "brier", "calibration_error", "mean_probability"}
    for kind in ("transaction_in_hand", "user_alone"):
        assert set(metrics[kind]["model"]) == set(metrics[kind]["amount_only"]) == measures
        assert f"{metrics[kind]['model']['auc']:.4f}" in "\n".join(said)
    assert "measure the generator, not detection" in metrics["note"]
    assert metrics["note"] in said
    # The baseline sees no amount where none is in hand, so it cannot rank.
    assert metrics["user_alone"]["amount_only"]["auc"] == 0.5
    assert metrics["user_alone"]["model"]["auc"] > 0.7
    assert metrics["transaction_in_hand"]["amount_only"]["auc"] > 0.99


def test_the_script_run_from_anywhere_gives_the_committed_model(tmp_path):
    path = tmp_path / "model.json"
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CERBERUS_")}
    subprocess.run(
        [sys.executable, SCRIPT, "--out", path], cwd=tmp_path, env=environ, check=True, timeout=100
    )
    new, old = (
        orjson.loads(models.manifest_path(p).read_bytes()) for p in (path, settings.MODEL_PATH)
    )
    # Another build of XGBoost may differ in the last bits, so not the bytes.
    for inexact in ("sha256", "xgboost_version", "calibrator", "threshold", "metrics"):
        del new[inexact], old[inexact]
    assert new == old
    rows = [example.row for example in itertools.chain(*simulation.examples(SMALL))]
    decisions = [
        [d.probability for d in models.Model.load(p, ("10m",)).decide(rows)]
        for p in (path, settings.MODEL_PATH)
    ]
    assert decisions[0] == pytest.approx(decisions[1], abs=0.02)


@pytest.mark.parametrize("spans", ["", "10", "10m,5m", "10m,10m", "0m", "10x", "m"])
def test_wrong_spans_are_refused(capsys, spans):
    with pytest.raises(SystemExit) as caught:
        cerberus.__main__.main(["train", "--spans", spans])
    assert caught.value.code == 2
    assert "is not increasing lengths such as 10m,1h,24h" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cerberus.__main__.main(["train", "--out", str(tmp_path / "file" / "model.json")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("CERBERUS_SPANS", "x"), ("CERBERUS_MODEL", "."), ("CERBERUS_SPAN", "10m")]
)
def test_a_wrong_setting_ends_the_training_before_it_begins(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cerberus.__main__.main(["train"]) == 78
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "1.5", "１", "1e400", "99999999999"])
def test_a_seed_is_a_whole_number(seed, capsys):
    with pytest.raises(SystemExit) as caught:
        cerberus.__main__.main(["train", "--seed", seed])
    assert caught.value.code == 2
    assert "whole number" in capsys.readouterr().err


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    path = tmp_path / "model.json"
    path.mkdir()
    with pytest.raises(OSError, match=r"model\.json"):
        training.train(SMALL, path, lambda line: None)
    assert list(tmp_path.iterdir()) == [path]


def _traffic(count, seed=7, per_s=2.0):
    people = synthetic.Population(1000, 1000, "USD", seed)
    return list(itertools.islice(people.traffic(START_MS, per_s), count))


@given(st.integers(0, 2**31), st.sampled_from([0.1, 2.0, 50.0]))
@hypothesis_settings(max_examples=20, deadline=None)
def test_a_seed_repeats_its_traffic_and_another_makes_other(seed, per_s):
    assert _traffic(20, seed, per_s) == _traffic(20, seed, per_s)
    assert _traffic(20, seed, per_s) != _traffic(20, seed + 1, per_s)


def test_amounts_shares_users_and_rate_are_those_of_the_seed():
    traffic = _traffic(40_000)
    for paid in traffic:
        amount = paid.transaction.amount_minor
        assert (500_000 <= amount <= 1_000_000) if paid.fraud else (500 <= amount <= 15_000)
    assert np.mean([paid.fraud for paid in traffic]) == pytest.approx(0.05, abs=0.005)
    assert {paid.transaction.user_id for paid in traffic} == set(range(1000, 2000))
    elapsed_s = (traffic[-1].transaction.event_ms - START_MS) / 1000
    assert len(traffic) / elapsed_s == pytest.approx(2.0, rel=0.05)


def test_amounts_of_both_kinds_fill_their_ranges():
    traffic = _traffic(40_000)
    for fraud, low, high in ((False, 500, 15_000), (True, 500_000, 1_000_000)):
        amounts = [p.transaction.amount_minor for p in traffic if p.fraud == fraud]
        assert min(amounts) < low * 1.05
        assert max(amounts) > high * 0.99
        assert np.mean(amounts) == pytest.approx((low + high) / 2, rel=0.02)


def test_transaction_ids_are_version_7_with_the_event_time_and_do_not_repeat():
    traffic = _traffic(5_000, per_s=500.0)
    for paid in traffic:
        value = uuid.UUID(paid.transaction.transaction_id)
        assert (value.version, value.variant) == (7, uuid.RFC_4122)
        assert value.int >> 80 == paid.transaction.event_ms
    assert len({paid.transaction.transaction_id for paid in traffic}) == len(traffic)


def test_the_stream_reads_back_what_the_population_pays():
    for paid in _traffic(500):
        record = transactions.encode(paid.transaction)
        assert b"fraud" not in record
        assert transactions.decode(record, "USD") == paid.transaction


def test_credit_scores_repeat_stay_in_range_and_know_nothing_of_fraud():
    scores = {user_id: synthetic.credit_score(user_id, 7) for user_id in range(1000, 2000)}
    assert scores == {u: synthetic.credit_score(u, 7) for u in scores}
    assert scores != {u: synthetic.credit_score(u, 8) for u in scores}
    assert all(isinstance(s, int) and 300 <= s <= 850 for s in scores.values())
    assert len(set(scores.values())) > 300
    traffic = _traffic(40_000)
    mean = {
        fraud: np.mean([scores[p.transaction.user_id] for p in traffic if p.fraud == fraud])
        for fraud in (True, False)
    }
    # The standard error of the difference is 2.6 points.
    assert abs(mean[True] - mean[False]) < 10
