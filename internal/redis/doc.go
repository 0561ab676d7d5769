// Package redis is what every user of Redis in this program shares: how to reach it
// (Config, New), the names of its keys (Keys), whether it keeps what is written to it
// (Check, Monitor), when a write counts as in Redis (Durability), whether it has lost
// data (Watcher), and which installation owns it (ClaimInstallation).
//
// It works with one server, with Sentinel and with Redis Cluster, of version 6
// or newer (XTRIM MINID needs 6.2), and with what speaks its protocol. What a
// managed Redis forbids (CONFIG) or an embedded one does not know (INFO, WAIT)
// is taken as not offered.
package redis
