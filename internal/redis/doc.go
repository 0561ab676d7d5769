// Package redis is what every user of Redis in this program shares: how to
// reach it (Config, New), how its keys are called (Keys), whether it may be
// trusted to keep what it is given (Check, Monitor), when something counts as
// in Redis (Durability), whether it has forgotten (Watcher), and whose it is
// (ClaimInstallation).
//
// It works with one server, with Sentinel and with Redis Cluster, of version 6
// or newer (XTRIM MINID needs 6.2), and with what speaks its protocol. What a
// managed Redis forbids (CONFIG) or an embedded one does not know (INFO, WAIT)
// is taken as not offered.
package redis
