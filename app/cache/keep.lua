#!lua
-- Keeps one entry of a tenant within its bytes: those that were used longest ago go first. Not where memory is full.
--
-- KEYS  1 the entry, 2 the tenant's entries by last use, 3 by when they end, 4 their bytes; its field '' is their sum.
-- ARGV  1 the entry's content, 2 milliseconds that it is kept, 3 the tenant's bytes.
-- Gives how many others had to go; -1 where it was not kept.
-- The keys of entries that go are not among KEYS; their names have the same hash tag.

local call, number = redis.call, tonumber
local BESIDE, ENDED_AT_ONCE, GONE_AT_ONCE = 256, 64, 512
-- Bytes that an entry costs beside its content: its name four times, and Redis's own (measured: 230 to 250).

local time = call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function forget(key)
  call('DEL', key)
  call('ZREM', KEYS[2], key)
  call('ZREM', KEYS[3], key)
  local bytes = call('HGET', KEYS[4], key)
  if bytes then
    call('HDEL', KEYS[4], key)
    call('HINCRBY', KEYS[4], '', -bytes)
  end
end

for _, key in ipairs(call('ZRANGE', KEYS[3], '-inf', now, 'BYSCORE', 'LIMIT', 0, ENDED_AT_ONCE)) do
  forget(key)
end

local bytes, most = #ARGV[1] + BESIDE, number(ARGV[3])
local gone = 0
local sum = number(call('HGET', KEYS[4], '') or 0) - number(call('HGET', KEYS[4], KEYS[1]) or 0)
while sum + bytes > most do
  local oldest = call('ZRANGE', KEYS[2], 0, 0)[1]
  if bytes > most or not oldest or gone == GONE_AT_ONCE then
    return -1
  end
  if oldest ~= KEYS[1] then
    sum = sum - number(call('HGET', KEYS[4], oldest) or 0)
    gone = gone + 1
  end
  forget(oldest)
end

call('HINCRBY', KEYS[4], '', bytes - number(call('HGET', KEYS[4], KEYS[1]) or 0))
call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
call('HSET', KEYS[4], KEYS[1], bytes)
call('ZADD', KEYS[2], now, KEYS[1])
call('ZADD', KEYS[3], now + ARGV[2], KEYS[1])
return gone
