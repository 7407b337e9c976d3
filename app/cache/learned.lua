#!lua
-- Puts a tenant's new model in the place of the one that it was made from.
--
-- KEYS  1 the model.
-- ARGV  1 version of the one before (0: none), 2 version of this one, 3 this one.
-- Gives 1; 0 where another is there by now.

local before = redis.call('HGET', KEYS[1], 'version') or '0'
if before ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'model', ARGV[3])
return 1
