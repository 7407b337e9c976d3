#!lua flags=allow-oom
-- Adds what was used without Redis to a daily or monthly counter.
--
-- KEYS  1 the counter, 2 what the ledger gave of it in the last rebuilding, 3 the mark that counters are whole.
-- ARGV  1 amount, below zero for a correction; 2 amount of calls that began before that rebuilding: they count only for
--       a counter that was there and needed none, the others have them from the ledger; 3 seconds that a new counter is
--       kept.
-- Gives 3, as reserve.lua does, where counter and mark are missing: a counter that began now would hide what was lost.
local sum = redis.call('GET', KEYS[1])
if sum then
  local before = redis.call('EXISTS', KEYS[2]) == 0 and ARGV[2] or 0
  redis.call('SET', KEYS[1], math.max(0, sum + ARGV[1] + before), 'KEEPTTL')
elseif redis.call('EXISTS', KEYS[3]) == 0 then
  return 3
elseif tonumber(ARGV[1]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[3])
end
return 1
