-- ARGV: 5 session, 6 numbers.
run_when_full()
local sid, numbers = ARGV[5], ARGV[6]
local item, flight = item_of(sid), flight_of(sid)
if item and numbers_of(item) <= numbers and not (flight and numbers_of(flight) == numbers_of(item)) then
  drop(sid)
end
set_last(sid, numbers)
delete_old_last()
return done(DONE)
