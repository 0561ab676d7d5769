-- Answers with 12 numbers: see Queue.Backlog. The last is 1 if the queue must be
-- repaired.
local MAX_HOLD = 900000 -- maxHold in queue.go
local function first(key, min, max)
  local found = redis.call('ZRANGEBYSCORE', key, min, max, 'WITHSCORES', 'LIMIT', 0, 1)
  return found[2] and tonumber(found[2]) or 0
end
local now, later = millis(NOW), '(' .. millis(NOW)
local next_due, next_normal = first(URGENT, later, '+inf'), first(NORMAL, later, '+inf')
if next_due == 0 or next_normal > 0 and next_normal < next_due then
  next_due = next_normal
end
local waiting, in_flight, open = redis.call('ZCARD', URGENT) + redis.call('ZCARD', NORMAL), redis.call('HLEN', FLIGHT), redis.call('ZCARD', OPEN)
local items, claims, content = redis.call('HLEN', ITEMS), redis.call('HLEN', CLAIMS), redis.call('HLEN', CONTENT)
local broken = damaged
  or waiting > items or items > waiting + in_flight -- each item waits or is in flight
  or open ~= claims or open ~= content or (in_flight > 0) ~= (content > 0)
  or redis.call('HLEN', LAST) ~= redis.call('ZCARD', FORGET)
  -- A time so far in the future was written before a clock was set back.
  or redis.call('ZCOUNT', URGENT, '(' .. millis(NOW + QR_INTERVAL), '+inf') > 0
  or redis.call('ZCOUNT', NORMAL, '(' .. millis(NOW + QR_INTERVAL), '+inf') > 0
  or redis.call('ZCOUNT', OPEN, '(' .. millis(NOW + MAX_HOLD), '+inf') > 0
return {
  NOW,
  redis.call('ZCOUNT', URGENT, '-inf', now),
  redis.call('ZCOUNT', NORMAL, '-inf', now),
  first(URGENT, '-inf', now),
  first(NORMAL, '-inf', now),
  next_due,
  waiting,
  in_flight,
  open,
  redis.call('ZCOUNT', OPEN, '-inf', now),
  first(OPEN, later, '+inf'),
  broken and 1 or 0,
}
