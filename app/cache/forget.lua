#!lua flags=allow-oom
-- Deletes a tenant's entries whose names begin with a text, some at a time; answers of idempotency keys (_) stay.
--
-- KEYS  1 the tenant's entries by last use, 2 by when they end, 3 their bytes; its field '' is their sum.
-- ARGV  1 how the names begin, 2 where to go on: 0, then what the last call gave.
-- Gives {where to go on, how many were deleted}; 0: that was all. Keys that go have the hash tag of KEYS.

local page = redis.call('ZSCAN', KEYS[1], ARGV[2], 'COUNT', 256)
local deleted = 0
for n = 1, #page[2], 2 do
  local key = page[2][n]
  if string.sub(key, 1, #ARGV[1]) == ARGV[1] and string.sub(key, #ARGV[1] + 1, #ARGV[1] + 1) ~= '_' then
    redis.call('DEL', key)
    redis.call('ZREM', KEYS[1], key)
    redis.call('ZREM', KEYS[2], key)
    local bytes = redis.call('HGET', KEYS[3], key)
    if bytes then
      redis.call('HDEL', KEYS[3], key)
      redis.call('HINCRBY', KEYS[3], '', -bytes)
    end
    deleted = deleted + 1
  end
end
return {page[1], deleted}
