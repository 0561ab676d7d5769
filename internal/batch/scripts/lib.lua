-- The common part of all scripts of the queue; it is put in front of each of them.
-- KEYS and the first four of ARGV are the same for all.
local ITEMS, URGENT, NORMAL, FLIGHT, LAST, FORGET, OPEN, CLAIMS, CONTENT, DEAD, STATE = unpack(KEYS)
local TYPES = { 'hash', 'zset', 'zset', 'hash', 'hash', 'zset', 'zset', 'hash', 'hash', 'stream', 'string' }
local KIND, QR_INTERVAL, NUMBERS_TTL = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

-- The clock of Redis, in milliseconds; a test may give its own.
local function clock()
  if ARGV[1] ~= '' then
    return tonumber(ARGV[1])
  end
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
local NOW = clock()

local function millis(n)
  return string.format('%013d', n)
end

-- A full Redis refuses a command that may take more memory, unless the script has
-- already made a write that takes none: then all commands of the script run, so that
-- it does not end half done. (This is so in every version. The flag allow-oom does the
-- same, but only from version 7 on; older versions refuse a script with flags.) The
-- scripts that empty the queue call this first, so that a full Redis can be emptied;
-- only enqueue, which fills the queue, is refused.
local function run_when_full()
  redis.call('ZREM', FORGET, '')
end

-- Keys can be deleted by a person, evicted, or overwritten by another program. No
-- script fails because of that: it discards what it cannot read, and marks the queue as
-- damaged. The next Queue.Backlog then repairs the queue and makes every process publish
-- its present state again. STATE is how many items the last script left in ITEMS: if it
-- is missing or ITEMS has another size, keys are missing.
local damaged = false
for i, want in ipairs(TYPES) do
  local found = redis.call('TYPE', KEYS[i])
  found = type(found) == 'table' and found.ok or found
  if found ~= 'none' and found ~= want then
    redis.call('DEL', KEYS[i])
    damaged = true
  end
end
damaged = damaged or redis.call('GET', STATE) ~= tostring(redis.call('HLEN', ITEMS))

-- Ends a script that has changed something.
local function done(answer)
  redis.call('SET', STATE, damaged and 'damaged' or redis.call('HLEN', ITEMS))
  return answer
end

-- An item: numbers (38), class (1), due (13), expires (13), payload.
local NUMBERS, TIME = string.rep('%d', 38), string.rep('%d', 13)
local ITEM = '^' .. NUMBERS .. '[hn]' .. TIME .. TIME .. '.'
local function numbers_of(item) return string.sub(item, 1, 38) end
local function class_of(item) return string.sub(item, 39, 39) end
local function due_of(item) return tonumber(string.sub(item, 40, 52)) end
local function expires_of(item) return tonumber(string.sub(item, 53, 65)) end

-- The last delivered item: numbers (38), time (13), expires (13).
local DELIVERED = '^' .. NUMBERS .. TIME .. TIME .. '$'
-- An item in flight: numbers (38), id of the batch.
local IN_FLIGHT = '^' .. NUMBERS .. '.'

-- Reports whether a record has this pattern and possible numbers. No update could be newer
-- than one with an epoch above maxEpoch (record.go).
local function valid(value, pattern)
  return string.find(value, pattern) ~= nil
    and string.sub(value, 1, 19) <= '0009007199254740991' and string.sub(value, 20, 38) <= '9223372036854775807'
end

-- The value of a field; false if there is none. A value without the pattern is discarded.
local function read(key, field, pattern)
  local value = redis.call('HGET', key, field)
  if value and not valid(value, pattern) then
    redis.call('HDEL', key, field)
    damaged = true
    return false
  end
  return value
end
local function item_of(sid) return read(ITEMS, sid, ITEM) end
local function last_of(sid) return read(LAST, sid, DELIVERED) end

-- The item in flight of a session. A mark of a batch that is not stored any more is discarded.
local function flight_of(sid)
  local flight = read(FLIGHT, sid, IN_FLIGHT)
  if flight and redis.call('HEXISTS', CONTENT, string.sub(flight, 39)) == 0 then
    redis.call('HDEL', FLIGHT, sid)
    damaged = true
    return false
  end
  return flight
end

local function with_due(item, class, due)
  return numbers_of(item) .. class .. millis(due) .. string.sub(item, 53)
end

local function expired(item)
  local expires = expires_of(item)
  return expires > 0 and expires <= NOW
end

-- due_at is the time from which an item that arrives now may be claimed. last is the
-- record of the newest item that Laravel has, written by set_last.
--
-- A status is due at once: the windows (docs/architecture.md, "QR and status") belong to
-- the flusher, which considers all sessions together. A QR code is due when the
-- interval since the last one is over or the code that Laravel has expires,
-- whichever comes first: a code that replaces an expired one is sent with the next batch.
-- So is one with a high class: WhatsApp does not accept the code that Laravel has.
local function due_at(last, class)
  if KIND ~= 'qr' or class == 'h' or not last then
    return NOW
  end
  -- A time of delivery in the future was written before the clock was set back.
  local at, expires = math.min(NOW, tonumber(string.sub(last, 39, 51))), tonumber(string.sub(last, 52, 64))
  if expires <= NOW then
    return NOW
  end
  return math.max(NOW, math.min(at + QR_INTERVAL, expires))
end

-- Stores an item that waits for its claim.
local function wait(sid, item, class, due)
  redis.call('HSET', ITEMS, sid, with_due(item, class, due))
  redis.call('ZADD', class == 'h' and URGENT or NORMAL, millis(due), sid)
  redis.call('ZREM', class == 'h' and NORMAL or URGENT, sid)
end

local function drop(sid)
  redis.call('HDEL', ITEMS, sid)
  redis.call('ZREM', URGENT, sid)
  redis.call('ZREM', NORMAL, sid)
end

-- Records that items up to these numbers are finished; if the item was delivered, also the
-- time, and when the code that Laravel has expires.
local function set_last(sid, numbers, delivered_expires)
  local last = last_of(sid)
  local at = last and string.sub(last, 39) or (millis(0) .. millis(0))
  if delivered_expires then
    at = millis(NOW) .. millis(delivered_expires)
  end
  if last and numbers_of(last) > numbers then
    numbers = numbers_of(last)
  end
  redis.call('HSET', LAST, sid, numbers .. at)
  redis.call('ZADD', FORGET, millis(NOW), sid)
end

-- Deletes old records of finished items, at most 100 at each call.
local function delete_old_last()
  local old = redis.call('ZRANGEBYSCORE', FORGET, '-inf', millis(NOW - NUMBERS_TTL), 'LIMIT', 0, 100)
  for _, sid in ipairs(old) do
    redis.call('HDEL', LAST, sid)
    redis.call('ZREM', FORGET, sid)
  end
end

-- Ends the flight of a session's item: removes the item that was sent; an item that
-- replaced it waits from now on.
local function end_flight(id, sid, sent)
  local flight = redis.call('HGET', FLIGHT, sid)
  if flight and flight ~= sent .. id then
    return
  end
  damaged = damaged or not flight
  redis.call('HDEL', FLIGHT, sid)
  local item = item_of(sid)
  if not item then
    return
  end
  if numbers_of(item) == sent then
    drop(sid)
  else
    local due = due_of(item)
    if KIND == 'qr' then
      due = due_at(last_of(sid), class_of(item))
    end
    wait(sid, item, class_of(item), due)
  end
end

-- The content of a batch: for each item the length of the session's id (3), the
-- id, the length of the item (8), the item.
local function pack(entries)
  local parts = {}
  for _, e in ipairs(entries) do
    parts[#parts + 1] = string.format('%03d', #e.sid) .. e.sid .. string.format('%08d', #e.item) .. e.item
  end
  return table.concat(parts)
end

-- Reads a string that begins with its length, in width digits; nil if it does not.
local function cut(content, at, width)
  local length = string.sub(content, at, at + width - 1)
  if not string.find(length, '^' .. string.rep('%d', width) .. '$') then
    return nil
  end
  local value = string.sub(content, at + width, at + width - 1 + tonumber(length))
  if value == '' or #value ~= tonumber(length) then
    return nil
  end
  return value, at + width + #value
end

-- The entries of a stored batch; nil if it is not stored or cannot be read.
local function entries_of(id)
  local content = redis.call('HGET', CONTENT, id)
  if not content or content == '' then
    return nil
  end
  local entries, at = {}, 1
  while at <= #content do
    local sid, item
    sid, at = cut(content, at, 3)
    if sid then
      item, at = cut(content, at, 8)
    end
    if not item or not valid(item, ITEM) then
      return nil
    end
    entries[#entries + 1] = { sid = sid, item = item }
  end
  return entries
end

-- Stores a batch that may be claimed from the time open, and marks its sessions as in flight.
local function store(id, entries, claim, open)
  redis.call('HSET', CONTENT, id, pack(entries))
  redis.call('HSET', CLAIMS, id, claim)
  redis.call('ZADD', OPEN, millis(open), id)
  for _, e in ipairs(entries) do
    redis.call('HSET', FLIGHT, e.sid, numbers_of(e.item) .. id)
  end
end

local function discard(id)
  redis.call('HDEL', CONTENT, id)
  redis.call('HDEL', CLAIMS, id)
  redis.call('ZREM', OPEN, id)
end

-- The number of claims, of a record <number of claims>:<token>; nil if it has another form.
local function attempt_of(claim) return tonumber(string.match(claim or '', '^(%d+):') or '') end

local GONE, DONE, LOST, FULL = 0, 1, -1, -2

-- The entries of a batch whose claim the caller holds; nil and GONE if it is not stored any
-- more, nil and LOST if another process has claimed it since. If the record of the claim
-- is missing, no other process has claimed the batch, so the caller still holds it.
local function held(id, attempt)
  local claim = redis.call('HGET', CLAIMS, id)
  local number = attempt_of(claim)
  if number and number ~= tonumber(attempt) then
    return nil, LOST
  end
  local entries = entries_of(id)
  if not entries and (claim or redis.call('HEXISTS', CONTENT, id) == 1) then
    discard(id)
    damaged = true
    return nil, done(GONE)
  end
  if entries and not number then
    damaged = true
  end
  return entries, GONE
end
