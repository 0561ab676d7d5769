-- ARGV[5]: 1 to refuse an item of a session of which nothing is remembered. From
-- 6 on: session, numbers, class, expires, payload of each item.
-- Answers for each 1 queued, 2 replaced, 3 unknown, 4 repeated; for one that is stale
-- the newest numbers of the session.
local KNOWN_ONLY = ARGV[5] == '1'
local results = {}
for i = 6, #ARGV, 5 do
  local sid, numbers, class, expires, payload = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local last = redis.call('HGET', LAST, sid)
  local old = redis.call('HGET', ITEMS, sid)
  local result
  if KNOWN_ONLY and not last and not old then
    result = 3
  elseif last and not old and numbers == numbers_of(last) then
    result = 4
  elseif not last or numbers > numbers_of(last) then
    if old and numbers == numbers_of(old) then
      result = 1 -- the answer to the first time was lost
    elseif not old or numbers > numbers_of(old) then
      local flight = redis.call('HGET', FLIGHT, sid)
      local due = due_at(last)
      result = 1
      if old and not (flight and numbers_of(flight) == numbers_of(old)) then
        -- The old one still waits: Laravel must hear from the session no later
        -- and no less urgently than it would have.
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
return results
