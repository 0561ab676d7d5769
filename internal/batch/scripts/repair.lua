-- Makes the keys of the queue consistent. Records that cannot be read are discarded;
-- missing due times, claims and marks are restored from the other keys.
-- Answer: {records discarded, records restored}.
run_when_full()
local discarded, restored = 0, 0

-- The stored batches, the oldest first.
local ids, known = {}, {}
for _, list in ipairs({ redis.call('HKEYS', CONTENT), redis.call('HKEYS', CLAIMS), redis.call('ZRANGE', OPEN, 0, -1) }) do
  for _, id in ipairs(list) do
    if not known[id] then
      known[id] = true
      ids[#ids + 1] = id
    end
  end
end
table.sort(ids)
local carried = {} -- session → its possible values in FLIGHT, the oldest first
for _, id in ipairs(ids) do
  local entries = entries_of(id)
  if not entries then
    discard(id)
    discarded = discarded + 1
  else
    if not attempt_of(redis.call('HGET', CLAIMS, id)) then
      redis.call('HSET', CLAIMS, id, '0:')
      restored = restored + 1
    end
    local open = tonumber(redis.call('ZSCORE', OPEN, id) or '')
    if not open or open > NOW + 900000 then
      redis.call('ZADD', OPEN, millis(NOW), id)
      restored = restored + 1
    end
    for _, e in ipairs(entries) do
      carried[e.sid] = carried[e.sid] or {}
      table.insert(carried[e.sid], numbers_of(e.item) .. id)
    end
  end
end

-- The sessions in flight.
local flights = redis.call('HGETALL', FLIGHT)
for i = 1, #flights, 2 do
  local sid, right = flights[i], false
  for _, flight in ipairs(carried[sid] or {}) do
    right = right or flight == flights[i + 1]
  end
  if not right then
    redis.call('HDEL', FLIGHT, sid)
    discarded = discarded + 1
  end
end
for sid, list in pairs(carried) do
  if redis.call('HEXISTS', FLIGHT, sid) == 0 then
    redis.call('HSET', FLIGHT, sid, list[1])
    restored = restored + 1
  end
end

-- Every item waits or is in flight, and is not older than the last delivered one.
for _, sid in ipairs(redis.call('HKEYS', ITEMS)) do
  local item, last = item_of(sid), last_of(sid)
  local urgent, normal = redis.call('ZSCORE', URGENT, sid), redis.call('ZSCORE', NORMAL, sid)
  if not item then
    drop(sid)
    discarded = discarded + 1
  elseif redis.call('HEXISTS', FLIGHT, sid) == 1 then
    if urgent or normal then
      redis.call('ZREM', URGENT, sid)
      redis.call('ZREM', NORMAL, sid)
      restored = restored + 1
    end
  elseif last and numbers_of(item) < numbers_of(last) then -- not <=: a replayed dead letter has the same numbers
    drop(sid)
    discarded = discarded + 1
  else
    local due = tonumber(class_of(item) == 'h' and urgent or class_of(item) == 'n' and normal or '')
    if not due or urgent and normal or due > NOW + QR_INTERVAL then
      due = due_of(item)
      if due > NOW + QR_INTERVAL then
        due = NOW
      end
      wait(sid, item, class_of(item), due)
      restored = restored + 1
    end
  end
end
for _, due in ipairs({ URGENT, NORMAL }) do
  for _, sid in ipairs(redis.call('ZRANGE', due, 0, -1)) do
    if redis.call('HEXISTS', ITEMS, sid) == 0 then
      redis.call('ZREM', due, sid)
      discarded = discarded + 1
    end
  end
end

-- Every entry of LAST has one in FORGET, so that it is deleted some day.
if redis.call('HLEN', LAST) ~= redis.call('ZCARD', FORGET) then
  for _, sid in ipairs(redis.call('HKEYS', LAST)) do
    if not redis.call('ZSCORE', FORGET, sid) then
      redis.call('ZADD', FORGET, millis(NOW), sid)
      restored = restored + 1
    end
  end
  for _, sid in ipairs(redis.call('ZRANGE', FORGET, 0, -1)) do
    if redis.call('HEXISTS', LAST, sid) == 0 then
      redis.call('ZREM', FORGET, sid)
      discarded = discarded + 1
    end
  end
end
damaged = false
done()
return { discarded, restored }
