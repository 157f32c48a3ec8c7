"""Partitions in Redis: who is live, the trail of written rows, and when batch views were loaded."""

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
