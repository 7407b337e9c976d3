#!lua flags=allow-oom
-- Takes what a call needs from every limit of one scope, or nothing from any.
-- Runs when memory is full too: calls must not fail for want of a counter.
--
-- KEYS  1 the call's lease, then one key per limit.
-- ARGV  1 seconds the lease lives, 2 the UTC day (days since 1970) that the names of day keys carry,
--       then kind, limit, amount per limit; kind is `60s` (any 60 seconds) or `day` (a UTC day).
-- Gives {1, remaining, reset_ms, remaining, reset_ms, …} when taken;
--       {0, n, wait_ms, remaining} when refused: by the n-th limit, the one that lasts longest;
--       {2, unix seconds} when Redis has another day than ARGV 2: nothing was taken, name the keys anew.
--
-- A `60s` limit is a hash with one field per second: unix second = amount taken in it. The seconds from now-60 to
-- now cover every interval of 60 seconds that ends now, so no such interval exceeds the limit. The field `sum` is
-- their total as long as `at` is the current second; each new second drops what has left and counts afresh.

local call, number = redis.call, tonumber
local time = call('TIME')
local second, now_us = number(time[1]), time[1] * 1000000 + time[2]
local day = math.floor(second / 86400)
local midnight = (day + 1) * 86400
if day ~= number(ARGV[2]) then
  return {2, second}
end

local function ms_until(later)
  return math.ceil((later * 1000000 - now_us) / 1000)
end

-- The total of the window in a new second.
local function afresh(key)
  local sum, gone = 0, {}
  local fields = call('HGETALL', key)
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
  call('HSET', key, 'at', second, 'sum', sum)
  call('EXPIRE', key, 62)
  return sum
end

-- Milliseconds until so much of the window has left that `excess` is free; of the whole window where that is too little.
local function wait(key, excess)
  local fields, amounts = call('HGETALL', key), {}
  for i = 1, #fields, 2 do
    amounts[fields[i]] = fields[i + 1]
  end
  for slot = second - 60, second do
    excess = excess - (amounts[tostring(slot)] or 0)
    if excess <= 0 then
      return ms_until(slot + 61)
    end
  end
  return ms_until(second + 61)
end

local sums, slots, refusal = {}, {}, nil
for n = 2, #KEYS do
  local key, at = KEYS[n], 3 * n - 3
  local limit, amount = number(ARGV[at + 1]), number(ARGV[at + 2])
  local sum
  if ARGV[at] == 'day' then
    sum = number(call('GET', key) or 0)
  else
    local kept = call('HMGET', key, 'at', 'sum', time[1])
    sum = kept[1] == time[1] and number(kept[2]) or afresh(key)
    slots[n] = number(kept[3] or 0)
  end
  sums[n] = sum + amount
  if sum + amount > limit then
    local wait_ms = ARGV[at] == 'day' and ms_until(midnight) or wait(key, sum + amount - limit)
    if not refusal or wait_ms > refusal[3] then
      refusal = {0, n - 1, wait_ms, math.max(0, limit - sum)}
    end
  end
end
if refusal then
  return refusal
end

local answer, lease = {1}, time[1]
for n = 2, #KEYS do
  local at = 3 * n - 3
  local amount, ends = ARGV[at + 2], second + 61
  if ARGV[at] == 'day' then
    -- Kept a day longer: a call over midnight is settled on the day that it was reserved on.
    call('SET', KEYS[n], sums[n], 'EXAT', midnight + 86400)
    ends = midnight
  else
    call('HSET', KEYS[n], 'sum', sums[n], time[1], slots[n] + amount)
  end
  lease = lease .. ' ' .. amount
  answer[2 * n - 2] = ARGV[at + 1] - sums[n]
  answer[2 * n - 1] = ms_until(ends)
end
call('SET', KEYS[1], lease, 'EX', ARGV[1])
return answer
