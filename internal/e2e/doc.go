// Package e2e tests an installation in a real cluster: Helm, images, pods, nodes. The tests
// need the build tag e2e, a KUBECONFIG and a command that loads an image; without them they
// fail. `make e2e` runs all of them, `make e2e-smoke` the part that .ci/run waits for.
//
// # The parts
//
//   - main_test.go: flags and variables; e2e_test.go: the parts of the test, in their order.
//   - cluster_test.go: the cluster, its nodes, and the commands that are run.
//   - images_test.go: two builds of the product, and the image with the demo's commands.
//   - standins_test.go: the simulated WhatsApp, the phones and the stand-in for Laravel, which
//     run in a namespace apart from the release, so that they outlive it.
//   - sessions_test.go: sessions and what a watch has seen of them; check_test.go: what must
//     be true after each part, counted by the simulator and by the stand-in for Laravel.
//   - release_test.go: helm; the other files have one part each.
//
// # What is counted
//
// Doubled connections, logins and the time without a connection are the simulator's own
// numbers. A session is lost if it is not connected again, a message is lost if its receipt
// is missing or if it had to be encrypted again, and a state is lost if the stand-in for
// Laravel does not have the newest one.
package e2e
