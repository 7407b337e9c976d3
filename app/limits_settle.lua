#!lua flags=allow-oom
-- Puts what a call used in the place of what it had reserved in one scope, once: the lease goes with it.
--
-- KEYS  as given to the reservation: 1 the call's lease, then one key per limit.
-- ARGV  kind and amount used per limit; amounts of 0 give the reservation back.
-- Gives 1, or 0 where there is no lease: settled before, never reserved, or run out (the estimate stays charged).

local call, number = redis.call, tonumber
local lease = call('GETDEL', KEYS[1])
if not lease then
  return 0
end
local reserved = {}
for word in string.gmatch(lease, '%d+') do
  reserved[#reserved + 1] = number(word)
end
local reserved_at = reserved[1]
local time = call('TIME')

for n = 2, #KEYS do
  local key, kind = KEYS[n], ARGV[2 * n - 3]
  local difference = ARGV[2 * n - 2] - reserved[n]
  if difference ~= 0 and kind == 'day' then
    local midnight = (math.floor(reserved_at / 86400) + 1) * 86400
    local sum = number(call('GET', key) or 0) + difference
    call('SET', key, math.max(0, sum), 'EXAT', midnight + 86400)
  elseif difference > 0 then
    -- `sum` is the total where `at` is this second; where it is not, the next reservation counts afresh.
    call('HINCRBY', key, time[1], difference)
    call('HINCRBY', key, 'sum', difference)
    call('EXPIRE', key, 62)
  elseif difference < 0 then
    -- Back to the second that it was taken in, and no more than that holds: it may have left the window, and its
    -- field with it, or somebody deleted the key.
    local refund = math.min(-difference, number(call('HGET', key, reserved_at) or 0))
    if refund > 0 then
      call('HINCRBY', key, reserved_at, -refund)
      call('HINCRBY', key, 'sum', -refund)
    end
  end
end
return 1
