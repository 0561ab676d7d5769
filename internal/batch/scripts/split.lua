-- ARGV: 5 id, 6 attempt, 7 and 8 the ids of the halves.
run_when_full()
local id = ARGV[5]
local entries, missing = held(id, ARGV[6])
if not entries then
  return missing
end
local halves = { {}, {} }
for i, e in ipairs(entries) do
  local half = halves[i <= math.ceil(#entries / 2) and 1 or 2]
  half[#half + 1] = e
end
discard(id)
for i, half in ipairs(halves) do
  if #half > 0 then
    store(ARGV[6 + i], half, '0:', NOW)
  end
end
return done(DONE)
