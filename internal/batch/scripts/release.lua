-- ARGV: 5 id, 6 attempt, 7 milliseconds until it may be claimed again.
run_when_full()
local id = ARGV[5]
local held = holds(id, ARGV[6])
if held == nil then
  return GONE
elseif not held then
  return LOST
end
redis.call('ZADD', OPEN, millis(NOW + tonumber(ARGV[7])), id)
redis.call('HSET', CLAIMS, id, ARGV[6] .. ':') -- the token's answer has come
return DONE
