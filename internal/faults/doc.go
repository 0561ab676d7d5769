// Package faults tests the whole system under faults. It contains only tests, under the
// build tag faults, because they take longer than all other tests together.
//
//	make test-faults                    every named fault, and a walk of a minute
//	make test-faults-smoke              the cases that no other test replaces: smoke lists them
//	make test-faults RUN=TestFaults//SIGKILL
//	make test-chaos SEED=42 MINUTES=20  the random walk alone, for longer
//
// Each test has its own environment: a Kubernetes API server, Redis, PostgreSQL, the
// simulated WhatsApp, a stand-in for Laravel, two managers (one of them is the leader) and
// four workers, each a separate process with some dozens of sessions. Every process connects
// to each server through its own TCP proxy, which can reset or block the connections. Every
// process can be paused, resumed and killed, and is then restarted as a kubelet does. Every
// server can be stopped and started again.
//
// All the time contacts write to random sessions, under their numbers and their LIDs: texts,
// messages in groups, media, reactions, edits, receipts, and others (traffic_test.go lists them).
// The flag -messages is how many a second in each environment, and -flood how many more in the
// cases with a flood. In some cases, and in the random walk, further sessions are paired
// meanwhile: by QR code, by a code that is typed, and with a passkey. After the fault, these
// checks are made:
//
//   - no connection was doubled: no device logged in while an older connection
//     of it was alive;
//   - every session is back, on one running worker, which is the same in the resource
//     and in the simulator, and Laravel has it as connected;
//   - no key is lost: no device was unlinked or paired again, and each decrypts
//     a new message;
//   - no message is lost, doubled or disordered: the simulator's ledger is compared with what
//     Laravel has stored (ledger_test.go). Each message is acknowledged and stored under one
//     key, in the order in which WhatsApp delivered them to the session, one that could
//     not be read at first has been replaced, and none waits for Laravel any more. When an
//     environment ends, the messages of all its cases are compared once more;
//   - each session that was to be paired is connected, with exactly one device at its
//     account, and no code or request is left in its status, in its annotations, in Redis,
//     or at Laravel after its last status. When it is deleted, its device is unlinked.
//
// # The parts
//
//   - environment_test.go: the servers, the pods, the pairing at the beginning;
//     pod_test.go: a process and its kubelet; history_test.go: the changes
//     of the resources, and how long each device was not connected; laravel_test.go: the
//     receiver.
//   - traffic_test.go: what contacts write; messages_test.go and ledger_test.go: the comparison
//     of what was sent with what Laravel has; pairing_test.go: the sessions that are paired during a
//     fault, and the people who pair them.
//   - check_test.go: the checks, and the output for a person when one of them fails.
//   - cases_test.go: the named faults; walk_test.go: the random walk.
package faults
