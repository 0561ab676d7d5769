-- ARGV: 5 id, 6 attempt, 7 and 8 the ids of the halves.
run_when_full()
local id = ARGV[5]
local held = holds(id, ARGV[6])
if held == nil then
  return GONE
elseif not held then
  return LOST
end
local halves = { {}, {} }
local entries = unpack_content(redis.call('HGET', CONTENT, id))
for i, e in ipairs(entries) do
  local half = halves[i <= math.ceil(#entries / 2) and 1 or 2]
  half[#half + 1] = e
end
discard(id)
store(ARGV[7], halves[1], '0:', NOW)
store(ARGV[8], halves[2], '0:', NOW)
return DONE
