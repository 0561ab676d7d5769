-- Answers with 11 numbers: see Queue.Pending.
local function first(key, min, max)
  local found = redis.call('ZRANGEBYSCORE', key, min, max, 'WITHSCORES', 'LIMIT', 0, 1)
  return found[2] and tonumber(found[2]) or 0
end
local now, later = millis(NOW), '(' .. millis(NOW)
local next_due, next_normal = first(URGENT, later, '+inf'), first(NORMAL, later, '+inf')
if next_due == 0 or next_normal > 0 and next_normal < next_due then
  next_due = next_normal
end
return {
  NOW,
  redis.call('ZCOUNT', URGENT, '-inf', now),
  redis.call('ZCOUNT', NORMAL, '-inf', now),
  first(URGENT, '-inf', now),
  first(NORMAL, '-inf', now),
  next_due,
  redis.call('ZCARD', URGENT) + redis.call('ZCARD', NORMAL),
  redis.call('HLEN', FLIGHT),
  redis.call('ZCARD', OPEN),
  redis.call('ZCOUNT', OPEN, '-inf', now),
  first(OPEN, later, '+inf'),
}
