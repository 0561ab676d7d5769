-- What all scripts of the queue share; it stands in front of each of them.
-- KEYS and the first four of ARGV are the same for all.
local ITEMS, URGENT, NORMAL, FLIGHT, LAST, FORGET, OPEN, CLAIMS, CONTENT, DEAD = unpack(KEYS)
local KIND, QR_INTERVAL, REMEMBER = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

-- A Redis that is full refuses what may take more memory, unless the script has
-- already written something that takes none: then all of its commands run, so that
-- it is not left half done. (This holds in every version; the flag allow-oom, which
-- says the same, exists from version 7 on, and older ones refuse a script that has
-- flags.) What empties the queue begins with this, so that a full Redis can be
-- emptied; only what fills it, enqueue, is refused.
local function run_when_full()
  redis.call('ZREM', FORGET, '')
end

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

-- An item: numbers (38), class (1), due (13), expires (13), payload.
local function numbers_of(item) return string.sub(item, 1, 38) end
local function class_of(item) return string.sub(item, 39, 39) end
local function due_of(item) return tonumber(string.sub(item, 40, 52)) end
local function expires_of(item) return tonumber(string.sub(item, 53, 65)) end

local function with_due(item, class, due)
  return numbers_of(item) .. class .. millis(due) .. string.sub(item, 53)
end

local function expired(item)
  local expires = expires_of(item)
  return expires > 0 and expires <= NOW
end

-- What was delivered last: numbers (38), when (13), expires (13).
-- The rule is that of dueAt in due.go.
local function due_at(last)
  if KIND ~= 'qr' or not last then
    return NOW
  end
  local at, expires = tonumber(string.sub(last, 39, 51)), tonumber(string.sub(last, 52, 64))
  if expires <= NOW then
    return NOW
  end
  return math.max(NOW, math.min(at + QR_INTERVAL, expires))
end

-- Lets an item wait for its claim.
local function wait(sid, item, class, due)
  redis.call('HSET', ITEMS, sid, with_due(item, class, due))
  if class == 'h' then
    redis.call('ZADD', URGENT, millis(due), sid)
    redis.call('ZREM', NORMAL, sid)
  else
    redis.call('ZADD', NORMAL, millis(due), sid)
  end
end

-- Remembers that nothing up to these numbers is of interest any more, and, if
-- it was delivered, when, and when the code that Laravel has expires.
local function remember(sid, numbers, delivered_expires)
  local last = redis.call('HGET', LAST, sid)
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
  local old = redis.call('ZRANGEBYSCORE', FORGET, '-inf', millis(NOW - REMEMBER), 'LIMIT', 0, 100)
  for _, sid in ipairs(old) do
    redis.call('HDEL', LAST, sid)
    redis.call('ZREM', FORGET, sid)
  end
end

-- Takes a session out of a batch. What was sent is removed; what replaced it
-- meanwhile waits from now on.
local function land(id, sid, sent)
  if redis.call('HGET', FLIGHT, sid) ~= sent .. id then
    return
  end
  redis.call('HDEL', FLIGHT, sid)
  local item = redis.call('HGET', ITEMS, sid)
  if not item then
    return
  end
  if numbers_of(item) == sent then
    redis.call('HDEL', ITEMS, sid)
  else
    local due = due_of(item)
    if KIND == 'qr' then
      due = due_at(redis.call('HGET', LAST, sid))
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

local function unpack_content(content)
  local entries, at = {}, 1
  while at <= #content do
    local n = tonumber(string.sub(content, at, at + 2))
    local sid = string.sub(content, at + 3, at + 2 + n)
    at = at + 3 + n
    n = tonumber(string.sub(content, at, at + 7))
    entries[#entries + 1] = { sid = sid, item = string.sub(content, at + 8, at + 7 + n) }
    at = at + 8 + n
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

-- A claim is written as <number of claims>:<token>.
local function attempt_of(claim) return tonumber(string.match(claim, '^(%d+):')) end

-- Does the caller hold the claim of the batch? nil: it is not stored any more.
local function holds(id, attempt)
  local claim = redis.call('HGET', CLAIMS, id)
  if not claim then
    return nil
  end
  return attempt_of(claim) == tonumber(attempt)
end

local GONE, DONE, LOST, FULL = 0, 1, -1, -2

