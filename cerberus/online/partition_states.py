"""Partitions in Redis: who is live, the trail of written rows, and when batch views were loaded."""

from collections.abc import Callable

MATERIALIZED = "cerberus:{materialized}"  # in braces: what a cluster's keys are placed by
LOADING = f"{MATERIALIZED}:loading"

# Of the topic's hash of partitions, KEYS[1]. ARGV: partition, epoch, offset, the trail that was
# left and the one that was tried. Goes on unless the fence is older (0) or the trail is another
# (-1); an empty one is not asked for.
_FENCED = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
local readable, s = pcall(cjson.decode, stored)
if stored and readable then
  local e, o = tonumber(ARGV[2]), tonumber(ARGV[3])
  if s.epoch > e or (s.epoch == e and s.offset > o) then return 0 end
end
local trail = redis.call('HGET', KEYS[1], 'trail:' .. ARGV[1])
if ARGV[4] ~= '' and trail ~= ARGV[4] and trail ~= ARGV[5] then return -1 end
"""
# Further ARGV: the new trail.
LEAVE_TRAIL = f"""{_FENCED}
redis.call('HSET', KEYS[1], 'trail:' .. ARGV[1], ARGV[6])
return 1
"""
# Further ARGV: state as JSON, whether to make what is not there, the number of partitions.
WRITE_STATE = f"""{_FENCED}
if not (stored and readable) and ARGV[7] == '0' then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[6], 'count', ARGV[8])
return 1
"""


class Versions:
    """Chooses the version in which claims and commits are written.

    A newer version is written only after the owners of all partitions have read it for a while
    without interruption. An older release that comes back within that time can read everything.

    Args:
        patience_s: How long all owners must have read a version before it is written.
        clock: A monotonic clock, in seconds.

    Attributes:
        spoken: The version to write.
    """

    def __init__(self, patience_s: float, clock: Callable[[], float]) -> None:
        self.spoken = 0
        self._patience_s = patience_s
        self._clock = clock
        self._heard = 0
        self._since_s = 0.0

    def hear(self, version: int) -> None:
        """Take note of the newest version that all owners read now; 0 if an owner is missing."""
        now_s = self._clock()
        if version != self._heard:
            self._heard, self._since_s = version, now_s
        if version <= self.spoken or now_s - self._since_s >= self._patience_s:
            self.spoken = version
