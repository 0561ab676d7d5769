package testenv

import (
	"context"
	"testing"

	"github.com/redis/go-redis/v9"
)

func TestRedisServer(t *testing.T) {
	ctx := context.Background()
	server := RedisServer(t)
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer func() { _ = client.Close() }()
	other := redis.NewClient(&redis.Options{Addr: Redis(t, "--maxmemory-policy", "allkeys-lru")})
	defer func() { _ = other.Close() }()

	if err := client.Set(ctx, "k", "v", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if n := other.DBSize(ctx).Val(); n != 0 {
		t.Errorf("another server has %d keys, want none", n)
	}
	if got := other.ConfigGet(ctx, "maxmemory-policy").Val()["maxmemory-policy"]; got != "allkeys-lru" {
		t.Errorf("the test's own option was not used: %q", got)
	}
	server.Restart()
	if got, err := client.Get(ctx, "k").Result(); err != nil || got != "v" {
		t.Errorf("after a restart: %q, %v; want the data back", got, err)
	}
	server.Stop()
	if err := client.Ping(ctx).Err(); err == nil {
		t.Error("a stopped server answers")
	}
	server.RestartEmpty()
	if n, err := client.DBSize(ctx).Result(); err != nil || n != 0 {
		t.Errorf("after a restart with an empty disk: %d keys, %v", n, err)
	}
}
