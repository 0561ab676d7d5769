-- ARGV: 5 id of a dead letter. Answers 1 when its item waits again, 0 when there is no
-- such letter, -3 when the session has something newer, -4 when the item has expired,
-- -5 when the letter cannot be read. Only with 1 the letter is gone.
run_when_full() -- it makes as much room as it takes
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
