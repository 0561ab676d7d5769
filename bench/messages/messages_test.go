package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/whatsapp-operator/whatsapp-operator/bench/bare"
	"github.com/whatsapp-operator/whatsapp-operator/bench/benchenv"
	"github.com/whatsapp-operator/whatsapp-operator/internal/delivery"
	"github.com/whatsapp-operator/whatsapp-operator/internal/laravel/laraveltest"
	"github.com/whatsapp-operator/whatsapp-operator/internal/simulator"
)

func TestDoubledMessages(t *testing.T) {
	type item struct{ batch, session, key, id string }
	for _, tt := range []struct {
		name  string
		items []item
		want  int
	}{
		{"two messages", []item{{"b1", "s", "k1", "A"}, {"b1", "s", "k2", "B"}}, 0},
		{"a batch again", []item{{"b1", "s", "k1", "A"}, {"b1", "s", "k1", "A"}}, 0},
		{"in another batch", []item{{"b1", "s", "k1", "A"}, {"b2", "s", "k1", "A"}}, 1},
		{"under another key", []item{{"b1", "s", "k1", "A"}, {"b2", "s", "k2", "A"}}, 1},
		{"under another key in the same batch", []item{{"b1", "s", "k1", "A"}, {"b1", "s", "k2", "A"}}, 1},
		{"under another key, and that batch again", []item{{"b1", "s", "k1", "A"}, {"b2", "s", "k2", "A"}, {"b2", "s", "k2", "A"}}, 1},
		{"of two sessions", []item{{"b1", "s", "k1", "A"}, {"b1", "t", "k2", "A"}}, 0},
		{"without an id", []item{{"b1", "s", "k1", ""}, {"b2", "s", "k2", ""}}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRecorder()
			for _, i := range tt.items {
				r.answer(laraveltest.Request{Kind: delivery.KindMessage, BatchID: i.batch, Items: []laraveltest.Item{
					{SessionID: i.session, Message: delivery.MessageItem{SessionID: i.session, Key: i.key, ID: i.id}},
				}})
			}
			if got := r.doubledMessages(); got != tt.want {
				t.Errorf("%d messages are doubled, want %d", got, tt.want)
			}
		})
	}
}

func TestLatencies(t *testing.T) {
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	sent := []simulator.LedgerEntry{{ID: "slow", Queued: at(0)}, {ID: "lost", Queued: at(1)}, {ID: "quick", Queued: at(2)}}
	arrivals := map[string]time.Time{"slow": at(4), "quick": at(3)}
	got, missing := latencies(sent, func(id string) time.Time { return arrivals[id] }, at(10))
	if want := []time.Duration{time.Second, 4 * time.Second, 9 * time.Second}; missing != 1 || !slices.Equal(got, want) {
		t.Errorf("%s and %d missing, want %s and 1: a message that has not arrived counts with its age", got, missing, want)
	}
}

func TestReceiptsOfBareClients(t *testing.T) {
	server, err := simulator.New(simulator.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return server.Run(ctx) })
	defer func() {
		cancel()
		if err := group.Wait(); err != nil {
			t.Error(err)
		}
	}()
	clients := bare.Options{
		Database: filepath.Join(t.TempDir(), "bare.db"), Endpoint: server.Info().Endpoint, Root: server.Info().NoiseRoot, Control: server.ControlURL(), Pair: 1,
	}
	if err := bare.Run(ctx, clients); err != nil {
		t.Fatal(err)
	}
	// The client is linked, and not connected.
	id, err := server.Write(ctx, simulator.SendRequest{Device: server.Devices()[0].JID, Text: "hello"})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{ctx: ctx, fleet: &benchenv.Fleet{Simulator: server}}
	running := func() error { return nil }
	err = b.awaitReceipts(0, 1, time.Millisecond, running)
	if want := fmt.Sprintf("the first one that is not is %s to %s", id, server.Devices()[0].JID); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("the error is %v, and must say: %s", err, want)
	}
	if sent, _, err := b.ledger(0); err != nil || len(sent) > 0 {
		t.Errorf("%d messages of a bare client count as those of a session (%v)", len(sent), err)
	}
	clients.Pair = 0
	group.Go(func() error { return bare.Run(ctx, clients) })
	if err := b.awaitReceipts(0, 1, time.Minute, running); err != nil {
		t.Error(err)
	}
}
