// Package testenv starts the real servers that tests talk to: Redis,
// PostgreSQL and a Kubernetes API server. Each listens on a free loopback port
// with its data in a temporary folder, shares nothing with other servers, and ends
// with the test that started it.
package testenv
