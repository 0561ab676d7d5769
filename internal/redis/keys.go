package redis

import "github.com/whatsapp-operator/whatsapp-operator/internal/delivery"

// Keys builds the names of all keys, each with the prefix of this installation. The zero
// value has no prefix.
//
// On Redis Cluster the part in braces decides on which node a key lives. The
// queues share one, {queue}, because their scripts touch several keys; a
// session's keys are on a node each.
type Keys struct{ prefix string }

// NewKeys puts prefix in front of every key. It must not contain braces
// (Config.Validate sees to it).
func NewKeys(prefix string) Keys { return Keys{prefix: prefix} }

// Key is any other key of this installation, with the prefix in front.
func (k Keys) Key(name string) string { return k.prefix + name }

// QR is where a session's newest QR code is, readable for Laravel.
func (k Keys) QR(sessionID string) string { return k.prefix + "session:" + sessionID + ":qr" }

// Status is where a session's status is, readable for Laravel.
func (k Keys) Status(sessionID string) string { return k.prefix + "session:" + sessionID + ":status" }

// Connection is where it is recorded which worker holds a session's connection, readable
// for Laravel.
func (k Keys) Connection(sessionID string) string {
	return k.prefix + "session:" + sessionID + ":connection"
}

// Sibling is a second key on the same node of a Redis Cluster as key: the
// braces make the whole of key its hash tag.
func (k Keys) Sibling(key, suffix string) string { return k.prefix + suffix + ":{" + key + "}" }

// Queue is a part of the queue of one kind.
func (k Keys) Queue(kind delivery.Kind, part string) string {
	return k.prefix + "batch:{queue}:" + string(kind) + ":" + part
}

// DeadLetters is the stream of the items that Laravel refused for good.
func (k Keys) DeadLetters(kind delivery.Kind) string {
	return k.prefix + "batch:{queue}:dead:" + string(kind)
}

// Wake is the channel to which every enqueue is published.
func (k Keys) Wake() string { return k.prefix + "batch:{queue}:wake" }

// Marker holds a random id. Where it is missing or has another value, Redis has lost
// data.
func (k Keys) Marker() string { return k.prefix + "operator:marker" }

// Installation holds the id of the installation that owns the data.
func (k Keys) Installation() string { return k.prefix + "operator:installation" }

// Workers holds each worker's second heartbeat, by its name.
func (k Keys) Workers() string { return k.prefix + "operator:workers" }
