package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

const (
	// heartbeatWait is how long a renewal may take to a replica; the whole renewal has 2 s
	// (docs/architecture.md, "Ownership").
	heartbeatWait = "1000"
	// staleReplica is how many seconds a replica may have been silent and still show that
	// this primary is not cut off. A replica reports each second.
	staleReplica = 5
	// replicasLostTimeout is for how long a primary that has lost all its replicas is not
	// trusted: one that is cut off drops them after repl-timeout (60 s by default), while
	// another one may be elected on the other side.
	replicasLostTimeout = 5 * time.Minute
)

// ErrNoPrimary says that the server that answers is not a primary, or one that its
// replicas may have replaced: the heartbeats that it holds may be old.
var ErrNoPrimary = errors.New("no Redis primary answers")

// OtherIncarnationError says that another incarnation uses a worker's name.
type OtherIncarnationError struct {
	// Incarnation is the one that Redis holds.
	Incarnation string
}

func (e *OtherIncarnationError) Error() string {
	return "Redis holds the heartbeat of another incarnation of this worker"
}

// Heartbeat is the workers' second heartbeat: a hash with a value for each worker,
// "incarnation/count", whose count the worker raises. A missing value is not the end of
// a worker: Redis may have been emptied. It may be used by many goroutines.
type Heartbeat struct {
	client goredis.UniversalClient
	key    string
	now    func() time.Time

	mu sync.Mutex
	// run is the primary's run id, and replicated when it last had a replica.
	run        string
	replicated time.Time
}

// NewHeartbeat does no I/O. The client should be used for nothing else: a renewal must
// not wait for a connection behind the requests of a thousand sessions.
func NewHeartbeat(client goredis.UniversalClient, keys Keys) *Heartbeat {
	return &Heartbeat{client: client, key: keys.Workers(), now: time.Now}
}

// renewScript compares the incarnation and raises the count in one step. ARGV: worker,
// incarnation, the incarnation that may be replaced. It returns the other incarnation
// that uses the name, or an empty string.
// The first command changes nothing. A Redis that is full refuses a script's first
// command that may take more memory, but not what comes after a write that takes none.
var renewScript = `
redis.call('HDEL', KEYS[1], '')
local found = redis.call('HGET', KEYS[1], ARGV[1])
local count = 0
if found then
	local incarnation, n = string.match(found, '^(.*)/(%d+)$')
	if incarnation == ARGV[2] then
		count = tonumber(n)
	elseif incarnation and incarnation ~= ARGV[3] then
		return incarnation
	end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. '/' .. string.format('%.0f', count + 1))
return ''`

// removeScript deletes a worker's value if it is that of the incarnation (ARGV: worker, incarnation).
var removeScript = `
local found = redis.call('HGET', KEYS[1], ARGV[1])
if found and string.match(found, '^(.*)/%d+$') == ARGV[2] then
	redis.call('HDEL', KEYS[1], ARGV[1])
end
return ''`

// Renew renews the worker's heartbeat. Another incarnation's value is an
// *OtherIncarnationError, unless that incarnation may be replaced. Where the primary has
// replicas it succeeds only when one of them has the value, so that a fail-over of
// Redis does not undo it.
func (h *Heartbeat) Renew(ctx context.Context, worker, incarnation, replacing string) error {
	node, err := h.node(ctx)
	if err != nil {
		return err
	}
	replication, err := info(ctx, node, "replication")
	if err != nil {
		return err
	}
	var written, waited *goredis.Cmd
	_, err = node.Pipelined(ctx, func(p goredis.Pipeliner) error {
		written = p.Eval(ctx, renewScript, []string{h.key}, worker, incarnation, replacing)
		if replicas(replication) > 0 {
			waited = p.Do(ctx, "WAIT", 1, heartbeatWait)
		}
		return nil
	})
	found, evalErr := written.Text()
	switch {
	case evalErr != nil:
		return fmt.Errorf("renewing in Redis: %w", evalErr)
	case found != "":
		return &OtherIncarnationError{Incarnation: found}
	case waited != nil && !confirmed(waited):
		return fmt.Errorf("renewing in Redis: %w", ErrNotDurable)
	case err != nil:
		return fmt.Errorf("renewing in Redis: %w", err)
	}
	return nil
}

// Remove deletes the worker's value if it is that of the incarnation.
func (h *Heartbeat) Remove(ctx context.Context, worker, incarnation string) error {
	if err := h.client.Eval(ctx, removeScript, []string{h.key}, worker, incarnation).Err(); err != nil {
		return fmt.Errorf("removing a worker from Redis: %w", err)
	}
	return nil
}

// Read returns the primary's run id (empty where it has no INFO) and each worker's
// value. ErrNoPrimary says that no primary could be read.
func (h *Heartbeat) Read(ctx context.Context) (run string, values map[string]string, err error) {
	node, err := h.node(ctx)
	if err != nil {
		return "", nil, err
	}
	fields, err := info(ctx, node, "server", "replication")
	if err != nil {
		return "", nil, err
	}
	if isReplica(fields) {
		leaveReplica(ctx, node, h.key)
		return "", nil, ErrNoPrimary
	}
	if replicasSilent(fields) || h.replicasLost(fields) {
		return "", nil, ErrNoPrimary
	}
	if values, err = node.HGetAll(ctx, h.key).Result(); err != nil {
		return "", nil, fmt.Errorf("reading the workers in Redis: %w", err)
	}
	return fields["run_id"], values, nil
}

func replicas(fields map[string]string) int {
	n, _ := strconv.Atoi(fields["connected_slaves"]) // without INFO there are none that count
	return n
}

// replicasSilent reports a primary whose replicas are all silent: it may be cut off, and
// another one may have taken its place.
func replicasSilent(fields map[string]string) bool {
	n := replicas(fields)
	for i := range n {
		_, lag, found := strings.Cut(fields["slave"+strconv.Itoa(i)], "lag=")
		lag, _, _ = strings.Cut(lag, ",") // from version 8 on Redis and Valkey say more after it
		if seconds, err := strconv.Atoi(lag); !found || err == nil && seconds <= staleReplica {
			return false
		}
	}
	return n > 0
}

// replicasLost reports a primary that has lost its last replica within replicasLostTimeout.
func (h *Heartbeat) replicasLost(fields map[string]string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if run := fields["run_id"]; run != h.run {
		h.run, h.replicated = run, time.Time{}
	}
	now := h.now()
	if replicas(fields) > 0 {
		h.replicated = now
	}
	return replicas(fields) == 0 && !h.replicated.IsZero() && now.Sub(h.replicated) < replicasLostTimeout
}

func (h *Heartbeat) node(ctx context.Context) (goredis.UniversalClient, error) {
	cluster, ok := h.client.(*goredis.ClusterClient)
	if !ok {
		return h.client, nil
	}
	node, err := cluster.MasterForKey(ctx, h.key)
	if err != nil {
		return nil, fmt.Errorf("looking for the node of a key: %w", err)
	}
	return node, nil
}
