"""Detect that so many records are refused that their writer, not a record, is at fault.

Page's test (CUSUM): each record adds the logarithm of how much likelier it is under the share that
breaks the schema than under the tolerated one, and the sum never falls below zero. It counts
records, not time, so two records a second are judged like ten thousand.
"""

import math

_TOLERATED, _BROKEN = 0.8, 2.0
_ALARM_RECORDS = 10**6 * 60 * 10_000
"""How many records with the tolerated share are read on average before a false alarm: those of a
million minutes at 10,000 a second."""
_FEWEST_SEEN, _FEWEST_REFUSED = 200, 50


class Rejections:
    """Judges records one by one, as their process reads them.

    At 0.8 of `max_share` a false alarm comes at most once in 6e11 records. At twice `max_share`
    (or half the way to 1, if that is less) an alarm comes soon: with 0.05, within 2,000 records
    in 9,998 of 10,000 cases. The first 200 records, and fewer than 50 refused ones in a
    row or close together, are no alarm: they may come from one caller.

    Args:
        max_share: The share of records that may be refused. At 0 the first is an alarm, at 1 none.

    Attributes:
        judged: Records since the sum was zero.
        refused: How many of them were refused.
    """

    def __init__(self, max_share: float) -> None:
        self._bad, self._good, self._limit = _steps(max_share)
        self._fewest = (_FEWEST_SEEN, _FEWEST_REFUSED) if max_share else (0, 0)
        self.clear()

    def clear(self) -> None:
        """Start again, as if no record had been seen."""
        self._sum = 0.0
        self._seen = self._accepted = self.judged = self.refused = 0

    def accept(self, count: int) -> None:
        """Take valid records."""
        self._accepted += count

    def refuse(self) -> bool:
        """Take a refused record; return whether there are too many now."""
        accepted, self._accepted = self._accepted, 0
        self._sum -= accepted * self._good
        if self._sum > 0:
            self.judged += accepted
        else:
            self._sum, self.judged, self.refused = 0.0, 0, 0
        self._seen += accepted + 1
        self._sum += self._bad
        self.judged += 1
        self.refused += 1
        enough = self._seen >= self._fewest[0] and self.refused >= self._fewest[1]
        return enough and self._sum > self._limit


def _steps(max_share: float) -> tuple[float, float, float]:
    """Return what a refused record adds, what a valid one takes away, and the alarm's bound."""
    if not 0 < max_share < 1:
        return math.inf, 0.0, math.inf if max_share else 0.0
    tolerated = _TOLERATED * max_share
    broken = min(_BROKEN * max_share, (1 + max_share) / 2)
    bad = math.log(broken / tolerated)
    good = math.log1p(-tolerated) - math.log1p(-broken)
    # The sum leaves zero with a refused record, and from there it passes the bound with a chance
    # of exp(bad - bound) at most (Wald). Such an excursion, and the wait for it, takes:
    cycle = 1 / tolerated + bad / (good * (1 - tolerated) - bad * tolerated)
    return bad, good, bad + math.log(_ALARM_RECORDS / cycle)
