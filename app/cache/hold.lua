#!lua flags=allow-oom
-- Renews what is held, or lets go of it; what is another's by now is left alone.
--
-- KEYS  1 a lease or a running call's mark.
-- ARGV  1 what it says while it is this call's, 2 milliseconds from now on; 0 lets go.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  return redis.call('DEL', KEYS[1])
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
