-- ARGV: 5 id of a dead letter. Answer: 1 its item waits again, 0 there is no such dead
-- letter, -3 the session has a newer item, -4 the item has expired, -5 the dead letter
-- cannot be read. Only with 1 the dead letter is deleted.
run_when_full() -- it frees as much memory as it takes
local found = redis.call('XRANGE', DEAD, ARGV[5], ARGV[5])
if #found == 0 then
  return 0
end
local letter = {}
for i = 1, #found[1][2], 2 do
  letter[found[1][2][i]] = found[1][2][i + 1]
end
local sid, numbers, class, expires = letter.session_id, letter.numbers, letter.class, letter.expires
if not (sid and letter.payload and valid((numbers or '') .. (class or '') .. millis(0) .. (expires or '') .. letter.payload, ITEM)) then
  return -5
end
if tonumber(expires) > 0 and tonumber(expires) <= NOW then
  return -4
end
local last, old, flight = last_of(sid), item_of(sid), flight_of(sid)
if last and numbers_of(last) > numbers or old and numbers_of(old) >= numbers or flight then
  return -3
end
wait(sid, numbers .. class .. millis(NOW) .. expires .. letter.payload, class, NOW)
redis.call('XDEL', DEAD, ARGV[5])
return done(1)
