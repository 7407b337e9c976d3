#!lua flags=allow-oom
-- Puts what a call used in the place of what it had reserved, once: the record goes with it. Its lease ends.
--
-- KEYS  as given to the reservation: 1 the call's record, then one key per limit.
-- ARGV  1 where the call's id begins in its record's name, 2 requests (1, or 0 to give the call back), 3 tokens and
--       4 nano-dollars used, then kind per limit.
-- Gives 1; 0 where there is no record: settled before, never reserved, or run out (the estimate stays charged).

local call, number = redis.call, tonumber
local record = call('GETDEL', KEYS[1])
local second, tokens, nanos
if record then
  second, tokens, nanos = string.match(record, '^(%d+) (%d+) (%d+)$')
  tokens, nanos = ARGV[3] - tokens, ARGV[4] - nanos
end

for n = 2, #KEYS do
  local key, kind = KEYS[n], ARGV[n + 3]
  if kind == 'concurrency' then
    call('ZREM', key, string.sub(KEYS[1], ARGV[1]))
  elseif record then
    local difference = nanos
    if kind == 'rpm' then
      difference = ARGV[2] - 1
    elseif kind == 'tpm' or kind == 'daily_tokens' then
      difference = tokens
    end
    if difference == 0 then
      -- as reserved
    elseif kind ~= 'rpm' and kind ~= 'tpm' then
      -- A counter that is gone was deleted, and with it what the call had taken.
      local sum = call('GET', key)
      if sum then
        call('SET', key, math.max(0, sum + difference), 'KEEPTTL')
      end
    elseif difference > 0 then
      -- `sum` is the total where `at` is this second; where it is not, the next reservation counts afresh.
      local time = call('TIME')
      call('HINCRBY', key, time[1], difference)
      call('HINCRBY', key, 'sum', difference)
      call('EXPIRE', key, 62)
    else
      -- Back to the second that it was taken in, and no more than that holds: it may have left the window, and its
      -- field with it, or somebody deleted the key.
      local refund = math.min(-difference, number(call('HGET', key, second) or 0))
      if refund > 0 then
        call('HINCRBY', key, second, -refund)
        call('HINCRBY', key, 'sum', -refund)
      end
    end
  end
end
return record and 1 or 0
