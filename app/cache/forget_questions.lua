#!lua flags=allow-oom
-- Forgets a tenant's questions whose vector sets' names begin with a text, some at a time.
--
-- KEYS  1 the tenant's questions by last use: `<vector set> <id>`.
-- ARGV  1 how the names begin, 2 where to go on: 0, then what the last call gave.
-- Gives where to go on; 0: that was all. The vector sets have the hash tag of KEYS.

local page = redis.call('ZSCAN', KEYS[1], ARGV[2], 'COUNT', 256)
for n = 1, #page[2], 2 do
  local member = page[2][n]
  if string.sub(member, 1, #ARGV[1]) == ARGV[1] then
    redis.call('DEL', (string.match(member, '^(.*) %S+$')))
    redis.call('ZREM', KEYS[1], member)
  end
end
return page[1]
