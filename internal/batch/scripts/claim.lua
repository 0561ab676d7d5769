-- ARGV: 5 token, 6 a new batch id, 7 limit, 8 lease in milliseconds.
-- Answer: {now, until, id, attempt, content, expired items dropped, more}.
run_when_full()
local token, new_id, limit, until_ = ARGV[5], ARGV[6], tonumber(ARGV[7]), NOW + tonumber(ARGV[8])
local dropped = 0

-- The batch was claimed with this token, and the answer was lost: answer again.
local claims = redis.call('HGETALL', CLAIMS)
for i = 1, #claims, 2 do
  if string.match(claims[i + 1], '^%d+:(.*)$') == token then
    local open = tonumber(redis.call('ZSCORE', OPEN, claims[i]) or 0)
    if open > NOW and entries_of(claims[i]) then
      return { NOW, open, claims[i], attempt_of(claims[i + 1]), redis.call('HGET', CONTENT, claims[i]), 0, 0 }
    end
  end
end

-- A stored batch that is not claimed, the oldest first.
while true do
  local id
  for _, candidate in ipairs(redis.call('ZRANGEBYSCORE', OPEN, '-inf', millis(NOW), 'LIMIT', 0, 100)) do
    if not id or candidate < id then
      id = candidate
    end
  end
  if not id then
    break
  end
  local entries, live = entries_of(id), {}
  if not entries then
    discard(id)
    damaged = true
  else
    local content = redis.call('HGET', CONTENT, id)
    local attempt = attempt_of(redis.call('HGET', CLAIMS, id))
    damaged = damaged or not attempt
    attempt = (attempt or 0) + 1
    for _, e in ipairs(entries) do
      if not expired(e.item) then
        live[#live + 1] = e
      end
    end
    if #live < #entries then
      for _, e in ipairs(entries) do
        if expired(e.item) then
          end_flight(id, e.sid, numbers_of(e.item))
          dropped = dropped + 1
        end
      end
      discard(id)
      id, attempt, content = new_id, 1, pack(live)
    end
    if #live > 0 then
      store(id, live, attempt .. ':' .. token, until_)
      return done({ NOW, until_, id, attempt, content, dropped, 0 })
    end
  end
end

-- A new batch. Expired items are dropped, a bounded number in each run of the script.
local entries, more = {}, 0
for _, due in ipairs({ URGENT, NORMAL }) do
  if #entries < limit then
    local scan = limit - #entries + 200
    local sids = redis.call('ZRANGEBYSCORE', due, '-inf', millis(NOW), 'LIMIT', 0, scan)
    local seen = 0
    for _, sid in ipairs(sids) do
      if #entries >= limit then
        break
      end
      seen = seen + 1
      redis.call('ZREM', due, sid)
      local item = item_of(sid)
      if not item or flight_of(sid) then -- it is missing, or an item of the session is in flight
        damaged = true
      elseif expired(item) then
        drop(sid)
        dropped = dropped + 1
      else
        entries[#entries + 1] = { sid = sid, item = item }
        redis.call('ZREM', due == URGENT and NORMAL or URGENT, sid)
      end
    end
    if seen == scan then
      more = 1
    end
  end
end
if #entries == 0 then
  return done({ NOW, 0, '', 0, '', dropped, more })
end
table.sort(entries, function(a, b)
  local x, y = due_of(a.item), due_of(b.item)
  if x == y then
    return a.sid < b.sid
  end
  return x < y
end)
store(new_id, entries, '1:' .. token, until_)
return done({ NOW, until_, new_id, 1, pack(entries), dropped, 0 })
