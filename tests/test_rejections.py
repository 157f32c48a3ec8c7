"""A schema break is distinguished from a few bad records, at any rate and within a bound."""

import math

import numpy
import pytest

from cerberus.stream import rejections

MAX_SHARE = 0.05
ALARM_RECORDS = 10**6 * 60 * 10_000
STATES = 3_000


def alarm(gaps, max_share=MAX_SHARE):
    """Return how many records were read when the alarm came; None if it did not come.

    Args:
        gaps: How many valid records come before each refused one.
        max_share: As in the setting.
    """
    judged, read = rejections.Rejections(max_share), 0
    for accepted in gaps:
        judged.accept(int(accepted))
        read += int(accepted) + 1
        if judged.refuse():
            return read
    return None


def drawn(share, count, seed):
    """Draw about so many records with this share refused."""
    size = max(1, int(count * share))
    return numpy.random.default_rng(seed).geometric(share, size) - 1


def steps(max_share):
    """Return what a record adds and subtracts, and the limit, as the code computes them."""
    one = rejections.Rejections(max_share)
    one.refuse()
    bad = one._sum
    one.accept(1)
    one.refuse()
    return bad, 2 * bad - one._sum, one._limit


def until_alarm(share, bad, good, limit):
    """Return the mean number of records until the bound is passed: a Markov chain, on a grid.

    Each step up is rounded up and the bound down, so that the result is too small rather than
    too great. A cycle begins and ends at zero.
    """
    grid = max(2, int(STATES * good / limit))  # points to what a valid record takes away
    step = good / grid
    up, states = math.ceil(bad / step), int(limit / step) + 1
    moves, passing = numpy.zeros((states, states)), numpy.zeros(states)
    for state in range(states):
        if state > grid:  # others return to zero, where the cycle ends
            moves[state, state - grid] = 1 - share
        if state + up < states:
            moves[state, state + up] = share
        else:
            passing[state] = share
    within = numpy.eye(states) - moves
    chance = numpy.linalg.solve(within, passing)[0]
    length = numpy.linalg.solve(within, numpy.ones(states))[0]
    return length / chance


@pytest.mark.parametrize("max_share", [0.02, 0.05, 0.2])
def test_false_alarms_are_as_rare_as_is_stated(max_share):
    at_bound = until_alarm(0.8 * max_share, *steps(max_share))
    assert ALARM_RECORDS <= at_bound <= 100 * ALARM_RECORDS


def test_shares_below_the_tolerated_one_practically_never_stop():
    of_code = steps(MAX_SHARE)
    assert until_alarm(0.03, *of_code) > 10**10 * 600_000
    assert until_alarm(0.045, *of_code) > 10**4 * 600_000
    for share in (0.03, 0.045):
        assert alarm(drawn(share, 20_000_000, 7)) is None


def test_twice_the_share_stops_within_two_thousand_records():
    stops = [alarm(drawn(2 * MAX_SHARE, 4_000, seed)) for seed in range(1_000)]
    assert sum(stop is None or stop > 2_000 for stop in stops) <= 2
    assert 400 < numpy.median([stop for stop in stops if stop]) < 1_000


def test_the_first_records_and_a_burst_from_one_caller_are_no_schema_break():
    assert alarm([0] * 500) == 200
    for before in (1_000, 100_000):
        assert alarm([before] + [0] * 48) is None
        assert alarm([before] + [0] * 49) == before + 50
    assert alarm(([900] + [0] * 29) * 100) is None


def test_what_came_before_does_not_delay_the_alarm():
    before = 10**9
    for seed in range(20):
        stop = alarm([before, *drawn(0.1, 3_000, seed)])
        assert stop is not None
        assert stop - before < 2_000


def test_no_share_stops_at_the_first_record_and_the_whole_share_never():
    assert alarm([3], 0.0) == 4
    assert alarm([0] * 10_000, 1.0) is None
    for share in (1e-300, 1e-9, 0.001, 0.3, 0.34, 0.5, 0.9, 0.999):
        assert alarm([1_000] + [0] * 2_000, share) is not None, share
        assert alarm(drawn(max(share, 1e-9) / 2, 20_000, 7), max(share, 1e-9)) is None, share


def test_a_resume_begins_from_zero():
    judged = rejections.Rejections(MAX_SHARE)
    assert [judged.refuse() for _ in range(200)].index(True) == 199
    judged.clear()
    assert [judged.refuse() for _ in range(200)].index(True) == 199
