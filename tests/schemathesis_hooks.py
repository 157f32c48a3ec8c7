"""Rules that the document cannot express, for schemathesis."""

import datetime

import schemathesis
from hypothesis import strategies as st

# `timestamp` and `labelled_at` must not be in the future, which no schema can express.
schemathesis.openapi.format(
    "date-time",
    st.datetimes(
        datetime.datetime(1971, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
        datetime.datetime(2026, 1, 1),  # noqa: DTZ001
        timezones=st.just(datetime.UTC),
    ).map(datetime.datetime.isoformat),
)


_TIMES = ("timestamp", "labelled_at")


@schemathesis.hook
def before_call(context, case, kwargs):
    """Change what the document allows and the service refuses.

    Following a link, schemathesis may take the id for a query about a transaction from a decision
    on a user alone, where it is null. From a pattern it draws years that are still to come.
    """
    if not case.meta.generation.mode.is_positive:
        return
    if case.path == "/decisions" and not case.query.get("transaction_id"):
        case.query["transaction_id"] = "unknown"
    if isinstance(case.body, dict):
        told = case.body.get("labels")
        for each in (case.body, *(told if isinstance(told, list) else ())):
            _make_past(each)


def _make_past(document):
    for name in _TIMES if isinstance(document, dict) else ():
        value = document.get(name)
        if isinstance(value, str) and value[:4] > "2024":
            document[name] = f"2024{value[4:]}"  # a leap year: any day of another is one of it
