"""Store rows so that one that Postgres refuses does not stop the others."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from cerberus import errors

_Row = TypeVar("_Row")


async def write(
    store: Callable[[Sequence[_Row]], Awaitable[object]], rows: Sequence[_Row]
) -> dict[int, str]:
    """Store rows together; if some are refused, separate those from the others.

    Args:
        store: Stores some rows, all or nothing; it is called once if none is refused, otherwise
            about 2·log₂(rows) times for each refused row.
        rows: In any order.

    Returns:
        The reasons for refused rows, by their place in `rows`.

    Raises:
        StoreUnavailable: Postgres did not answer; some rows may be stored.
    """
    refused: dict[int, str] = {}
    left = [(0, len(rows))] if rows else []
    while left:
        low, high = left.pop()
        try:
            await store(rows[low:high])
        except errors.DataRefused as error:
            if high - low == 1:
                refused[low] = str(error)
            else:
                middle = (low + high) // 2
                left += [(middle, high), (low, middle)]
    return refused
