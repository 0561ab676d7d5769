-- ARGV: 5 session, 6 numbers.
run_when_full()
local sid, numbers = ARGV[5], ARGV[6]
local item, flight = redis.call('HGET', ITEMS, sid), redis.call('HGET', FLIGHT, sid)
if item and numbers_of(item) <= numbers and not (flight and numbers_of(flight) == numbers_of(item)) then
  redis.call('HDEL', ITEMS, sid)
  redis.call('ZREM', URGENT, sid)
  redis.call('ZREM', NORMAL, sid)
end
remember(sid, numbers)
forget()
return DONE
