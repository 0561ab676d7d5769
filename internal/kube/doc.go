// Package kube is the API server as a worker uses it: the sessions, with claims
// and releases ahead of reports; the proxies' Secrets; the revision of the
// worker's Deployment; Events. It implements what internal/worker declares.
package kube
