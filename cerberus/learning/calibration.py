"""Fit the calibration that turns a model's margins into probabilities."""

import numpy as np
import numpy.typing as npt

from cerberus.decisions import models


def platt(fraud: npt.NDArray[np.bool_], margin: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Fit slope and intercept of `calibrate`. Shape: (n,), both truths present.

    Newton's method, each step halved until it does not worsen the fit.
    Source: Platt 1999, whose smoothed targets keep separable rows finite; Lin et al. 2007.
    """
    positives, negatives = int(fraud.sum()), int((~fraud).sum())
    target = np.where(fraud, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.column_stack([margin, np.ones_like(margin)])

    def loss(fit: npt.NDArray[np.float64]) -> float:
        return float((np.logaddexp(0, design @ fit) - target * (design @ fit)).sum())

    fit = np.array([1.0, 0.0])
    for _ in range(50):
        probability = models.calibrate(margin, fit[0], fit[1])
        weight = probability * (1 - probability)
        curvature = (design.T * weight) @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, design.T @ (target - probability))
        while np.abs(step).max() > 1e-9 and loss(fit + step) > loss(fit):
            step /= 2
        fit += step
    # Six places hide differences in the last bits between machines.
    return round(float(fit[0]), 6), round(float(fit[1]), 6)
