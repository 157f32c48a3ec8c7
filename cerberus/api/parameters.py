"""Read the parameters of a question, over HTTP or from the command line, into a query."""

import re
import uuid
from collections.abc import Iterable, Mapping

from cerberus import errors, transactions
from cerberus.postgres import judged, ledger
from cerberus.serving import lookups

_KEYS = ("transaction_id", "user_id")


def accuracy(query: Mapping[str, str]) -> judged.Question:
    """Read `since`, a date or RFC 3339, and `model`, a prefix of a version; both are optional.

    Raises:
        InvalidInput: naming the parameter.
    """
    _known(query, ("since", "model"), "report")
    model = query.get("model", "").lower()
    if "model" in query and not re.fullmatch("[0-9a-f]{1,64}", model):
        raise errors.InvalidInput("model", "must be a prefix of a model's sha256")
    return judged.Question(since_ms(query["since"]) if "since" in query else None, model)


def decisions(query: Mapping[str, str]) -> lookups.Question:
    """Read `transaction_id` or `user_id`, and `limit` and `before`, which are optional.

    `before` is the `next` of the previous page, or a time.

    Raises:
        InvalidInput: naming the parameter.
    """
    _known(query, (*_KEYS, "before", "limit"), "look-up")
    asked = [name for name in _KEYS if name in query]
    if len(asked) != 1:
        raise errors.InvalidInput(
            "user_id" if asked else "transaction_id", "give either transaction_id or user_id"
        )
    return _page(
        user_id(query["user_id"])
        if asked == ["user_id"]
        else transactions.parse_text(query, "transaction_id"),
        query,
    )


def decisions_of_user(of: str, query: Mapping[str, str]) -> lookups.Question:
    """Read a user's id, and `limit` and `before`, which are optional.

    Raises:
        InvalidInput: naming the parameter.
    """
    _known(query, ("before", "limit"), "look-up")
    return _page(user_id(of), query)


def _page(of: str | int, query: Mapping[str, str]) -> lookups.Question:
    return lookups.Question(
        of,
        _integer("limit", query["limit"], 1, lookups.MAX_LIMIT)
        if "limit" in query
        else lookups.DEFAULT_LIMIT,
        _position(query["before"]) if "before" in query else ledger.LAST,
    )


def decision_id(text: str) -> uuid.UUID:
    """Read the id of a decision.

    Raises:
        InvalidInput: naming `decision_id`.
    """
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise errors.InvalidInput("decision_id", "must be a UUID") from error


def user_id(text: str) -> int:
    """Read a user id.

    Raises:
        InvalidInput: naming `user_id`.
    """
    return _integer("user_id", text, 0, transactions.MAX_USER_ID)


def since_ms(text: str) -> int:
    """Read a date, which starts at midnight UTC, or an RFC 3339 time, as ms since the epoch.

    Raises:
        InvalidInput: naming `since`.
    """
    moment = f"{text}T00:00:00Z" if re.fullmatch(r"[\d-]*", text, re.ASCII) else text
    try:
        return transactions.parse_moment("since", moment)
    except errors.InvalidInput as error:
        raise errors.InvalidInput(
            "since", "must be a date such as 2026-01-31, or RFC 3339"
        ) from error


def _known(query: Mapping[str, str], names: Iterable[str], question: str) -> None:
    for name in query.keys() - {*names}:
        raise errors.InvalidInput(name, f"is not a parameter of this {question}")


def _integer(name: str, text: str, low: int, high: int) -> int:
    digits, dot, _ = text.partition(".")
    if not re.fullmatch(r"[0-9]{1,19}(\.0{1,9})?", text) or not low <= int(digits) <= high:
        raise errors.InvalidInput(name, f"must be a whole number from {low} to {high}")
    # A client with doubles writes 325 as 325.0; a large double may have lost digits.
    return transactions.whole(name, float(digits) if dot else int(digits), "an integer")


def _position(cursor: str) -> ledger.Position:
    time, _, name = cursor.partition("_")
    try:
        return transactions.parse_moment("before", time), uuid.UUID(name or "0" * 32)
    except (errors.InvalidInput, ValueError) as error:
        raise errors.InvalidInput(
            "before", "must be the `next` of the previous page, or an RFC 3339 time"
        ) from error
