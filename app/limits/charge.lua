#!lua flags=allow-oom
-- Adds what was used while Redis was away to a daily or monthly counter.
--
-- KEYS  1 the counter.
-- ARGV  1 amount, below zero for a correction.
local sum = redis.call('GET', KEYS[1])
if sum then
  redis.call('SET', KEYS[1], math.max(0, sum + ARGV[1]), 'KEEPTTL')
elseif tonumber(ARGV[1]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', string.find(KEYS[1], 'monthly_usd') and 2937600 or 259200)
end
return 1
