#!lua flags=allow-oom
-- Renews the leases of calls that live. One that had lapsed counts again.
--
-- KEYS  1 a `concurrency` limit's calls.
-- ARGV  1 milliseconds of a lease, then call ids.

local time = redis.call('TIME')
local lapses_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[1]
for n = 2, #ARGV do
  redis.call('ZADD', KEYS[1], lapses_ms, ARGV[n])
end
redis.call('EXPIRE', KEYS[1], 86400)
return #ARGV - 1
