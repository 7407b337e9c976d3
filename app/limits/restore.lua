#!lua flags=allow-oom
-- Puts into a daily or monthly counter what the ledger has of it, in the place of what it gave before.
--
-- KEYS  1 the counter, 2 what the ledger gave before in this rebuilding, 3 the mark that counters are whole.
-- ARGV  1 what the ledger has; 2 seconds that both are kept; 3 the rebuilding's epoch where it has ended, else ''.
-- Gives 0 where the counter was never lost: then it is right as it stands; and where a rebuilding that has ended is no
-- longer the last: Redis was emptied again, and what rows of before left here would be taken for never lost.
if ARGV[3] ~= '' and redis.call('GET', KEYS[3]) ~= ARGV[3] then
  return 0
end
local sum, before = redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])
if sum and not before then
  return 0
end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
redis.call('SET', KEYS[1], math.max(0, (sum or before or 0) - (before or 0) + ARGV[1]), 'EX', ARGV[2])
return 1
