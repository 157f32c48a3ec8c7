"""How much memory windows take, per event and per user, at both extremes.

    python benchmarks/memory.py [--events 1000000]

Each case is built in its own process with the code of the stream; the figure is the growth of that
process' resident memory. A million users with one event each show the cost of a user, one user with
a million events the cost of an event.
"""

import argparse
import multiprocessing
import pathlib
import sys

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from cerberus import transactions, window
from cerberus.features import fences
from cerberus.features import packed as packed_windows

START_MS = 1_790_000_000_000
SHAPES = {"one user": 1, "1,000 users": 1_000, "one user per event": None}


def measure(events, users):
    """Return the growth in bytes, and the packed size of one user's row."""
    spans = window.Spans()
    windows = window.PartitionWindows(spans)
    transactions.merchant_hash32("m")
    process = psutil.Process()
    before = process.memory_info().rss
    for i in range(events):
        at_ms = START_MS + spans.longest_ms * i // events
        user_id = i % (users or events)
        windows.observe(transactions.Transaction(f"t{i}", user_id, 1_250, "USD", "m", at_ms))
    grown = process.memory_info().rss - before
    fence = fences.Fence(1, events, windows.frontier_ms)
    user = windows.user(0) or window.UserWindow()
    packed = packed_windows.pack(user, fence, 0, windows.lower_ms, spans)
    [stats] = windows.stats(0, windows.frontier_ms)
    return grown, len(packed), stats.count


def main():
    """Measure each case and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000, help="events in each case")
    events = parser.parse_args().events
    print(f"{events:,} events in one window")
    print(f"{'':<22} {'bytes/event':>12} {'bytes/user':>12} {'row bytes':>10} {'user 0 has':>11}")
    for name, users in SHAPES.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            grown, packed, count = pool.apply(measure, (events, users))
        of_user = grown / (users or events)
        print(f"{name:<22} {grown / events:>12.1f} {of_user:>12,.0f} {packed:>10,} {count:>11,}")


if __name__ == "__main__":
    main()
