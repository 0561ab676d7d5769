package demo

import (
	"context"
	"errors"
	"fmt"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// clearRedis deletes every key with the prefix.
func clearRedis(address, prefix string) (err error) {
	client := goredis.NewClient(&goredis.Options{Addr: address})
	defer func() { err = errors.Join(err, client.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	keys := client.Scan(ctx, 0, prefix+"*", 1000).Iterator()
	for keys.Next(ctx) {
		if err := client.Unlink(ctx, keys.Val()).Err(); err != nil {
			return fmt.Errorf("clearing Redis: %w", err)
		}
	}
	if err := keys.Err(); err != nil {
		return fmt.Errorf("clearing Redis: %w", err)
	}
	return nil
}
