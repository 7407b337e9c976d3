#!lua flags=allow-oom
-- An answer from before, or the lease to ask for it: of calls that are the same one asks the vendor at a time.
--
-- KEYS  1 the entry, 2 its lease, 3 the tenant's entries by last use.
-- ARGV  1 call id, 2 milliseconds of a lease.
-- Gives the entry; or 1 where the lease is this call's now; or 0 while another has it.

local entry = redis.call('GET', KEYS[1])
if entry then
  local time = redis.call('TIME')
  redis.call('ZADD', KEYS[3], 'XX', time[1] * 1000 + math.floor(time[2] / 1000), KEYS[1])
  return entry
end
return redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0
