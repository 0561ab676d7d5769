-- ARGV: 5 id, 6 attempt, 7 a new batch id, 8 highest number of dead letters, 9 their
-- greatest age in milliseconds, from 10 on: session, reason and answer of each rejected item.
run_when_full()
local id, new_id, most, age = ARGV[5], ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
local entries, missing = held(id, ARGV[6])
if not entries then
  return missing
end
local answers, reasons = {}, {}
for i = 10, #ARGV, 3 do
  reasons[ARGV[i]], answers[ARGV[i]] = ARGV[i + 1], ARGV[i + 2]
end
local taken, refused = {}, {}
for _, e in ipairs(entries) do
  local list = answers[e.sid] and refused or taken
  list[#list + 1] = e
end

local full = false
if #refused > 0 then
  -- The ids of the stream are times of Redis, even if a test gives its own clock.
  local t = redis.call('TIME')
  redis.call('XTRIM', DEAD, 'MINID', millis(math.max(0, tonumber(t[1]) * 1000 - age)) .. '-0')
  full = redis.call('XLEN', DEAD) + #refused > most
  if full and #taken == 0 then
    return FULL
  end
end

for _, e in ipairs(taken) do
  set_last(e.sid, numbers_of(e.item), expires_of(e.item))
  end_flight(id, e.sid, numbers_of(e.item))
end
local open = tonumber(redis.call('ZSCORE', OPEN, id) or NOW)
discard(id)
if full then
  store(new_id, refused, '0:', open)
else
  for _, e in ipairs(refused) do
    local numbers = numbers_of(e.item)
    redis.call('XADD', DEAD, '*',
      'session_id', e.sid,
      'epoch', (string.gsub(string.sub(numbers, 1, 19), '^0+(%d)', '%1')),
      'seq', (string.gsub(string.sub(numbers, 20, 38), '^0+(%d)', '%1')),
      'batch_id', id,
      'reason', reasons[e.sid],
      'answer', answers[e.sid],
      'numbers', numbers,
      'class', class_of(e.item),
      'expires', string.sub(e.item, 53, 65),
      'payload', string.sub(e.item, 66))
    set_last(e.sid, numbers)
    end_flight(id, e.sid, numbers)
  end
end
delete_old_last()
return done(full and FULL or DONE)
