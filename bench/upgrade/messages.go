package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
)

const (
	// contact is the phone that writes to all sessions. It writes over the whole check, so
	// each version continues with the keys that the version before it left.
	contact = "+15550000001"
	// writeInterval is the pause between two messages while the workers are replaced.
	writeInterval = 20 * time.Millisecond
	// receiptTimeout is how long to wait for the receipts of all messages.
	receiptTimeout = time.Minute
)

// writeToAll sends a message to each session.
func (c *check) writeToAll() error {
	group, ctx := errgroup.WithContext(c.ctx)
	group.SetLimit(8)
	for _, d := range c.Simulator.Devices() {
		group.Go(func() error { return c.write(ctx, d.JID) })
	}
	return group.Wait()
}

func (c *check) write(ctx context.Context, device string) error {
	if _, err := c.Simulator.Send(ctx, device, contact, "Are you open today?"); err != nil {
		return fmt.Errorf("sending a message: %w", err)
	}
	return nil
}

// writeMeanwhile sends messages to one session after another until stop is called.
func (c *check) writeMeanwhile() (stop func() error) {
	devices := c.Simulator.Devices()
	ctx, cancel := context.WithCancel(c.ctx)
	ended := make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			err := benchenv.Pause(ctx, writeInterval)
			if err == nil {
				err = c.write(ctx, devices[i%len(devices)].JID)
			}
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	return func() error {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			return err
		}
		return nil
	}
}

// unread waits for the receipts of all messages, and counts those that have none.
func (c *check) unread() (n int, err error) {
	for deadline := time.Now().Add(receiptTimeout); ; {
		n = c.Simulator.Stats().Unacknowledged
		if n == 0 || time.Now().After(deadline) {
			return n, nil
		}
		if err := benchenv.Pause(c.ctx, 200*time.Millisecond); err != nil {
			return n, err
		}
	}
}
