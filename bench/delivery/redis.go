package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// keeper stops the server when the script's standard input ends, which also happens when
// this process is killed.
const keeper = `"$@" >/dev/null 2>&1 & server=$!; read -r _; kill $server 2>/dev/null; wait $server; exit 0`

// redisServer is a real Redis on a free loopback port, configured as for production: it
// never evicts, and writes an append-only file.
type redisServer struct {
	addr   string
	keeper *exec.Cmd
	stdin  io.Closer
	client *goredis.Client
}

func startRedis(ctx context.Context, dir string) (*redisServer, error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, fmt.Errorf("this benchmark needs redis-server (Debian: apt-get install redis-server): %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making a folder for Redis: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("looking for a free port: %w", err)
	}
	addr := listener.Addr().String()
	_, port, _ := net.SplitHostPort(addr)
	_ = listener.Close()
	s := &redisServer{addr: addr, client: goredis.NewClient(&goredis.Options{Addr: addr})}
	// Without ctx, because stop ends it in an orderly way.
	s.keeper = exec.Command("/bin/sh", "-c", keeper, "redis-keeper", path, "--bind", "127.0.0.1", "--port", port,
		"--dir", dir, "--maxmemory-policy", "noeviction", "--appendonly", "yes", "--save", "")
	if s.stdin, err = s.keeper.StdinPipe(); err != nil {
		return nil, fmt.Errorf("starting Redis: %w", err)
	}
	if err := s.keeper.Start(); err != nil {
		return nil, fmt.Errorf("starting Redis: %w", err)
	}
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for end := time.Now().Add(10 * time.Second); ; <-retry.C {
		err := s.client.Ping(ctx).Err()
		if err == nil {
			return s, nil
		}
		if time.Now().After(end) || wait(ctx, 20*time.Millisecond) != nil {
			return nil, errors.Join(fmt.Errorf("redis does not answer: %w", err), s.stop())
		}
	}
}

func (s *redisServer) stop() error {
	_ = s.client.Close()
	_ = s.stdin.Close()
	if err := s.keeper.Wait(); err != nil {
		return fmt.Errorf("stopping Redis: %w", err)
	}
	return nil
}

// redisUsage is what Redis reports: CPU seconds, and the highest allocated memory in bytes.
type redisUsage struct{ cpu, peak float64 }

func (s *redisServer) usage(ctx context.Context) (redisUsage, error) {
	text, err := s.client.Info(ctx, "cpu", "memory").Result()
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
