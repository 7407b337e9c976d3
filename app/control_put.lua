-- Writes one entry of the control channel and gives the channel a new version. Entries past their time go.
-- KEYS[1] the channel: a hash. ARGV: field, entry as JSON, version (a token never used before).
local now = tonumber(redis.call('TIME')[1])
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local ok, entry = pcall(cjson.decode, fields[i + 1])
  if ok and type(entry) == 'table' and type(entry['until']) == 'number' and entry['until'] < now then
    redis.call('HDEL', KEYS[1], fields[i])
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2], 'version', ARGV[3])
return redis.status_reply('OK')
