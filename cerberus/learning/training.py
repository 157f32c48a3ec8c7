"""The model's training: boosted trees on simulated traffic, calibrated and measured."""

import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xgboost

from cerberus import transactions
from cerberus.decisions import models
from cerberus.features import declared, matrix
from cerberus.learning import calibration, measures, simulation

PARAMETERS: dict[str, Any] = {
    "objective": "binary:logistic",
    # Fitted to a low base rate, the intercept makes the hessian of a row so small that
    # min_child_weight forbids the first splits; 0.5 keeps it at 0.25.
    "base_score": 0.5,
    # Histogram bins blur thin tails; exact splits lie halfway between two seen values.
    "tree_method": "exact",
    "max_depth": 3,
    "eta": 0.2,
    "nthread": 1,
}
ROUNDS = 40
NOTE = (
    "On this traffic the figures measure the generator, not detection: fraud is 5,000 to 10,000, "
    "all else 5 to 150, so the amount alone separates them. "
    "A user alone is judged on whether the latest transaction was fraud."
)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows as the model sees them. Shape: inputs (n, names) float32, fraud (n,)."""

    names: Sequence[str]
    inputs: npt.NDArray[np.float32]
    fraud: measures.Bools

    @classmethod
    def of(cls, drawn: Sequence[simulation.Example], spans: Sequence[str]) -> "_Part":
        names = declared.names(declared.inputs(spans))
        inputs = matrix.matrix([example.row for example in drawn], spans)
        return cls(names, inputs, np.array([example.fraud for example in drawn]))

    def columns(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.inputs.take([self.names.index(name) for name in names], axis=1)

    @property
    def in_hand(self) -> measures.Bools:
        return ~np.isnan(self.columns([declared.AMOUNT.name])[:, 0])


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A model on the inputs `names`, with its calibration."""

    names: Sequence[str]
    booster: xgboost.Booster
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def fit(cls, names: Sequence[str], rows: _Part, held_out: _Part, seed: int) -> "_Fitted":
        table = xgboost.DMatrix(
            rows.columns(names), rows.fraud, feature_names=list(names), nthread=1
        )
        booster = xgboost.train(PARAMETERS | {"seed": seed}, table, ROUNDS)
        margin = cls(names, booster).margin(held_out)
        return cls(names, booster, *calibration.platt(held_out.fraud, margin))

    def margin(self, part: _Part) -> measures.Floats:
        margin: npt.NDArray[np.float32] = self.booster.inplace_predict(
            part.columns(self.names), predict_type="margin", validate_features=False
        )
        return margin.astype(np.float64)

    def probability(self, part: _Part) -> measures.Floats:
        return models.calibrate(self.margin(part), self.slope, self.intercept)

    def threshold(self, part: _Part) -> float:
        in_hand = part.in_hand
        return measures.threshold(part.fraud[in_hand], self.probability(part)[in_hand])


def train(
    plan: simulation.Plan, path: pathlib.Path, say: Callable[[str], object] = print
) -> models.Manifest:
    """Simulate, train, calibrate, measure, and write the model file and its manifest.

    With the same XGBoost, the same plan gives the same bytes. The manifest is replaced last: a
    service that starts between the two refuses the pair, and never serves a model under the
    manifest of another.

    Args:
        plan: What to train on.
        path: The model file; the manifest is written beside it.
        say: Receives the lines of the report.

    Raises:
        OSError: The files cannot be written.

    Cost: about 10 s with the default plan; a minute with a window of a day.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    say(f"simulating {plan.sample} of {plan.users} users, windows {','.join(plan.spans)}")
    drawn = list(simulation.examples(plan))
    names = declared.names(declared.inputs(plan.spans))
    rows, held_out, test = (_Part.of(part, plan.spans) for part in drawn)
    model = _Fitted.fit(names, rows, held_out, plan.seed)
    amount_only = _Fitted.fit([declared.AMOUNT.name], rows, held_out, plan.seed)
    content = bytes(model.booster.save_raw("json"))
    manifest = models.Manifest(
        features=names,
        dtypes=("float32",) * len(names),
        spans=plan.spans,
        calibrator={"kind": "platt", "slope": model.slope, "intercept": model.intercept},
        threshold=model.threshold(held_out),
        threshold_rule=measures.THRESHOLD_RULE,
        metrics=_metrics(test, model=model, amount_only=amount_only),
        seed=plan.seed,
        data_range=_range(drawn),
        parameters=PARAMETERS | {"num_boost_round": ROUNDS},
        xgboost_version=xgboost.__version__,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    _save(path, content, manifest)
    say(f"{path}: {len(content):,} bytes; rows {[len(part) for part in drawn]}")
    _report(manifest.metrics, say)
    return manifest


def _range(drawn: Sequence[Sequence[simulation.Example]]) -> tuple[str, str]:
    first, last = drawn[0][0], drawn[-1][-1]
    return transactions.format_ms(first.row.as_of_ms), transactions.format_ms(last.row.as_of_ms)


def _metrics(test: _Part, **fitted: _Fitted) -> dict[str, Any]:
    probabilities = {name: model.probability(test) for name, model in fitted.items()}
    found: dict[str, Any] = {"note": NOTE}
    for kind, chosen in (("transaction_in_hand", test.in_hand), ("user_alone", ~test.in_hand)):
        fraud = test.fraud[chosen]
        found[kind] = {"rows": len(fraud), "fraud_rate": round(float(fraud.mean()), 6)}
        for name, probability in probabilities.items():
            found[kind][name] = {
                measure: round(measured(fraud, probability[chosen]), 6)
                for measure, measured in measures.MEASURES.items()
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


def _save(path: pathlib.Path, content: bytes, manifest: models.Manifest) -> None:
    readable = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    _replace(path, content)
    _replace(models.manifest_path(path), orjson.dumps(asdict(manifest), option=readable))


def _replace(path: pathlib.Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
