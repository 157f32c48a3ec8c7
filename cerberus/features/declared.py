"""The features that are computed, declared once: their names, types and places.

Everything that names a feature reads it from here: the model's inputs, Feast's views and fields,
Postgres' columns, answers and their schema. Pure.
"""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cerberus import window

STATS_VIEW, WINDOW_VIEW, CREDIT_VIEW = "user_transaction_stats", "user_window", "user_credit"
"""Feast's views. `WINDOW_VIEW` holds the packed window, from which streamed values are computed."""


class Kind(NamedTuple):
    """A type, as Feast, Postgres and JSON call it."""

    feast: str
    sql: str
    json: str


INTEGER = Kind("Int64", "bigint", "integer")
NUMBER = Kind("Float64", "double precision", "number")


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of the model.

    Attributes:
        name: As the model, Feast and Postgres call it.
        kind: Its type; the model reads float32.
        view: Feast's view that serves it; empty for what the transaction in hand brings.
        public: As answers call it; empty for what answers do not repeat.
    """

    name: str
    kind: Kind
    view: str = ""
    public: str = ""


class OfWindow(NamedTuple):
    """The features of one window; amounts are in major units."""

    transaction_count: Feature
    total_amount: Feature


CREDIT_SCORE = Feature("credit_score", INTEGER, CREDIT_VIEW, "credit_score")
AMOUNT = Feature("amount", NUMBER)
BATCH = (CREDIT_SCORE,)
"""Features that are loaded from tables."""
REQUEST = (AMOUNT,)
"""Features that the transaction in hand brings."""
_PUBLIC_COUNT = "txn_count_"


@functools.lru_cache(256)
def of_window(span: str) -> OfWindow:
    """Return the features of the window with this length, such as "10m"."""
    return OfWindow(
        Feature(f"transaction_count_{span}", INTEGER, STATS_VIEW, f"{_PUBLIC_COUNT}{span}"),
        Feature(f"total_amount_{span}", NUMBER, STATS_VIEW, f"total_amount_{span}"),
    )


def streamed(spans: Iterable[str]) -> tuple[Feature, ...]:
    """Return what the stream computes; `values` gives the values in the same order."""
    return tuple(itertools.chain.from_iterable(map(of_window, spans)))


def values(stats: Iterable[window.WindowStats]) -> list[int | float]:
    """Return the values of `streamed`, given one entry a span. Cost: 0.2 µs a span."""
    return [value for each in stats for value in (each.count, each.total_minor / 100)]


def inputs(spans: Iterable[str]) -> tuple[Feature, ...]:
    """Return the model's inputs in order."""
    return (*streamed(spans), *BATCH, *REQUEST)


def names(features: Iterable[Feature]) -> tuple[str, ...]:
    """Return the features' names, in order."""
    return tuple(feature.name for feature in features)


def spans_shown(public: Iterable[str]) -> tuple[str, ...]:
    """Return the windows of which an answer shows values under these names, shortest first."""
    found = [name.removeprefix(_PUBLIC_COUNT) for name in public if name.startswith(_PUBLIC_COUNT)]
    return tuple(sorted(found, key=lambda span: window.Spans((span,)).longest_ms))
