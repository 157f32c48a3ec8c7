"""Feature rows laid out for the model: the names of its inputs, and their order."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cerberus.features import declared, evaluation


def matrix(rows: Sequence[evaluation.FeatureRow], spans: Sequence[str]) -> npt.NDArray[np.float32]:
    """Lay rows out for the model: missing is NaN, never zero; amounts are in major units.

    Returns:
        Shape (len(rows), inputs), float32, C-contiguous, columns as in `declared.inputs`.
    """
    nan = float("nan")
    streamed = len(declared.OfWindow._fields) * len(spans)
    unknown = [nan] * streamed
    table = [
        (
            *(unknown if row.stats is None else declared.values(row.stats)),
            nan if row.credit_score is None else row.credit_score,
            nan if row.amount_minor is None else row.amount_minor / 100,
        )
        for row in rows
    ]
    width = streamed + len(declared.BATCH) + len(declared.REQUEST)
    return np.array(table, dtype=np.float32).reshape(len(rows), width)
