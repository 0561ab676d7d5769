-- What all scripts of the queue share; it stands in front of each of them.
-- KEYS and the first four of ARGV are the same for all.
local ITEMS, URGENT, NORMAL, FLIGHT, LAST, FORGET, OPEN, CLAIMS, CONTENT, DEAD, STATE = unpack(KEYS)
local TYPES = { 'hash', 'zset', 'zset', 'hash', 'hash', 'zset', 'zset', 'hash', 'hash', 'stream', 'string' }
local KIND, QR_INTERVAL, NUMBERS_TTL = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

-- The clock of Redis, in milliseconds; a test may bring its own.
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

-- A Redis that is full refuses what may take more memory, unless the script has
-- already written something that takes none: then all of its commands run, so that
-- it is not left half done. (This holds in every version; the flag allow-oom, which
-- says the same, exists from version 7 on, and older ones refuse a script that has
-- flags.) What empties the queue begins with this, so that a full Redis can be
-- emptied; only what fills it, enqueue, is refused.
local function run_when_full()
  redis.call('ZREM', FORGET, '')
end

-- Keys can be deleted by a person, evicted, or overwritten by another program. No
-- script fails because of that: what cannot be read is discarded, and the queue is
-- marked as damaged, which makes the next Queue.Pending repair it and have everything
-- present published again. STATE is how many items the last script left in ITEMS:
-- another number there, or none, shows that keys are gone.
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

-- What was delivered last: numbers (38), when (13), expires (13).
local DELIVERED = '^' .. NUMBERS .. TIME .. TIME .. '$'
-- What is in flight: numbers (38), id of the batch.
local FLYING = '^' .. NUMBERS .. '.'

-- Is it a record as this pattern says, with numbers that can exist? Nothing could be
-- newer than an epoch above maxEpoch (record.go).
local function valid(value, pattern)
  return string.find(value, pattern) ~= nil
    and string.sub(value, 1, 19) <= '0009007199254740991' and string.sub(value, 20, 38) <= '9223372036854775807'
end

-- The value of a field; false where there is none. What is not written as it must
-- be is discarded.
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

-- What of a session is in flight. A batch that is not stored any more holds nobody.
local function flight_of(sid)
  local flight = read(FLIGHT, sid, FLYING)
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

-- due_at says from when on an item that arrives now may be claimed. last is what
-- remember wrote of the newest item that Laravel has.
--
-- A status is due at once: the windows (docs/architecture.md, "QR and status") are
-- the flusher's, which looks at all sessions together. A QR code is due when the
-- interval since the last one is over or the code that Laravel has expires,
-- whichever comes first: a code that replaces an expired one goes with the next batch.
local function due_at(last)
  if KIND ~= 'qr' or not last then
    return NOW
  end
  -- A delivery in the future is one from before the clock was set back.
  local at, expires = math.min(NOW, tonumber(string.sub(last, 39, 51))), tonumber(string.sub(last, 52, 64))
  if expires <= NOW then
    return NOW
  end
  return math.max(NOW, math.min(at + QR_INTERVAL, expires))
end

-- Lets an item wait for its claim.
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

-- Remembers that nothing up to these numbers is of interest any more, and, if
-- it was delivered, when, and when the code that Laravel has expires.
local function remember(sid, numbers, delivered_expires)
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

-- Drops what was remembered long ago, a little at each call.
local function forget()
  local old = redis.call('ZRANGEBYSCORE', FORGET, '-inf', millis(NOW - NUMBERS_TTL), 'LIMIT', 0, 100)
  for _, sid in ipairs(old) do
    redis.call('HDEL', LAST, sid)
    redis.call('ZREM', FORGET, sid)
  end
end

-- Takes a session out of a batch. What was sent is removed; what replaced it
-- meanwhile waits from now on.
local function land(id, sid, sent)
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
      due = due_at(last_of(sid))
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

-- Reads a string that has its length, in width digits, in front; nil where it is not so.
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

-- The entries of a stored batch; nil where it is not stored, or not as it must be.
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

-- Stores a batch that may be claimed from open on, and marks its sessions.
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

-- A claim is written as <number of claims>:<token>; nil where it is not.
local function attempt_of(claim) return tonumber(string.match(claim or '', '^(%d+):') or '') end

local GONE, DONE, LOST, FULL = 0, 1, -1, -2

-- The entries of a batch whose claim the caller holds; nil and GONE where it is not
-- stored any more, nil and LOST where another holds its claim. A batch of which the
-- claim is lost is the caller's: nobody has claimed it since.
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
