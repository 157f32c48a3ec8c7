"""Rules that the document cannot express, for schemathesis."""

import datetime

import schemathesis
from hypothesis import strategies as st

# `timestamp` and `labelled_at` must not be in the future, which no schema can express.
schemathesis.openapi.format(
    "date-time",
    st.datetimes(
        datetime.datetime(1970, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
        datetime.datetime(2026, 1, 1),  # noqa: DTZ001
        timezones=st.just(datetime.UTC),
    ).map(datetime.datetime.isoformat),
)


@schemathesis.hook
def before_call(context, case, kwargs):
    """Give a query about a transaction its required id.

    Following a link, schemathesis may take it from a decision on a user alone, where it is null.
    """
    lacks = case.path == "/decisions" and not case.query.get("transaction_id")
    if lacks and case.meta.generation.mode.is_positive:
        case.query["transaction_id"] = "none"
