package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	goredis "github.com/redis/go-redis/v9"
)

// redisUsage is what Redis reports: CPU seconds, and the highest allocated memory in bytes.
type redisUsage struct{ cpu, peak float64 }

func usage(ctx context.Context, redis *goredis.Client) (redisUsage, error) {
	text, err := redis.Info(ctx, "cpu", "memory").Result()
	if err != nil {
		return redisUsage{}, fmt.Errorf("reading the usage of Redis: %w", err)
	}
	fields := map[string]float64{}
	for line := range strings.Lines(text) {
		if name, value, found := strings.Cut(strings.TrimSpace(line), ":"); found {
			fields[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	return redisUsage{cpu: fields["used_cpu_user"] + fields["used_cpu_sys"], peak: fields["used_memory_peak"]}, nil
}
