"""How good scores and probabilities are, measured against the truth.

Every function takes arrays of one entry a row, shape (n,), with both truths present; a high score
means fraud.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

THRESHOLD_RULE = "max F1 at calibration transactions in hand; of ties the middle of the widest gap"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


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


def threshold(fraud: Bools, probability: Floats) -> float:
    """Return the cut with the greatest F1; among equals, the middle of the widest gap."""
    hits, flagged = _cuts(fraud, probability)
    values = np.unique(probability)[::-1]
    f1 = (2 * hits / (flagged + hits[-1]))[:-1]
    gaps = values[:-1] - values[1:]
    best = np.lexsort((gaps, f1))[-1]
    return round(float(values[best] - gaps[best] / 2), 6)


def _cuts(fraud: Bools, score: Floats) -> tuple[Floats, Floats]:
    """Return the number of frauds and of rows at or above each distinct score, highest first."""
    _, place, counts = np.unique(-score, return_inverse=True, return_counts=True)
    return np.cumsum(np.bincount(place, fraud)), np.cumsum(counts).astype(float)


MEASURES: dict[str, Callable[[Bools, Floats], float]] = {
    "auc": auc,
    "average_precision": average_precision,
    "brier": brier,
    "calibration_error": calibration_error,
    "mean_probability": lambda fraud, probability: float(probability.mean()),
}
"""The measures of a manifest, by name, each from fraud and probability."""
