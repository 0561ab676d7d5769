-- Writes or deletes one value if it is not older than what is there.
-- KEYS: 1 the value, 2 the numbers of its deletion.
-- ARGV: 1 epoch, 2 seq, 3 the new value ('' deletes), 4 milliseconds to live,
-- 5 what to compare with the value (a QR code in JSON; '' nothing).
-- Answers 0 stale, 1 written, 2 the same again under newer numbers (not written).
local function compare(a, b)
  if #a ~= #b then
    return #a < #b and -1 or 1
  end
  return a == b and 0 or (a < b and -1 or 1)
end

local function compare_with(epoch, seq)
  local by_epoch = compare(ARGV[1], epoch)
  return by_epoch ~= 0 and by_epoch or compare(ARGV[2], seq)
end

local gone = redis.call('GET', KEYS[2])
if gone then
  local epoch, seq = string.match(gone, '^(%d+):(%d+)$')
  if epoch then
    local order = compare_with(epoch, seq)
    -- What has the same numbers was written before the deletion.
    if order < 0 or order == 0 and ARGV[3] ~= '' then
      return 0
    end
  end
end

local old = redis.call('GET', KEYS[1])
if old then
  local epoch, seq = string.match(old, '^{"epoch":(%d+),"seq":(%d+)[,}]')
  if epoch then
    local order = compare_with(epoch, seq)
    if order < 0 then
      return 0
    end
    if order > 0 and ARGV[5] ~= '' and string.find(old, ARGV[5], 1, true) then
      return 2
    end
  end
end

if ARGV[3] == '' then
  -- In this order a deletion also runs when the memory of Redis is full: DEL takes
  -- none, and a script that has written something is not stopped half done.
  redis.call('DEL', KEYS[1])
  redis.call('SET', KEYS[2], ARGV[1] .. ':' .. ARGV[2], 'PX', ARGV[4])
else
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
end
return 1
