package redis

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	goredis "github.com/redis/go-redis/v9"
)

// info reads sections of INFO. A section that the server refuses or does not
// know is left out: only a failed connection is an error.
func info(ctx context.Context, node goredis.Cmdable, sections ...string) (map[string]string, error) {
	fields := map[string]string{}
	for _, section := range sections {
		text, err := node.Info(ctx, section).Result()
		if notOffered(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("asking Redis for INFO: %w", err)
		}
		for line := range strings.Lines(text) {
			if name, value, found := strings.Cut(strings.TrimSpace(line), ":"); found && !strings.HasPrefix(name, "#") {
				fields[name] = value
			}
		}
	}
	return fields, nil
}

// config reads one option of the server; empty and false where the server
// forbids it, as managed ones do.
func config(ctx context.Context, node goredis.Cmdable, name string) (string, bool, error) {
	values, err := node.ConfigGet(ctx, name).Result()
	if notOffered(err) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("asking Redis for its configuration: %w", err)
	}
	value, found := values[name]
	return value, found, nil
}

// notOffered reports whether err is an answer that does not depend on the server's state:
// it does not know the command or forbids it. That it is loading its data is no such answer.
func notOffered(err error) bool {
	var answer goredis.Error
	if err == nil || !errors.As(err, &answer) || errors.Is(err, goredis.Nil) {
		return false
	}
	refused, ok := refusalOf(err)
	return !ok || refused.notOffered()
}

// isReplica reads INFO replication.
func isReplica(fields map[string]string) bool {
	role := fields["role"]
	return role != "" && role != "master"
}

// leaveReplica makes the client connect again. After a fail-over the address may name
// another server, while the former primary answers reads for ever on the present
// connections. The client library gives up a connection that answers READONLY, so a write
// that changes nothing is sent.
func leaveReplica(ctx context.Context, node goredis.Cmdable, key string) {
	_ = node.HDel(ctx, key, "").Err() // a replica refuses it; the next read shows whether that has helped
}

// eachMaster calls f for the server, or for every master of a cluster, one
// after another.
func eachMaster(ctx context.Context, client goredis.UniversalClient, f func(context.Context, goredis.Cmdable) error) error {
	cluster, ok := client.(*goredis.ClusterClient)
	if !ok {
		return f(ctx, client)
	}
	var one sync.Mutex // ForEachMaster asks all at once
	return cluster.ForEachMaster(ctx, func(ctx context.Context, master *goredis.Client) error {
		one.Lock()
		defer one.Unlock()
		return f(ctx, master)
	})
}
