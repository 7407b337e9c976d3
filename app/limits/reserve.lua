#!lua flags=allow-oom
-- Takes what a call needs from every limit of one scope, or nothing from any.
-- Runs when memory is full too: calls must not fail for want of a counter.
--
-- KEYS  1 the call's record, then one key per limit, last the mark that daily and monthly counters are whole;
--       where an answer from before will do, three more: its entry, its lease, its tenant's entries by last use.
-- ARGV  1 where the call's id begins in its record's name, 2 seconds that the record lives, 3 milliseconds of a lease,
--       4 tokens, 5 nano-dollars, 6 and 7 the unix seconds from and before which the keys of daily and monthly limits
--       have the right name, then kind and limit per limit; with those three keys, the milliseconds of a lease.
--       An empty id only looks: nothing is taken, nothing refused. Tokens of -1: an answer from before was found
--       elsewhere, so one request is taken, and no more.
-- Gives {1, now_ms, left, left, …}, when taken: what each limit has left now; with those three keys, then the
--       entry, or as look.lua gives them 1 or 0 for its lease. With an entry one request was taken, and no more.
--       {0, now_ms, left, …, wait_ms, …} when refused, with nothing taken from what is left: -1 for a limit that is not
--       in the way, of a `rpm` or `tpm` that is the milliseconds until enough of its window has left, else 0;
--       {2, now_ms} when the names of keys are of another day than Redis's;
--       {3, now_ms} when a daily or monthly counter is not there, nor the mark: what was used is not known.
--
-- `rpm`, `tpm`: a hash with one field per second: unix second = amount taken in it. The seconds from now-60 to now
-- cover every interval of 60 seconds that ends now, so no such interval exceeds the limit. The field `sum` is their
-- total as long as `at` is the current second; each new second drops what has left and counts afresh.
-- `concurrency`: a sorted set of call ids by the millisecond when their lease lapses.
-- `daily_tokens`, `daily_usd`, `monthly_usd`: a counter per day or month; USD are nano-dollars.

local call, number = redis.call, tonumber
local id = string.sub(KEYS[1], ARGV[1])
local time = call('TIME')
local second = number(time[1])
local now_ms = second * 1000 + math.floor(time[2] / 1000)
if second < number(ARGV[6]) or second >= number(ARGV[7]) then
  return {2, now_ms}
end

local tokens, nanos = number(ARGV[4]), number(ARGV[5])
local last, entry = #KEYS - 1, false
if #ARGV % 2 == 0 then
  last = last - 3
  entry = call('GET', KEYS[last + 2])
end
local answered = entry or tokens < 0
local answer, sums, amounts, slots, refused = {1, now_ms}, {}, {}, {}, false
for n = 2, last do
  local key, kind, limit = KEYS[n], ARGV[2 * n + 4], number(ARGV[2 * n + 5])
  local sum, amount = 0, 1
  if kind == 'rpm' or kind == 'tpm' then
    if kind == 'tpm' then
      amount = tokens
    end
    local kept = call('HMGET', key, 'at', 'sum', time[1])
    slots[n] = number(kept[3] or 0)
    if kept[1] == time[1] then
      sum = number(kept[2])
    else
      local gone, fields = {}, call('HGETALL', key)
      for i = 1, #fields, 2 do
        local slot = number(fields[i])
        -- A slot from far ahead is left by a clock that was set back.
        if slot and (slot < second - 60 or slot > second + 60) then
          gone[#gone + 1] = fields[i]
        elseif slot then
          sum = sum + fields[i + 1]
        end
      end
      if #gone > 0 then
        call('HDEL', key, unpack(gone))
      end
      call('HSET', key, 'at', time[1], 'sum', sum)
      call('EXPIRE', key, 62)
    end
  elseif kind == 'concurrency' then
    sum = call('ZCARD', key)
    if sum >= limit then
      call('ZREMRANGEBYSCORE', key, '-inf', now_ms)
      sum = call('ZCARD', key)
    end
  else
    amount = kind == 'daily_tokens' and tokens or nanos
    local kept = call('GET', key)
    if not kept and call('EXISTS', KEYS[last + 1]) == 0 then
      return {3, now_ms}
    end
    slots[n] = kept
    sum = number(kept or 0)
  end
  if answered and kind ~= 'rpm' then
    amount = 0
  else
    refused = refused or sum + amount > limit
  end
  sums[n], amounts[n], answer[n + 1] = sum, amount, limit - sum
end

if id == '' then
  return answer
end

if refused then
  answer[1] = 0
  for n = 2, last do
    local kind, left, wait_ms = ARGV[2 * n + 4], answer[n + 1], -1
    if amounts[n] <= left or (answered and kind ~= 'rpm') then
      -- it has room, or is not asked for any
    elseif kind ~= 'rpm' and kind ~= 'tpm' then
      wait_ms = 0
    else
      -- Until as much has left as this call lacks; the whole window where even that is too little.
      local fields, taken, lacks, free_at = call('HGETALL', KEYS[n]), {}, amounts[n] - left, second + 61
      for i = 1, #fields, 2 do
        taken[fields[i]] = fields[i + 1]
      end
      for slot = second - 60, second do
        lacks = lacks - (taken[tostring(slot)] or 0)
        if lacks <= 0 then
          free_at = slot + 61
          break
        end
      end
      wait_ms = free_at * 1000 - now_ms
    end
    answer[last + n] = wait_ms
  end
  return answer
end

for n = 2, last do
  local key, kind = KEYS[n], ARGV[2 * n + 4]
  if answered and kind ~= 'rpm' then
    -- what was answered before costs nothing
  elseif kind == 'rpm' or kind == 'tpm' then
    call('HSET', key, 'sum', sums[n] + amounts[n], time[1], slots[n] + amounts[n])
  elseif kind == 'concurrency' then
    call('ZADD', key, now_ms + ARGV[3], id)
    call('EXPIRE', key, 86400)
  elseif slots[n] then
    call('INCRBY', key, amounts[n])
  else
    -- Longer than the period, with time for a call over its end to be settled on it.
    call('SET', key, amounts[n], 'EX', kind == 'monthly_usd' and 2937600 or 259200)
  end
  answer[n + 1] = answer[n + 1] - amounts[n]
end
call('SET', KEYS[1], time[1] .. (answered and ' 0 0' or ' ' .. ARGV[4] .. ' ' .. ARGV[5]), 'EX', ARGV[2])
if entry then
  call('ZADD', KEYS[#KEYS], 'XX', now_ms, KEYS[last + 2])
  answer[last + 2] = entry
elseif #ARGV % 2 == 0 then
  answer[last + 2] = call('SET', KEYS[last + 3], id, 'NX', 'PX', ARGV[8 + 2 * (last - 1)]) and 1 or 0
end
return answer
