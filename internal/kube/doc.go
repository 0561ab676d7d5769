// Package kube implements the interfaces with which internal/worker uses the API server: it
// reads and writes sessions, with claims and releases before reports; it reads the proxies'
// Secrets and the revision of the worker's Deployment; and it records Events.
package kube
