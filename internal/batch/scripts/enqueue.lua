-- ARGV[5]: 1 to refuse an item of a session of which nothing is known. From
-- 6 on: session, numbers, class, expires, payload of each item.
-- Answer for each item: 1 queued, 2 replaced, 3 unknown, 4 repeated; for a stale one
-- the newest numbers of the session.
local KNOWN_ONLY = ARGV[5] == '1'
local intact, changed = not damaged, false
local results = {}
for i = 6, #ARGV, 5 do
  local sid, numbers, class, expires, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local last, old = last_of(sid), item_of(sid)
  local result
  if KNOWN_ONLY and not last and not old then
    result = 3
  elseif last and not old and numbers == numbers_of(last) then
    result = 4
  elseif old and numbers == numbers_of(old) and (not last or numbers >= numbers_of(last)) then
    result = 1 -- a repetition: the first answer was lost
    if not flight_of(sid) and not redis.call('ZSCORE', URGENT, sid) and not redis.call('ZSCORE', NORMAL, sid) then
      wait(sid, old, class_of(old), due_of(old)) -- its due time is missing
      changed, damaged = true, true
    end
  elseif not last or numbers > numbers_of(last) then
    if not old or numbers > numbers_of(old) then
      local flight, due = flight_of(sid), due_at(last, class)
      result = 1
      if old and not (flight and numbers_of(flight) == numbers_of(old)) then
        -- The old item still waits: the new one gets its due time and its class if they are
        -- earlier and higher, so that Laravel is not informed later than without it.
        result = 2
        due = math.min(due, due_of(old))
        if class_of(old) == 'h' then
          class = 'h'
        end
      end
      local item = numbers .. class .. millis(due) .. expires .. payload
      if flight then
        redis.call('HSET', ITEMS, sid, item)
      else
        wait(sid, item, class, due)
      end
      changed = true
    end
  end
  if not result then -- stale
    result = last and numbers_of(last) or ''
    if old and numbers_of(old) > result then
      result = numbers_of(old)
    end
  end
  results[#results + 1] = result
end
-- If nothing was changed, the state is not written, because a full Redis would refuse it.
-- Damage from before this script is found without it.
if changed or intact and damaged then
  return done(results)
end
return results
