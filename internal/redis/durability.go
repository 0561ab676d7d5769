package redis

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
)

// DurabilityMode is what the person who runs the operator asks for.
type DurabilityMode string

const (
	// DurabilityAuto uses everything that the server offers.
	DurabilityAuto DurabilityMode = "auto"
	// DurabilityNone counts a write when Redis has answered; a crash of Redis may lose
	// what it had not written to its disk, by default the last second.
	DurabilityNone DurabilityMode = "none"
	// DurabilityReplica counts a write when a replica has it too (WAIT): a fail-over to
	// that replica loses nothing.
	DurabilityReplica DurabilityMode = "replica"
	// DurabilityFsync counts a write when it is on the server's disk (appendfsync always,
	// or WAITAOF): a crash and restart of the server loses nothing.
	DurabilityFsync DurabilityMode = "fsync"
)

const (
	// replicaWait is how long a write may take to a replica; one in the same
	// network needs a millisecond.
	replicaWait = time.Second
	// fsyncWait is how long a write may take to the disk. With appendfsync
	// everysec Redis writes once a second, and a second more when the disk is slow.
	fsyncWait = 2 * time.Second
	// maxRedirects bounds how often a write follows a slot of a cluster.
	maxRedirects = 3
)

var (
	// ErrNotDurable says that Redis has taken a write, but has not confirmed in time that
	// a replica or the disk has it. Repeat it.
	ErrNotDurable = errors.New("redis has taken the write but not made it durable in time")
	// ErrNotOffered says that the server cannot give the durability that was asked for.
	ErrNotOffered = errors.New("redis does not offer the requested durability")
)

// Level is what must have happened to a write before it counts.
type Level struct {
	// FsyncAlways: the server answers only after its disk has the write.
	FsyncAlways bool
	// WaitAOF: each write waits for the disk (Redis 7.2).
	WaitAOF bool
	// Replica: each write waits for one replica.
	Replica bool
}

// String names the level for people.
func (l Level) String() string {
	var parts []string
	switch {
	case l.FsyncAlways:
		parts = append(parts, "fsync (appendfsync always)")
	case l.WaitAOF:
		parts = append(parts, "fsync (WAITAOF)")
	}
	if l.Replica {
		parts = append(parts, "replica (WAIT)")
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, " and ")
}

// Durability makes writes and waits until they count. It may be used by many goroutines.
type Durability struct {
	client goredis.UniversalClient
	key    string
	mode   DurabilityMode
	level  atomic.Pointer[Level]
}

// NewDurability does no I/O: the first write, or Detect, asks the server what it offers.
func NewDurability(client goredis.UniversalClient, keys Keys, mode DurabilityMode) *Durability {
	if mode == "" {
		mode = DurabilityAuto
	}
	return &Durability{client: client, key: keys.Queue(delivery.KindStatus, "items"), mode: mode}
}

// Detect asks the server, of a cluster the node of the queues, which durability it offers,
// and later writes wait for that. ErrNotOffered: it is less than was requested; the
// sentence says what to change.
func (d *Durability) Detect(ctx context.Context) (Level, error) {
	offered, err := d.offered(ctx)
	if err != nil {
		return Level{}, err
	}
	level := offered
	switch d.mode {
	case DurabilityNone:
		level = Level{}
	case DurabilityReplica:
		if !offered.Replica {
			return Level{}, fmt.Errorf("%w: --redis-durability=replica needs a connected replica, and there is none: add one or choose another durability", ErrNotOffered)
		}
		level = Level{Replica: true}
	case DurabilityFsync:
		if !offered.FsyncAlways && !offered.WaitAOF {
			return Level{}, fmt.Errorf("%w: --redis-durability=fsync needs appendonly yes and either Redis 7.2 or appendfsync always: change that or choose another durability", ErrNotOffered)
		}
		level.Replica = false
	}
	d.level.Store(&level)
	return level, nil
}

func (d *Durability) offered(ctx context.Context) (Level, error) {
	if d.mode == DurabilityNone {
		return Level{}, nil
	}
	node, err := d.node(ctx, d.key)
	if err != nil {
		return Level{}, err
	}
	fields, err := info(ctx, node, "persistence", "replication")
	if err != nil {
		return Level{}, err
	}
	var level Level
	replicas, _ := strconv.Atoi(fields["connected_slaves"])
	for i := range replicas {
		if strings.Contains(fields["slave"+strconv.Itoa(i)], "state=online") {
			level.Replica = true
		}
	}
	if fields["aof_enabled"] != "1" {
		return level, nil
	}
	fsync, _, err := config(ctx, node, "appendfsync")
	if err != nil {
		return Level{}, err
	}
	if level.FsyncAlways = fsync == "always"; level.FsyncAlways {
		return level, nil
	}
	// It waits for nothing, and so only shows whether the command is known and allowed.
	err = node.Do(ctx, "WAITAOF", 0, 0, 0).Err()
	if err != nil && !notOffered(err) {
		return Level{}, fmt.Errorf("asking Redis for WAITAOF: %w", err)
	}
	level.WaitAOF = err == nil
	return level, nil
}

// Pipelined runs what fill puts into a pipeline, on one connection to the node
// of key, and returns without an error only when the writes count. All keys
// must be on that node. Where there is no durability to wait for it costs no more than
// the pipeline.
func (d *Durability) Pipelined(ctx context.Context, key string, fill func(goredis.Pipeliner) error) ([]goredis.Cmder, error) {
	level := d.level.Load()
	if level == nil {
		detected, err := d.Detect(ctx)
		if err != nil {
			return nil, err
		}
		level = &detected
	}
	for redirects := 0; ; redirects++ {
		commands, err := d.pipelined(ctx, *level, key, fill)
		cluster, ok := d.client.(*goredis.ClusterClient)
		if !ok || redirects == maxRedirects || !goredis.HasErrorPrefix(err, "MOVED") && !goredis.HasErrorPrefix(err, "ASK") {
			return commands, err
		}
		// A slot moved. The node was asked directly, so that the wait is on the
		// same connection, and so the cluster client has not noticed.
		cluster.ReloadState(ctx)
	}
}

func (d *Durability) pipelined(ctx context.Context, level Level, key string, fill func(goredis.Pipeliner) error) ([]goredis.Cmder, error) {
	node, err := d.node(ctx, key)
	if err != nil {
		return nil, err
	}
	var disk, replica *goredis.Cmd
	commands, err := node.Pipelined(ctx, func(p goredis.Pipeliner) error {
		if err := fill(p); err != nil {
			return err
		}
		if level.WaitAOF {
			disk = p.Do(ctx, "WAITAOF", 1, 0, fsyncWait.Milliseconds())
		}
		if level.Replica {
			replica = p.Do(ctx, "WAIT", 1, replicaWait.Milliseconds())
		}
		return nil
	})
	waits := 0
	var unconfirmed bool
	for _, wait := range []*goredis.Cmd{disk, replica} {
		if wait == nil {
			continue
		}
		waits++
		unconfirmed = unconfirmed || !confirmed(wait)
	}
	own := commands[:max(0, len(commands)-waits)]
	for _, command := range own {
		if err := command.Err(); err != nil && !errors.Is(err, goredis.Nil) {
			return own, err //nolint:wrapcheck // the caller knows what it asked
		}
	}
	if err != nil && !unconfirmed {
		return own, err //nolint:wrapcheck // as above
	}
	if !unconfirmed {
		return own, nil
	}
	if d.mode == DurabilityAuto {
		// A replica that is gone, or a server that was replaced, offers less now;
		// auto requests no more than what is offered.
		now, err := d.Detect(ctx)
		if err == nil && (!level.WaitAOF || !now.WaitAOF || confirmed(disk)) && (!level.Replica || !now.Replica || confirmed(replica)) {
			return own, nil
		}
	}
	return own, ErrNotDurable
}

// confirmed reads the answer of WAIT (a number) or WAITAOF (two, the first of
// which is for the server's own disk).
func confirmed(wait *goredis.Cmd) bool {
	switch answer := wait.Val().(type) {
	case int64:
		return answer >= 1
	case []any:
		if len(answer) > 0 {
			n, _ := answer[0].(int64)
			return n >= 1
		}
	}
	return false
}

// node is the server itself, or the master of key's slot.
func (d *Durability) node(ctx context.Context, key string) (goredis.UniversalClient, error) {
	cluster, ok := d.client.(*goredis.ClusterClient)
	if !ok {
		return d.client, nil
	}
	node, err := cluster.MasterForKey(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("looking for the node of a key: %w", err)
	}
	return node, nil
}
