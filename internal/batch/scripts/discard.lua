-- ARGV: 5 id, 6 attempt. Discards a batch whose content the caller cannot read.
run_when_full()
local id = ARGV[5]
local entries, missing = held(id, ARGV[6])
if not entries then
  return missing
end
for _, e in ipairs(entries) do
  end_flight(id, e.sid, numbers_of(e.item))
end
discard(id)
damaged = true
return done(DONE)
