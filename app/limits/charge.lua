#!lua flags=allow-oom
-- Adds what was used without Redis to a daily or monthly counter.
--
-- KEYS  1 the counter.
-- ARGV  1 amount, below zero for a correction; 2 seconds that a new counter is kept.
local sum = redis.call('GET', KEYS[1])
if sum then
  redis.call('SET', KEYS[1], math.max(0, sum + ARGV[1]), 'KEEPTTL')
elseif tonumber(ARGV[1]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
return 1
