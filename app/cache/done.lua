#!lua flags=allow-oom
-- Marks a call that was running as done. A mark that is another's by now is left alone.
--
-- KEYS  1 the mark.
-- ARGV  1 digest of the request, 2 call id, 3 milliseconds that the mark is kept.

if redis.call('GET', KEYS[1]) ~= 'r ' .. ARGV[1] .. ' ' .. ARGV[2] then
  return 0
end
redis.call('SET', KEYS[1], 'd ' .. ARGV[1], 'PX', ARGV[3])
return 1
