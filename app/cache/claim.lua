#!lua flags=allow-oom
-- Marks a call by its idempotency key as running, or says what became of the one before it.
--
-- KEYS  1 the mark, 2 the answer.
-- ARGV  1 digest of the request, 2 call id, 3 milliseconds that a running call's mark lives without a renewal.
-- Gives {1} where it is this call's now; {0} while another with the same request runs; {2} where the key was another
--       request's; {3, answer} where it is done, the answer nil where it was not kept.

local mark = redis.call('GET', KEYS[1])
if not mark then
  redis.call('SET', KEYS[1], 'r ' .. ARGV[1] .. ' ' .. ARGV[2], 'PX', ARGV[3])
  return {1}
end
local state, digest = string.match(mark, '^(%a) (%x+)')
if digest ~= ARGV[1] then
  return {2}
end
if state == 'r' then
  return {0}
end
return {3, redis.call('GET', KEYS[2])}
