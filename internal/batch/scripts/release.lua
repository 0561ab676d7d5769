-- ARGV: 5 id, 6 attempt, 7 milliseconds until it may be claimed again.
run_when_full()
local id = ARGV[5]
local entries, missing = held(id, ARGV[6])
if not entries then
  return missing
end
redis.call('ZADD', OPEN, millis(NOW + tonumber(ARGV[7])), id)
redis.call('HSET', CLAIMS, id, ARGV[6] .. ':') -- without a token: the answer to this claim has arrived
return done(DONE)
