package app

import (
	"strings"

	"github.com/go-logr/logr"

	"github.com/whatsapp-operator/whatsapp-operator/internal/metrics"
)

// The stores that the chart can bring along.
const (
	bundledRedis    = "redis"
	bundledDatabase = "database"
)

// reportBundledStores says in the log, in an Event and in a metric that stores are single
// servers without replicas or backups. It runs on the leader.
func reportBundledStores(names []string, log logr.Logger, event func(message string)) {
	metrics.SetBundledStores(names)
	if len(names) == 0 {
		return
	}
	message := "the chart's own stores (" + strings.Join(names, ", ") +
		") are for trying out: single servers without replicas, TLS and backups, and if their volumes are lost, so are the keys of every account. Give external stores for production (docs/install.md)"
	log.Info("WARNING: using the chart's own stores, which are for trying out", "stores", names)
	event(message)
}
