// Package testenv starts real servers for tests: Redis, PostgreSQL and a Kubernetes API
// server. Each listens on a free loopback port, has its data in a temporary folder, shares
// nothing with other servers, and ends with the test that started it.
package testenv
