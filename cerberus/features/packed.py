"""The packed window that a user's online row carries: the stream writes it, requests read it."""

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cerberus import window
from cerberus.features import fences

RECENT_EVENTS = 256
TILES_A_SPAN = 600

_TILES_KEPT = 30_000  # twice as many can be packed, as far as a window may reach ahead of its row

_VERSION = 1
# version, epoch, offset, as_of_ms, partition, complete, lower_ms, events, tiles
_HEADER = struct.Struct(">BIqqI?qHH")
_EVENT = np.dtype(
    [("age_ms", ">u4"), ("amount_minor", ">i8"), ("id_hash64", ">u8"), ("merchant_hash32", ">u4")]
)
_TILE = np.dtype([("age_ms", ">i8"), ("count", ">u4"), ("total_minor", ">i8")])


@dataclass(frozen=True, slots=True)
class Recent:
    """One user's packed window at one prefix of the log.

    Attributes:
        fence: The prefix.
        partition: Of the log that the prefix belongs to.
        complete: False while the log did not reach back over the longest span.
        lower_ms: Every event after it, up to the prefix, is here.
        events: Shape (n ≤ 256,), the newest, in order of time.
        tiles: Shape (m,), older events summed over slices of longest span / 600.
        tile_ms: Length of a tile.
    """

    fence: fences.Fence
    partition: int
    complete: bool
    lower_ms: int
    events: npt.NDArray[np.void]
    tiles: npt.NDArray[np.void]
    tile_ms: int

    def stats(
        self, after_ms: int, until_ms: int, without: int | None = None
    ) -> tuple[window.WindowStats, bool, bool]:
        """Summarise `(after_ms, until_ms]`, leaving out the event with identity hash `without`.

        Returns:
            The stats; whether they are approximate (an edge cuts a tile, which then counts
            whole); whether `without` was met.
        """
        ages = self.events["age_ms"].astype(np.int64)
        start = int(ages.searchsorted(after_ms - self.lower_ms, side="right"))
        stop = max(start, int(ages.searchsorted(until_ms - self.lower_ms, side="right")))
        count, total = stop - start, int(self.events["amount_minor"][start:stop].sum())
        approximate = met = False
        if without is not None:
            hits = np.flatnonzero(self.events["id_hash64"][start:stop] == np.uint64(without))
            if met := bool(hits.size):
                count -= 1
                total -= int(self.events["amount_minor"][start + int(hits[0])])
        if self.tiles.size:
            begin = self.tiles["age_ms"] + self.lower_ms
            end = begin + self.tile_ms
            inside = (end > after_ms + 1) & (begin <= until_ms)
            count += int(self.tiles["count"][inside].sum())
            total += int(self.tiles["total_minor"][inside].sum())
            # `without` was not met among the events: the tile at `until_ms` may have counted it.
            sure = without is None or met
            cut = inside & ((begin <= after_ms) | (end > until_ms + sure))
            approximate = bool(cut.any())
        return window.WindowStats(count, total), approximate, met


def tile_ms(spans: window.Spans) -> int:
    """Return the length of a tile: the longest span / 600, or what is kept / 30,000 if longer."""
    return max(1, spans.longest_ms // TILES_A_SPAN, spans.keep_ms // _TILES_KEPT)


def pack(
    user: window.UserWindow, fence: fences.Fence, partition: int, lower_ms: int, spans: window.Spans
) -> bytes:
    """Pack one user's window; `lower_ms` is the later of what is kept and what is known.

    Cost: about 20 µs, and 100 µs above 256 events, however many there are.
    """
    # A log of old times may have what was imported far ahead; nobody reads the row as of then.
    kept = user.columns(lower_ms, fence.as_of_ms + spans.keep_ms)
    edge = max(0, len(kept.times) - RECENT_EVENTS)
    events = np.empty(len(kept.times) - edge, _EVENT)
    if len(events):
        events["age_ms"] = kept.times[edge:] - lower_ms
        events["amount_minor"] = np.diff(kept.total(np.arange(edge, len(kept.times) + 1)))
        events["id_hash64"] = kept.ids[edge:]
        events["merchant_hash32"] = kept.merchants[edge:]
    tiles = _tiles(kept, edge, lower_ms, tile_ms(spans))
    header = _HEADER.pack(
        _VERSION,
        *fence,
        partition,
        lower_ms <= fence.as_of_ms - spans.longest_ms,
        lower_ms,
        len(events),
        len(tiles),
    )
    return header + events.tobytes() + tiles.tobytes()


def _tiles(kept: window.Columns, edge: int, lower_ms: int, length_ms: int) -> npt.NDArray[np.void]:
    """Sum up the events before index `edge`, one tile a slice that has any."""
    if not edge:
        return np.empty(0, _TILE)
    times = kept.times[:edge]
    begins = np.arange(times[0] // length_ms, times[-1] // length_ms + 1) * length_ms
    bounds = np.append(times.searchsorted(begins), edge)
    tiles = np.empty(len(begins), _TILE)
    tiles["age_ms"] = begins - lower_ms
    tiles["count"] = np.diff(bounds)
    tiles["total_minor"] = np.diff(kept.total(bounds))
    return tiles[tiles["count"] > 0]


def unpack(value: bytes, spans: window.Spans) -> Recent:
    """Read what `pack` wrote. Cost: about 2 µs.

    Raises:
        ValueError: The bytes are not a packed window of this format.
    """
    if len(value) < _HEADER.size or value[0] != _VERSION:
        raise ValueError("recent: not a packed window of format 1")
    _, epoch, offset, as_of_ms, partition, complete, lower_ms, n, m = _HEADER.unpack_from(value)
    tiles_at = _HEADER.size + n * _EVENT.itemsize
    if len(value) != tiles_at + m * _TILE.itemsize:
        raise ValueError(f"recent: {len(value)} bytes do not hold {n} events and {m} tiles")
    return Recent(
        fence=fences.Fence(epoch, offset, as_of_ms),
        partition=partition,
        complete=complete,
        lower_ms=lower_ms,
        events=np.frombuffer(value, _EVENT, n, _HEADER.size),
        tiles=np.frombuffer(value, _TILE, m, tiles_at),
        tile_ms=tile_ms(spans),
    )
