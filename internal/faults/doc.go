// Package faults is the suite that breaks things: it holds tests only, under
// the build tag faults, because they take longer than all others together.
//
//	make test-faults                    every named fault, and a walk of a minute
//	make test-faults-smoke              those that no other test can show: smoke lists them
//	make test-faults RUN=TestFaults//SIGKILL
//	make test-chaos SEED=42 MINUTES=20  the random walk alone, for longer
//
// Each test has its own environment: a Kubernetes API server, Redis, PostgreSQL,
// the simulated WhatsApp, a stand-in for Laravel, two managers of which one
// leads, and four workers, each a separate process with some dozens of
// sessions. Every process reaches each of these servers through its own TCP proxy,
// which can be cut or made to hang; every process can be paused, continued and
// killed, and is started again as a kubelet does it; every server can be stopped and
// started again.
//
// While something goes wrong, contacts write to random sessions. When it is
// over, four checks are made:
//
//   - no connection was doubled: no device logged in while an older connection
//     of it was alive;
//   - every session is back, on one worker that lives and that the resource,
//     the simulator and Laravel agree on;
//   - no key is lost: no device was unlinked or paired again, and each decrypts
//     a new message;
//   - no message is lost: every message is acknowledged in the end.
//
// # The parts
//
//   - environment_test.go: the servers, the pods, the pairing at the beginning;
//     pod_test.go: a process and its kubelet; history_test.go: the changes
//     of the resources; laravel_test.go: the receiver.
//   - traffic_test.go: the messages, and how long each device was away.
//   - check_test.go: the checks, and what is printed for a person when one of
//     them fails.
//   - cases_test.go: the named faults; walk_test.go: the random walk.
package faults
